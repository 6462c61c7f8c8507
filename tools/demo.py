"""The whole way once, on real photographs, without fetching anything: data, ODM training, test, table, picture.

    python tools/demo.py        (or: make demo)

Builds a small LMDB data set from photographs inside scikit-image, trains the option files demo_*_ODM.yml with
``basicsr train``, tests all demo_*.yml with ``basicsr test`` and compares floating point, post-training quantization
and ODM on photographs held out by name. Minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from demo_picture import side_by_side
from photographs import HELD_OUT, TRAINING, read
from tqdm import tqdm

from basicsr_quant import compat
from basicsr_quant.data.bicubic import crop_to_multiple, imresize, low_resolution
from basicsr_quant.data.sub_images import Image, entries, write_lmdb
from basicsr_quant.errors import QuantError

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / 'datasets' / 'demo'
RESULTS = ROOT / 'results' / 'demo'
SCALE = 2
SIZE, STEP = 192, 144
"""HR pixels of a training sub-image and from one to the next."""

RUNS = (
    ('FP32', 'demo_EDSR_x2_FP32', False),
    ('PTQ min-max W4A4', 'demo_EDSR_x2_W4A4_MinMax', False),
    ('ODM W4A4', 'demo_EDSR_x2_W4A4_ODM', True),
    ('PTQ min-max W2A2', 'demo_EDSR_x2_W2A2_MinMax', False),
    ('ODM W2A2', 'demo_EDSR_x2_W2A2_ODM', True),
)
"""Label, option file, whether it is trained."""

CROPS = {'coffee': (150, 210), 'chelsea': (80, 130), 'rocket': (200, 270)}
"""Upper left corner (row, column) of what the picture shows of each photograph."""


def build_data() -> None:
    """Write the training LMDBs and the held-out pairs anew, under a temporary name until they are whole."""
    unfinished = DATA.with_name('demo.unfinished')
    shutil.rmtree(unfinished, ignore_errors=True)
    pairs: list[tuple[str, Image, Image]] = []
    for name in tqdm(TRAINING, unit='photograph', desc='LR by bicubic'):
        hr = crop_to_multiple(read(name), SCALE)
        pairs.append((Path(name).stem, hr, low_resolution(hr, SCALE)))
    for label, index, scale in (('train_HR_sub', 1, 1), (f'train_LR_bicubic_X{SCALE}_sub', 2, SCALE)):
        size, step = SIZE // scale, STEP // scale
        bar = tqdm(pairs, unit='photograph', desc=label)
        parts = [entry for pair in bar for entry in entries(pair[0], pair[index], size, step)]
        # Calibration takes the first images of a data set: numbered in random order they come from all photographs.
        order = np.random.default_rng(0).permutation(len(parts))
        write_lmdb(
            unfinished / f'{label}.lmdb',
            [[(f'{number:03d}_{key}', png, shape) for number, (key, png, shape) in zip(order, parts)]],
        )
    for name in HELD_OUT:
        hr = crop_to_multiple(read(name), SCALE)
        stem = Path(name).stem
        save(hr, unfinished / 'held_out' / 'HR' / f'{stem}.png')
        save(low_resolution(hr, SCALE), unfinished / 'held_out' / 'LR_bicubic' / f'X{SCALE}' / f'{stem}x{SCALE}.png')
    shutil.rmtree(DATA, ignore_errors=True)
    os.replace(unfinished, DATA)


def save(image: Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), image)


def basicsr(command: str, option_file: str) -> None:
    """Run ``basicsr <command> -opt options/<option_file>.yml`` as a user would."""
    line = [sys.executable, '-m', 'basicsr_quant', command, '-opt', f'options/{option_file}.yml']
    print(f'\n$ basicsr {" ".join(line[3:])}', flush=True)
    if subprocess.run(line, cwd=ROOT, check=False).returncode:
        raise QuantError(f'basicsr {" ".join(line[3:])} failed; what it printed stands above')


def held_out(*parts: str) -> dict[str, Image]:
    folder = DATA.joinpath('held_out', *parts)
    return {path.stem.replace(f'x{SCALE}', ''): cv2.imread(str(path)) for path in sorted(folder.glob('*.png'))}


def bicubic_row() -> dict[str, Any]:
    """Measure bicubic upscaling with the host's metrics: Y, border 2."""
    from basicsr.metrics import calculate_psnr, calculate_ssim

    hr, lr = held_out('HR'), held_out('LR_bicubic', f'X{SCALE}')
    up = {name: imresize(image, SCALE) for name, image in lr.items()}
    options = {'crop_border': SCALE, 'test_y_channel': True}
    images = {
        name: {
            'psnr': float(calculate_psnr(up[name], hr[name], **options)),
            'ssim': float(calculate_ssim(up[name], hr[name], **options)),
        }
        for name in hr
    }
    means = {key: float(np.mean([i[key] for i in images.values()])) for key in ('psnr', 'ssim')}
    return {'label': 'bicubic', 'bits': '-', 'weight_bytes': None, 'images': images, 'pictures': up, **means}


