"""``basicsr upscale``."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import QuantError

name = 'upscale'
help = 'up-scale photographs or folders of them with an exported file or a checkpoint'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add input, output, model and tiles."""
    parser.add_argument('-i', '--input', required=True, metavar='PATH', help='an image, or a folder of images')
    parser.add_argument('-o', '--output', required=True, metavar='PATH',
                        help='a folder, made where it is missing; or NAME.png for one image. Files are PNG')
    parser.add_argument('-m', '--model', required=True, metavar='FILE', help='model.onnx, .xml or, with -opt, .pth')
    parser.add_argument('-opt', metavar='FILE', help='option file of a .pth, which says what network it is of')
    parser.add_argument('--engine', choices=('onnxruntime', 'openvino'), help='runs a .onnx (default: onnxruntime)')
    parser.add_argument('--tile', type=int, default=256, help='side of a tile in pixels of the input (default: 256)')
    parser.add_argument('--overlap', type=int, default=16, help='pixels a tile sees beyond its edge (default: 16)')
    parser.add_argument('--threads', type=int, help='threads of the engine (default: its own choice)')
    parser.add_argument('--overwrite', action='store_true', help='do images again whose output is there')


def run(args: argparse.Namespace) -> int:
    """Up-scale; images that are there already are left alone, so that a folder goes on where it was."""
    if args.tile < 16 or args.overlap < 0:
        raise QuantError(f'--tile {args.tile} --overlap {args.overlap}: at least 16 and 0 are needed')
    import basicsr_quant

    basicsr_quant.enable()
    from tqdm import tqdm

    from ..data import image_files
    from ..deploy import tiles
    from ..deploy.onnx_file import write_bytes

    found = image_files.find_images(args.input)
    pending = [(file, target) for file, target in _targets(found, args) if args.overwrite or not target.exists()]
    if len(pending) < len(found):
        print(f'{len(found) - len(pending)} of {len(found)} images are there already; --overwrite does them again')
    if not pending:
        return 0
    network, channels, scale, fixed = _network(args)
    tiling = tiles.Tiling(args.tile, args.overlap, fixed)
    failed: list[str] = []
    sizes: dict[Path, int] = {}
    for file, _ in pending:
        try:
            sizes[file] = tiles.count(*image_files.image_size(file), tiling)
        except QuantError as error:
            failed.append(str(error))
    spent = 0.0

    def timed(image: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        output = network(image)
        spent += time.perf_counter() - start
        return output

    begin = time.perf_counter()
    with tqdm(total=sum(sizes.values()), unit='tile', disable=None) as bar:
        for file, target in pending:
            if file not in sizes:
                continue
            try:
                image = image_files.read_image(file)
                bar.total += (image_files.passes(image.shape, channels) - 1) * sizes[file]
                up = image_files.through_network(
                    image, channels, scale, lambda part: tiles.upscale(timed, part, scale, tiling, bar.update)
                )
            except QuantError as error:
                failed.append(str(error))
                bar.update(sizes[file])
                continue
            write_bytes(target, image_files.encode_png(up))
    whole = time.perf_counter() - begin
    share = f', {100 * spent / whole:.0f} % of it in the engine' if whole > 0 else ''
    print(f'{len(pending) - len(failed)} images in {whole:.1f} s{share}')
    if failed:
        more = f' ({len(failed)} images failed)' if len(failed) > 1 else ''
        raise QuantError(failed[0] + more)
    return 0


def _targets(found: list[Path], args: argparse.Namespace) -> list[tuple[Path, Path]]:
    output = Path(args.output)
    if output.suffix.lower() == '.png' and not output.is_dir():
        if len(found) > 1:
            raise QuantError(f'-o {args.output} is one file, but -i {args.input} holds {len(found)} images')
        pairs = [(found[0], output)]
    else:
        stems = [file.stem for file in found]
        pairs = [
            (file, output / f'{file.stem if stems.count(file.stem) == 1 else file.name}.png') for file in found
        ]
    for file, target in pairs:
        if target.absolute() == file.absolute():
            raise QuantError(f'-o {args.output} would write over {file}; name another folder')
    return pairs


def _network(args: argparse.Namespace) -> tuple[Callable[[Any], Any], int, int, tuple[int, int] | None]:
    """The network, its channels and scale, and the only size it takes, if so."""
    import torch

    path = Path(args.model)
    if not path.is_file():
        raise QuantError(f'-m {args.model} does not exist')
    if path.suffix == '.pth':
        return _from_checkpoint(args)
    if path.suffix not in ('.onnx', '.xml'):
        raise QuantError(f'-m {args.model}: a file that ends in .onnx, .xml or .pth is needed')
    if args.opt:
        raise QuantError(f'-opt goes with a .pth only; {args.model} says itself what it is')
    from ..deploy import engines

    card: dict[str, Any] = {}
    beside = path.with_suffix('.json')
    if beside.is_file():
        try:
            card = json.loads(beside.read_text(encoding='utf-8'))
        except (OSError, ValueError) as error:
            raise QuantError(f'{beside} cannot be read: {error}') from None
    shape = list(card.get('input', {}).get('shape', [1, 3, 'height', 'width']))
    fixed = (shape[2], shape[3]) if all(isinstance(side, int) for side in shape[2:]) else None
    if path.suffix == '.xml' or args.engine == 'openvino':
        network = engines.openvino_runner(str(path), threads=args.threads)
    else:
        network = engines.onnxruntime_runner(str(path), threads=args.threads)
    probe = fixed or (32, 32)
    made = network(torch.zeros(1, shape[1], *probe)).shape
    return network, shape[1], made[-1] // probe[1], fixed


def _from_checkpoint(args: argparse.Namespace) -> tuple[Callable[[Any], Any], int, int, None]:
    import torch

    from .. import option_file
    from ..models import checkpoint
    from ..models.deployment import load_quantized
    from ..models.preparation import build_float
    from ..network.trace import trace

    if not args.opt:
        raise QuantError(f'-m {args.model}: a checkpoint does not say what network it is of; give -opt with its file')
    if args.threads:
        torch.set_num_threads(args.threads)
    raw = option_file.read(option_file.find(args.opt))
    file = checkpoint.read_network_file(args.model)
    if file.plan is not None:
        net, _, _ = load_quantized(raw, args.model, '.')
    else:
        net = build_float(raw['network_g']).eval()
        checkpoint.load_state(net, file, (raw.get('path') or {}).get('param_key_g', 'params'))
    traced = trace(net)

    def network(image: Any) -> Any:
        with torch.inference_mode():
            return net(image)

    return network, traced.input_shape[1], traced.output_shape[-1] // traced.input_shape[-1], None
