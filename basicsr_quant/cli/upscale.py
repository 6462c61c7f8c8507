"""``basicsr upscale``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import QuantError

name = 'upscale'
help = 'up-scale photographs or folders of them with an exported file or a checkpoint'

_TILE = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add input, output, model and tiles."""
    parser.add_argument('-i', '--input', required=True, metavar='PATH', help='an image, or a folder of images')
    parser.add_argument('-o', '--output', required=True, metavar='PATH',
                        help='a folder, made where it is missing; or NAME.png for one image. Files are PNG')
    parser.add_argument('-m', '--model', required=True, metavar='PATH', help='model.onnx, .xml, a folder that '
                        '`basicsr export` made of adaptive bits or, with -opt, .pth')
    parser.add_argument('-opt', metavar='FILE', help='option file of a .pth, which says what network it is of')
    parser.add_argument('--engine', choices=('onnxruntime', 'openvino'), help='runs a .onnx (default: onnxruntime)')
    parser.add_argument('--tile', type=int, help=f'largest side of a tile in pixels of the input (default: {_TILE})')
    parser.add_argument('--overlap', type=int, default=16, help='pixels a tile sees beyond its edge (default: 16)')
    parser.add_argument('--batch', type=int, help=f'tiles at once (default: what holds a tile of {_TILE})')
    parser.add_argument('--threads', type=int, help='threads of the engine (default: its own choice)')
    parser.add_argument('--overwrite', action='store_true', help='do images again whose output is there')


def run(args: argparse.Namespace) -> int:
    """Up-scale; images that are there already are left alone, so that a folder goes on where it was."""
    for option, least in (('tile', 16), ('overlap', 0), ('batch', 1), ('threads', 1)):
        value = getattr(args, option)
        if value is not None and value < least:
            raise QuantError(f'--{option} {value}: at least {least} is needed')
    import basicsr_quant

    basicsr_quant.enable()
    from tqdm import tqdm

    from ..data import image_files
    from ..deploy import tiles
    from ..deploy.files import check_writable

    found = image_files.find_images(args.input)
    pending = [(file, target) for file, target in _targets(found, args) if args.overwrite or not target.exists()]
    if len(pending) < len(found):
        print(f'{len(found) - len(pending)} of {len(found)} images are there already; --overwrite does them again')
    if not pending:
        return 0
    check_writable(pending[0][1].parent, f'-o {args.output}')
    network = _network(args)
    side = args.tile or network.tile or _TILE
    batch = (args.batch or max(1, (_TILE // side) ** 2)) if network.batched else 1
    tiling = tiles.Tiling(side, args.overlap, network.fixed, batch)
    failed: list[str] = []
    work: dict[Path, int] = {}
    for file, _ in pending:
        try:
            work[file] = tiling.work(*image_files.image_size(file))
        except QuantError as error:
            failed.append(str(error))
    clock = _Clock(network.run)
    begin = time.perf_counter()
    todo = [(file, target) for file, target in pending if file in work]
    with tqdm(total=sum(work.values()), unit='px', unit_scale=True, disable=None) as bar:
        for (file, target), read in zip(todo, _read_ahead(todo)):
            try:
                image = read()
                bar.total += (image_files.passes(image.shape, network.channels) - 1) * work[file]
                bands = image_files.through_network(
                    image, network.channels, network.scale,
                    lambda part: tiles.upscale(clock, part, network.scale, tiling, bar.update),
                )  # fmt: skip
                height, width = (side * network.scale for side in image.shape[:2])
                _write(target, height, width, image, bands)
            except image_files.UnreadableImage as error:
                failed.append(str(error))
                bar.update(work[file])
    whole = time.perf_counter() - begin
    share = f', {100 * clock.seconds / whole:.0f} % of it in the engine' if whole > 0 else ''
    print(f'{len(pending) - len(failed)} images in {whole:.1f} s{share}')
    if network.summary is not None:
        print(network.summary())
    if failed:
        more = f' ({len(failed)} images failed)' if len(failed) > 1 else ''
        raise QuantError(failed[0] + more)
    return 0


class _Clock:
    """A network that adds up the seconds spent in it."""

    def __init__(self, network: Callable[[Any], Any]) -> None:
        self.network, self.seconds = network, 0.0

    def __call__(self, image: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.network(image)
        finally:
            self.seconds += time.perf_counter() - start


def _read_ahead(todo: list[tuple[Path, Path]]) -> Iterator[Callable[[], Any]]:
    """Functions that give the images; while one is worked on, the next one is read."""
    from ..data.image_files import read_image

    with ThreadPoolExecutor(1) as pool:
        upcoming: Future[Any] | None = None
        for index in range(len(todo)):
            current = upcoming or pool.submit(read_image, todo[index][0])
            upcoming = pool.submit(read_image, todo[index + 1][0]) if index + 1 < len(todo) else None
            yield current.result


def _write(target: Path, height: int, width: int, image: Any, bands: Iterator[Any]) -> None:
    """Write bands as they come, compressed and written while the next one is computed."""
    from ..data.png_file import PngFile

    channels = 1 if image.ndim == 2 else image.shape[2]
    with PngFile(target, height, width, channels, image.dtype) as file, ThreadPoolExecutor(1) as pool:
        written: Future[None] | None = None
        for band in bands:
            if written is not None:
                written.result()
            written = pool.submit(file.write, band)
        if written is not None:
            written.result()


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


def _network(args: argparse.Namespace) -> Any:
    """The network that ``-m`` names, as :class:`~basicsr_quant.deploy.loading.Loaded`."""
    from ..deploy.family_files import load_family
    from ..deploy.loading import load_file

    path = Path(args.model)
    if path.is_dir():
        return load_family(path, args.engine, args.threads)
    if not path.is_file():
        raise QuantError(f'-m {args.model} does not exist')
    if path.suffix == '.pth':
        return _from_checkpoint(args)
    if path.suffix not in ('.onnx', '.xml'):
        raise QuantError(f'-m {args.model}: a file that ends in .onnx, .xml or .pth is needed')
    if args.opt:
        raise QuantError(f'-opt goes with a .pth only; {args.model} says itself what it is')
    return load_file(path, args.engine, args.threads)


def _from_checkpoint(args: argparse.Namespace) -> Any:
    import torch

    from .. import option_file
    from ..deploy.loading import Loaded
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

    return Loaded(network, traced.input_shape[1], traced.output_shape[-1] // traced.input_shape[-1])
