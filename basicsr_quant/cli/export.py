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
                        help='model.onnx; model.xml for OpenVINO\'s own format. model.json is written beside it')
    parser.add_argument('--engine', choices=('onnxruntime', 'openvino', 'tensorrt'), default='onnxruntime',
                        help='who the file is for: what each fuses differs (default: onnxruntime)')
    parser.add_argument('--checkpoint', metavar='FILE', help='export this checkpoint, not the experiment\'s own')
    parser.add_argument('--opset', type=int, default=21, help='ONNX opset (default: 21)')
    parser.add_argument('--size', type=int, nargs=2, metavar=('HEIGHT', 'WIDTH'),
                        help='a file for one size of LQ image only, for networks that cannot leave it open')
    parser.add_argument('--images', type=int, default=5, help='images that parity is measured on (default: 5)')


def run(args: argparse.Namespace) -> None:
    """Export and print the parity figures."""
    if args.images < 1:
        raise QuantError(f'--images {args.images}: a whole number of at least 1 is needed')
    raw = option_file.read(option_file.find(args.opt))
    from ..deploy.export import check_opset, check_target, need

    check_target(args.output, args.engine)
    check_opset(args.opset, args.engine)
    need('onnx', 'onnxscript', 'onnxruntime', *(('openvino',) if args.engine == 'openvino' else ()))
    import basicsr_quant

    basicsr_quant.enable()
    from ..deploy.export import export
    from ..methods import method_of
    from ..models.deployment import load_quantized, parity_images, psnr_of
    from ..network.trace import trace

    net, plan, path = load_quantized(raw, args.checkpoint, os.getcwd())
    method = method_of(plan)
    if not method.is_static:
        raise QuantError(
            f'quant.method: {plan.method!r} chooses ranges or bits for each image, which no static file can hold; '
            'static methods such as minmax, mse, lsq, pams or odm export'
            + (f', and so does a network trained with {method.static_with}' if method.static_with else '')
        )
    if plan.settings.get('output'):
        raise QuantError(
            f'quant.method: {plan.method!r} quantizes the output of the network, which this version cannot export; '
            'minmax, mse, lsq, pams, odm and auto (a_granularity: tensor) export'
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
    done = export(
        net, plan, args.output, shape=shape, images=images, source=source, psnr=psnr_of(raw.get('scale', 1)),
        engine=args.engine, opset=args.opset, dynamic=not args.size, facts=facts, report=print,
    )
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    print(f'{args.output}: {done.file_bytes:,} bytes, {weights / done.file_bytes:.1f}x less than the FP32 weights')


def _plain(value: Any) -> Any:
    import json

    return json.loads(json.dumps(value, default=str))