def network_row(label: str, name: str) -> dict[str, Any]:
    """Read what ``basicsr test`` left behind."""
    folder = ROOT / 'results' / name
    metrics = json.loads((folder / 'metrics.json').read_text())
    (dataset, figures) = next(iter(metrics['datasets'].items()))
    pictures = {}
    for image in figures['images']:
        found = sorted((folder / 'visualization' / dataset).glob(f'{image}*.png'))
        pictures[image] = cv2.imread(str(found[0]))
    bits = f'{metrics["w_bits"]}/{metrics["a_bits"]}'
    return {
        'label': label,
        'bits': bits,
        'weight_bytes': metrics['cost']['weight_bytes'],
        'psnr': figures['psnr'],
        'ssim': figures['ssim'],
        'images': figures['images'],
        'pictures': pictures,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Return the comparison as a Markdown table that also reads well on a screen."""
    names = [Path(name).stem for name in HELD_OUT]
    head = ['', 'PSNR', 'SSIM', 'bits W/A', 'weight bytes', *names]
    cells = [head]
    for row in rows:
        size = '-' if row['weight_bytes'] is None else f'{row["weight_bytes"]:,}'
        each = [f'{row["images"][name]["psnr"]:.2f}' for name in names]
        cells.append([row['label'], f'{row["psnr"]:.2f}', f'{row["ssim"]:.4f}', row['bits'], size, *each])
    widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
    cells.insert(1, ['-' * widths[0]] + ['-' * (width - 1) + ':' for width in widths[1:]])
    padded = [[f'{line[0]:<{widths[0]}}', *(f'{c:>{w}}' for c, w in zip(line[1:], widths[1:]))] for line in cells]
    return '\n'.join(f'| {" | ".join(line)} |' for line in padded)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--data-only', action='store_true', help='build datasets/demo and stop')
    args = parser.parse_args(argv)
    began = time.perf_counter()
    try:
        compat.apply()
        build_data()
        if args.data_only:
            print(f'{DATA} is ready')
            return 0
        for _, name, trained in RUNS:
            if trained:
                basicsr('train', name)
            basicsr('test', name)
        rows = [bicubic_row()] + [network_row(label, name) for label, name, _ in RUNS]
    except QuantError as error:
        print(f'demo.py: {error}', file=sys.stderr)
        return 2
    RESULTS.mkdir(parents=True, exist_ok=True)
    text = table(rows)
    (RESULTS / 'table.md').write_text(text + '\n')
    picture = RESULTS / 'side_by_side.png'
    side_by_side(held_out('HR'), rows, CROPS, picture)
    print(f'\nx{SCALE} on {", ".join(HELD_OUT)}, which no training and no calibration saw.')
    print(f'PSNR in dB and SSIM on Y, border {SCALE}; means of the three, then PSNR of each.\n\n{text}')
    print(f'\nPicture: {picture}\nTime: {time.perf_counter() - began:.0f} s')
    return 0


if __name__ == '__main__':
    sys.exit(main())
