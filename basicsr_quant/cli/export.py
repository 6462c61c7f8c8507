"""``basicsr export``."""

from __future__ import annotations

import argparse
import os
from typing import Any

from .. import option_file
from ..errors import QuantError

name = 'export'
help = 'write a quantized checkpoint as a file that runs in integers, and prove that it does'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option file, the target and the engine."""
    parser.add_argument('-opt', required=True, metavar='FILE', help='option file of the experiment')
    parser.add_argument('-o', '--output', required=True, metavar='FILE',
                        help='model.onnx; model.xml for OpenVINO\'s own format. model.json is written beside it. A '
                        'folder where bits follow the image: one file for each configuration')
    parser.add_argument('--engine', choices=('onnxruntime', 'openvino', 'tensorrt'), default='onnxruntime',
                        help='who the file is for: what each fuses differs (default: onnxruntime)')
    parser.add_argument('--checkpoint', metavar='FILE', help='export this checkpoint, not the experiment\'s own')
    parser.add_argument('--opset', type=int, default=21, help='ONNX opset (default: 21)')
    parser.add_argument('--size', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'),
                        help='a file for one size of LQ image only, for networks that cannot leave it open')
    parser.add_argument('--members', type=int, default=3, help='files for bits that CADyQ chooses (default: 3)')
    parser.add_argument('--triton', metavar='FOLDER', help='put the file into a model repository too, as Triton and '
                        'OpenVINO Model Server load it')
    parser.add_argument('--images', type=int, default=5, help='images that parity is measured on (default: 5)')


def run(args: argparse.Namespace) -> None:
    """Export and print the parity figures."""
    for option in ('images', 'members'):
        if getattr(args, option) < 1:
            raise QuantError(f'--{option} {getattr(args, option)}: a whole number of at least 1 is needed')
    raw = option_file.read(option_file.find(args.opt))
    from ..deploy import export, family, family_files, serving
    from ..deploy.onnx_file import check_opset, need

    check_opset(args.opset, args.engine)
    need('onnx', 'onnxscript', 'onnxruntime', *(('openvino',) if args.engine == 'openvino' else ()))
    block = raw.get('quant')
    if not _may_adapt(block):
        export.check_target(args.output, args.engine)
    if args.triton:
        serving.check_repository(args.triton, args.output)
    import basicsr_quant

    basicsr_quant.enable()
    from ..methods import method_of
    from ..models.deployment import load_quantized, parity_images, psnr_of
    from ..network.trace import trace

    net, plan, path = load_quantized(raw, args.checkpoint, os.getcwd())
    found = _family(net, raw, args) if family.adapts(net) else None
    method = method_of(plan)
    if not method.is_static and found is None:
        raise QuantError(
            f'quant.method: {plan.method!r} chooses ranges or bits for each image, which no static file can hold; '
            'static methods such as minmax, mse, lsq, pams or odm export'
            + (f', and so does a network trained with {method.static_with}' if method.static_with else '')
        )
    shape = trace(net).input_shape
    shape = (1, shape[1], *args.size) if args.size else shape
    images, source = parity_images(raw, shape, args.images, fixed=bool(args.size))
    facts = {
        'name': raw.get('name'),
        'scale': raw.get('scale', 1),
        'pixel_range': [0.0, 1.0],
        'channels': 'RGB' if shape[1] == 3 else str(shape[1]),
        'checkpoint': path,
        'network': _plain(raw['network_g']),
    }
    common: Any = {
        'shape': shape, 'images': images, 'source': source, 'psnr': psnr_of(raw.get('scale', 1)),
        'engine': args.engine, 'opset': args.opset, 'facts': facts, 'report': print,
    }  # fmt: skip
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    if found is not None and len(found.bits) > 1:
        if args.size or args.triton:
            option = '--size' if args.size else '--triton'
            raise QuantError(f'{option} goes with one file; this network becomes a family of files')
        from ..cost import counted_layers, trace_at

        counted = list(counted_layers(trace_at(net, scale=raw.get('scale', 1)), plan))
        family_files.export_family(net, plan, found, args.output, counted=counted, patch=_patch(block), **common)
        return
    if found is not None:
        net, plan = family.frozen(net, found.bits[0], plan)
    export.check_target(args.output, args.engine)
    done = export.export(net, plan, args.output, dynamic=not args.size, **common)
    print(f'{args.output}: {done.file_bytes:,} bytes, {weights / done.file_bytes:.1f}x less than the FP32 weights')
    if args.triton:
        sides = [None if not args.size else side for side in shape[2:]]
        given = [None if done.plan.batched else 1, shape[1], *sides]
        folder = serving.write_repository(args.triton, args.output, args.engine, given)
        print(f'{folder}: config.pbtxt and 1/model{os.path.splitext(args.output)[1]}')


def _may_adapt(block: Any) -> bool:
    """Whether the method of an option file may choose bits for each image, so that a folder is wanted."""
    from ..methods import METHODS

    method = block.get('method') if isinstance(block, dict) else None
    return isinstance(method, str) and method in METHODS and not METHODS[method].is_static


def _patch(block: Any) -> tuple[int, int] | None:
    from ..config import read_config

    patch = read_config(block).patch
    return None if patch is None else (patch.size, patch.stride)


def _family(net: Any, raw: dict[str, Any], args: argparse.Namespace) -> Any:
    """The configurations of a network with adaptive bits; a folder to put them in is checked before."""
    from ..deploy import family, family_files
    from ..models.deployment import calibration_images
    from ..quantizers import SelectedRange

    selects = any(isinstance(module, SelectedRange) for module in net.modules())
    found = family.family_of(net, calibration_images(raw) if selects else (), args.members)
    if len(found.bits) > 1:
        family_files.check_folder(args.output)
    return found


def _plain(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value, default=str))
