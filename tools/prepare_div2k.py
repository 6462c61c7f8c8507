"""Prepare what the option files read: DIV2K sub-images as LMDB, and the benchmark sets.

    python tools/prepare_div2k.py --source DIV2K_train_HR                 -> datasets/DIV2K/*.lmdb
    python tools/prepare_div2k.py --benchmarks folder_with_Set5_Set14     -> datasets/Set5, datasets/Set14 ...

HR images are cut into 480x480 windows every 240 pixels, LR images into the matching windows. LR images are the
official ones where DIV2K_train_LR_bicubic/X<scale> lies beside the source, and else made by MATLAB-compatible bicubic.
What is finished is kept: an interrupted run is repeated with the same command.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from multiprocessing import Pool
from pathlib import Path

import cv2
from tqdm import tqdm

from basicsr_quant import compat
from basicsr_quant.data.bicubic import crop_to_multiple, low_resolution
from basicsr_quant.data.sub_images import Entry, Image, entries, write_lmdb
from basicsr_quant.errors import QuantError

SUFFIXES = {'.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff'}
ALIGN = 12
"""HR images are cropped to a multiple of this, so that one HR set serves x2, x3 and x4; DIV2K's sizes already are."""
HR_NAMES = ('HR', 'GTmod12', 'GT', 'original')
"""Folders that hold the ground truth in the usual copies of the benchmark sets."""


def images_in(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in SUFFIXES) if folder.is_dir() else []


def read(path: Path) -> Image:
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise QuantError(f'{path} cannot be read as an image')
    return image


def find_source(source: Path) -> tuple[Path, list[Path]]:
    """Return the folder of HR images (``source`` itself or ``source/DIV2K_train_HR``) and its images."""
    for folder in (source, source / 'DIV2K_train_HR'):
        files = images_in(folder)
        if files:
            return folder, files
    raise QuantError(
        f'--source {source} holds no images: give the folder DIV2K_train_HR with the 800 PNG files of '
        'DIV2K_train_HR.zip, which its authors offer for academic research at https://data.vision.ee.ethz.ch/cvl/DIV2K/'
    )


def find_low_resolution(folder: Path, files: list[Path], scale: int) -> Path | None:
    """Return the folder of official LR images next to ``folder``, or None where there is none.

    Raises:
        QuantError: If it is there but lacks an image.
    """
    official = folder.parent / 'DIV2K_train_LR_bicubic' / f'X{scale}'
    if not official.is_dir():
        return None
    missing = [f for f in files if not (official / f'{f.stem}x{scale}.png').is_file()]
    if missing:
        raise QuantError(
            f'{official} lacks {missing[0].stem}x{scale}.png and {len(missing) - 1} more of {len(files)} images: '
            'complete the folder, or move it away to have LR images made by MATLAB-compatible bicubic'
        )
    return official


