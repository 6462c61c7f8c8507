"""Preparing data: windows, LMDB pairs that the host reads, refusals that leave nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from basicsr_quant import compat
from basicsr_quant.data.bicubic import low_resolution
from basicsr_quant.data.sub_images import entries, starts, sub_images, write_lmdb
from basicsr_quant.errors import QuantError

lmdb = pytest.importorskip('lmdb')
pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')
TOOL = Path(__file__).parents[1] / 'tools' / 'prepare_div2k.py'


def prepare(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    environment = {**os.environ, 'PYTHONPATH': str(TOOL.parents[1])}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


def keys_of(path: Path) -> list[str]:
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as txn:
        return [key.decode() for key, _ in txn.cursor()]


def image_of(path: Path, key: str) -> np.ndarray:
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as txn:
        return cv2.imdecode(np.frombuffer(txn.get(key.encode()), np.uint8), cv2.IMREAD_UNCHANGED)


@pytest.mark.parametrize(
    'length, size, step, expected',
    [
        (480, 480, 240, [0]),
        (481, 480, 240, [0, 1]),
        (960, 480, 240, [0, 240, 480]),
        (1404, 480, 240, [0, 240, 480, 720, 924]),
        (479, 480, 240, []),
    ],
)
def test_starts(length, size, step, expected):
    assert starts(length, size, step) == expected


def test_windows_of_both_scales_match():
    hr = photograph(120, 168)
    lr = hr[1::4, 1::4]
    for big, small in zip(sub_images(hr, 48, 24), sub_images(lr, 12, 6)):
        np.testing.assert_array_equal(big[1::4, 1::4], small)
    assert len(list(sub_images(hr, 48, 24))) == 4 * 6


def test_entries_are_lossless_and_keys_have_no_dot():
    image = photograph(48, 72)
    found = entries('a.b', image, 48, 24)
    assert [(key, shape) for key, _, shape in found] == [('a_b_s001', (48, 48, 3)), ('a_b_s002', (48, 48, 3))]
    decoded = cv2.imdecode(np.frombuffer(found[1][1], np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(decoded, image[:, 24:])
    with pytest.raises(QuantError, match='a has 48x72 pixels, smaller than one sub-image of 60x60'):
        entries('a', image, 60, 30)


def test_an_interrupted_lmdb_has_no_final_name(tmp_path):
    compat.apply()

    def broken():
        yield entries('a', photograph(48, 48), 48, 24)
        raise KeyboardInterrupt

    target = tmp_path / 'set.lmdb'
    with pytest.raises(KeyboardInterrupt):
        write_lmdb(target, broken())
    assert not target.exists()
    assert write_lmdb(target, [entries('a', photograph(48, 48), 48, 24)]) == 1
    assert [p.name for p in tmp_path.iterdir()] == ['set.lmdb']


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / 'DIV2K_train_HR'
    folder.mkdir()
    for i, (height, width) in enumerate([(120, 96), (100, 133)], start=1):  # the second is no multiple of 12
        cv2.imwrite(str(folder / f'{i:04d}.png'), photograph(height, width, seed=i))
    return folder


def test_training_pairs_are_read_by_the_host(source, tmp_path):
    out = tmp_path / 'out'
    options = ('--out', out, '--crop-size', 48, '--step', 24, '--scales', 2, 4, '--jobs', 1)
    result = prepare('--source', source.parent, *options)
    assert result.returncode == 0, result.stderr
    hr, x4 = out / 'DIV2K_train_HR_sub.lmdb', out / 'DIV2K_train_LR_bicubic_X4_sub.lmdb'
    keys = keys_of(hr)
    assert len(keys) == 4 * 3 + 3 * 5
    assert keys == keys_of(x4) == keys_of(out / 'DIV2K_train_LR_bicubic_X2_sub.lmdb')
    whole = low_resolution(cv2.imread(str(source / '0001.png')), 4)
    np.testing.assert_array_equal(image_of(x4, '0001_s002'), whole[:12, 6:18])

    data = build_dataset(
        {
            'name': 'pairs',
            'type': 'PairedImageDataset',
            'dataroot_gt': str(hr),
            'dataroot_lq': str(x4),
            'io_backend': {'type': 'lmdb'},
            'gt_size': 32,
            'use_hflip': True,
            'use_rot': True,
            'scale': 4,
            'phase': 'train',
        }
    )
    assert len(data) == len(keys)
    assert data[0]['lq'].shape == (3, 8, 8) and data[0]['gt'].shape == (3, 32, 32)

    again = prepare('--source', source, *options)
    assert again.returncode == 0 and again.stdout.count('already there, kept') == 3


def build_dataset(options: dict):
    compat.apply()
    from basicsr.data import build_dataset as build

    return build(options)


def test_official_low_resolution_images_come_first(source, tmp_path):
    official = tmp_path / 'DIV2K_train_LR_bicubic' / 'X2'
    official.mkdir(parents=True)
    options = ('--source', source, '--out', tmp_path / 'out', '--crop-size', 48, '--step', 24, '--scales', 2)
    marked = np.full((60, 48, 3), 7, np.uint8)
    cv2.imwrite(str(official / '0001x2.png'), marked)
    refused = prepare(*options)
    assert refused.returncode == 2 and 'lacks 0002x2.png' in refused.stderr
    assert not (tmp_path / 'out').exists()
    cv2.imwrite(str(official / '0002x2.png'), np.full((50, 66, 3), 7, np.uint8))
    accepted = prepare(*options)
    assert accepted.returncode == 0, accepted.stderr
    assert image_of(tmp_path / 'out' / 'DIV2K_train_LR_bicubic_X2_sub.lmdb', '0001_s001').max() == 7


@pytest.mark.parametrize(
    'arguments, words',
    [
        (['--source', 'nowhere'], 'https://data.vision.ee.ethz.ch/cvl/DIV2K/'),
        (['--benchmarks', 'nowhere'], 'holds no set'),
        ([], 'give either --source'),
        (['--source', 'x', '--crop-size', '100'], '--crop-size 100'),
        (['--source', 'x', '--jobs', '0'], '--jobs must be at least 1'),
    ],
)
def test_refusals_are_one_sentence(arguments, words, tmp_path):
    result = prepare(*arguments, *([] if '--out' in arguments else ['--out', tmp_path / 'out']))
    assert result.returncode == 2 and words in result.stderr and 'Traceback' not in result.stderr
    assert not (tmp_path / 'out').exists()


def test_benchmarks_are_arranged(tmp_path):
    given = tmp_path / 'given'
    (given / 'Set5' / 'GTmod12').mkdir(parents=True)
    (given / 'Set1').mkdir()
    (given / 'Set1' / 'LR_bicubic' / 'X2').mkdir(parents=True)
    hr = photograph(48, 64)
    cv2.imwrite(str(given / 'Set5' / 'GTmod12' / 'baby.png'), hr)
    cv2.imwrite(str(given / 'Set1' / 'a.png'), hr)
    cv2.imwrite(str(given / 'Set1' / 'LR_bicubic' / 'X2' / 'ax2.png'), np.zeros((24, 32, 3), np.uint8))
    result = prepare('--benchmarks', given, '--out', tmp_path / 'datasets', '--scales', 2, 4)
    assert result.returncode == 0, result.stderr
    x4 = cv2.imread(str(tmp_path / 'datasets/Set5/LR_bicubic/X4/babyx4.png'))
    np.testing.assert_array_equal(x4, low_resolution(hr, 4))
    np.testing.assert_array_equal(cv2.imread(str(tmp_path / 'datasets/Set5/HR/baby.png')), hr)
    assert cv2.imread(str(tmp_path / 'datasets/Set1/LR_bicubic/X2/ax2.png')).max() == 0, 'given LR images are kept'
    assert sorted(p.name for p in (tmp_path / 'datasets').rglob('*.png')) == [
        'a.png', 'ax2.png', 'ax4.png', 'baby.png', 'babyx2.png', 'babyx4.png',
    ]  # fmt: skip
