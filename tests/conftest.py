"""Small real data sets and option files that every test of the host's side starts from."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

if 'PYTEST_XDIST_WORKER' in os.environ:  # as many workers as cores: each has one, and so have the commands it runs
    os.environ.setdefault('OMP_NUM_THREADS', '1')


@pytest.fixture(scope='session')
def assets() -> Path:
    """The folder of real weights and images; tests that need it are skipped without it."""
    folder = os.environ.get('BASICSR_QUANT_DATA')
    if not folder or not Path(folder).is_dir():
        pytest.skip('BASICSR_QUANT_DATA names no folder')
    return Path(folder)


@pytest.fixture
def said() -> Iterator[list[str]]:
    """What is logged, whether the host has stopped its logger's propagation or not."""
    lines: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    handler, logger = Handler(), logging.getLogger('basicsr')
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.setLevel(level or logging.INFO)  # the host may have begun to log meanwhile, and says so only once
    logger.removeHandler(handler)


@pytest.fixture(scope='session')
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `gt` (10 images of 32x40) and `lq` (16x20), and the same as `gt.lmdb` and `lq.lmdb`."""
    cv2, lmdb = pytest.importorskip('cv2'), pytest.importorskip('lmdb')
    root = tmp_path_factory.mktemp('images')
    draw = np.random.default_rng(0)
    for name in ('gt', 'lq'):
        (root / name).mkdir()
    for number in range(10):
        smooth = cv2.resize(draw.integers(0, 256, (5, 6, 3)).astype(np.uint8), (40, 32), interpolation=cv2.INTER_CUBIC)
        cv2.imwrite(str(root / 'gt' / f'{number:04d}.png'), smooth)
        half = cv2.resize(smooth, (20, 16), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(root / 'lq' / f'{number:04d}.png'), half)
    for name in ('gt', 'lq'):
        write_lmdb(lmdb, root / name, root / f'{name}.lmdb')
    return root


def write_lmdb(lmdb: Any, source: Path, target: Path) -> None:
    """Write the PNG files of a folder as a database in BasicSR's layout."""
    size = {'gt': (32, 40), 'lq': (16, 20)}[source.name]
    with lmdb.open(str(target), map_size=1 << 20) as environment, environment.begin(write=True) as transaction:
        lines = []
        for file in sorted(source.glob('*.png')):
            transaction.put(file.stem.encode(), file.read_bytes())
            lines.append(f'{file.name} ({size[0]},{size[1]},3) 1\n')
    (target / 'meta_info.txt').write_text(''.join(lines))


@pytest.fixture
def options(images: Path) -> dict[str, Any]:
    """A stock BasicSR training file for a tiny EDSR x2 on the CPU: 10 images, batches of 3, so 3 batches an epoch."""

    def data(name: str, **more: Any) -> dict[str, Any]:
        return {
            'name': name, 'type': 'PairedImageDataset', 'dataroot_gt': str(images / 'gt'),
            'dataroot_lq': str(images / 'lq'), 'io_backend': {'type': 'disk'}, **more,
        }

    return copy.deepcopy({
        'name': 'tiny', 'model_type': 'SRModel', 'scale': 2, 'num_gpu': 0, 'manual_seed': 3,
        'datasets': {
            'train': data('Train', gt_size=16, use_hflip=True, use_rot=True, num_worker_per_gpu=0,
                          batch_size_per_gpu=3, dataset_enlarge_ratio=1, prefetch_mode=None),
            'val': data('Val'),
        },
        'network_g': {
            'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_block': 1, 'upscale': 2,
            'img_range': 255.0, 'rgb_mean': [0.4488, 0.4371, 0.4040],
        },
        'path': {'pretrain_network_g': None, 'strict_load_g': True, 'resume_state': None},
        'train': {
            'ema_decay': 0.9, 'optim_g': {'type': 'Adam', 'lr': 1e-3, 'weight_decay': 0, 'betas': [0.9, 0.99]},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [5], 'gamma': 0.5}, 'total_iter': 8, 'warmup_iter': -1,
            'pixel_opt': {'type': 'L1Loss', 'loss_weight': 1.0, 'reduction': 'mean'},
        },
        'val': {
            'val_freq': 2, 'save_img': False,
            'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 2, 'test_y_channel': True}},
        },
        'logger': {'print_freq': 1, 'save_checkpoint_freq': 4, 'use_tb_logger': False},
        'dist_params': {'backend': 'nccl', 'port': 29500},
    })


@pytest.fixture
def option_file(tmp_path: Path) -> Callable[[dict[str, Any]], str]:
    """Write options as a YAML file and return its path."""

    def write(options: dict[str, Any], name: str = 'options.yml') -> str:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(options, sort_keys=False))
        return str(path)

    return write