def cut(path: Path, scale: int, official: Path | None, size: int, step: int) -> list[Entry]:
    """Return the encoded sub-images of one HR image, or of its LR image for ``scale`` above 1."""
    image = crop_to_multiple(read(path), ALIGN)
    if scale > 1 and official is None:
        image = low_resolution(image, scale)
    elif scale > 1:
        height, width = image.shape[0] // scale, image.shape[1] // scale
        image = read(official / f'{path.stem}x{scale}.png')[:height, :width]  # type: ignore[operator]
        if image.shape[:2] != (height, width):
            raise QuantError(f'{official}/{path.stem}x{scale}.png is smaller than {path} divided by {scale}')
    return entries(path.stem, image, size // scale, step // scale)


def cut_all(files: list[Path], jobs: int, work: partial[list[Entry]], label: str) -> Iterator[list[Entry]]:
    """Cut every image in ``jobs`` processes, in order; only a few results wait in memory."""
    bar = tqdm(total=len(files), unit='image', desc=label)
    rest = iter(files)
    with Pool(jobs) as pool:
        while group := list(islice(rest, 4 * jobs)):
            for result in pool.imap(work, group):
                bar.update()
                yield result
    bar.close()


def prepare_training(args: argparse.Namespace) -> None:
    """Write the HR LMDB and one LR LMDB a scale into ``args.out``."""
    if args.crop_size % ALIGN or args.step % ALIGN or min(args.crop_size, args.step) < ALIGN:
        raise QuantError(
            f'--crop-size {args.crop_size} and --step {args.step} must be multiples of {ALIGN}, '
            'so that they are whole numbers of pixels at x2, x3 and x4'
        )
    folder, files = find_source(args.source)
    officials = {scale: find_low_resolution(folder, files, scale) for scale in args.scales}
    compat.apply()
    for scale in [1, *args.scales]:
        name = 'DIV2K_train_HR_sub.lmdb' if scale == 1 else f'DIV2K_train_LR_bicubic_X{scale}_sub.lmdb'
        target = args.out / name
        if target.is_dir():
            print(f'{target}: already there, kept')
            continue
        official = officials.get(scale)
        work = partial(cut, scale=scale, official=official, size=args.crop_size, step=args.step)
        count = write_lmdb(target, cut_all(files, args.jobs, work, target.name))
        made = '' if scale == 1 else f', LR {"from " + str(official) if official else "by MATLAB-compatible bicubic"}'
        print(f'{target}: {count} sub-images of {len(files)} images{made}')


def copy(path: Path, target: Path) -> None:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(target.name + '.tmp')
        shutil.copyfile(path, temporary)
        os.replace(temporary, target)


def save(image: Image, target: Path) -> None:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f'.{target.name}')
        cv2.imwrite(str(temporary), image)
        os.replace(temporary, target)


def prepare_benchmarks(args: argparse.Namespace) -> None:
    """Arrange every set in ``args.benchmarks`` as ``<out>/<set>/HR`` and ``<out>/<set>/LR_bicubic/X<scale>``."""
    found = []
    folders = sorted(p for p in args.benchmarks.iterdir() if p.is_dir()) if args.benchmarks.is_dir() else []
    for folder in folders:
        ground_truth = next((folder / n for n in HR_NAMES if images_in(folder / n)), folder)
        if images_in(ground_truth):
            found.append((folder, images_in(ground_truth)))
    if not found:
        raise QuantError(
            f'--benchmarks {args.benchmarks} holds no set: it must have folders such as Set5 and Set14, with their '
            f'images inside or inside one of {", ".join(HR_NAMES)}'
        )
    for folder, files in found:
        out = args.out / folder.name
        for path in tqdm(files, unit='image', desc=folder.name):
            hr = read(path)
            save(hr, out / 'HR' / f'{path.stem}.png')
            for scale in args.scales:
                name = f'{path.stem}x{scale}.png'
                official = folder / 'LR_bicubic' / f'X{scale}' / name
                target = out / 'LR_bicubic' / f'X{scale}' / name
                if official.is_file():
                    copy(official, target)
                else:
                    save(low_resolution(hr, scale), target)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--source', type=Path, help='folder of HR images: DIV2K_train_HR, or the folder it lies in')
    parser.add_argument('--benchmarks', type=Path, help='folder that holds Set5, Set14 ...')
    parser.add_argument('--out', type=Path, help='default: datasets/DIV2K for --source, datasets for --benchmarks')
    parser.add_argument('--scales', type=int, nargs='+', default=[2, 3, 4], choices=[2, 3, 4])
    parser.add_argument('--jobs', type=int, default=os.cpu_count() or 1, help='processes')
    parser.add_argument('--crop-size', type=int, default=480, help='HR pixels of a sub-image')
    parser.add_argument('--step', type=int, default=240, help='HR pixels from one sub-image to the next')
    args = parser.parse_args(argv)
    if (args.source is None) == (args.benchmarks is None):
        parser.error('give either --source (training images) or --benchmarks (test sets)')
    if args.jobs < 1:
        parser.error(f'--jobs must be at least 1, not {args.jobs}')
    try:
        if args.source:
            args.out = args.out or Path('datasets/DIV2K')
            prepare_training(args)
        else:
            args.out = args.out or Path('datasets')
            prepare_benchmarks(args)
    except QuantError as error:
        print(f'prepare_div2k.py: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    sys.exit(main())
