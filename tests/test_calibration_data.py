"""Calibration images: which, how many, cropped how; and that nothing random moves."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from basicsr_quant import compat
from basicsr_quant.config import CalibrationConfig
from basicsr_quant.errors import QuantError

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')


@pytest.fixture(autouse=True)
def host() -> None:
    compat.apply()


@pytest.mark.parametrize(('shape', 'size', 'expected'), [
    ((50, 70), 0, (48, 64)),  # whole images, but whole windows of 8
    ((50, 70), 32, (32, 32)),
    ((20, 70), 32, (16, 32)),
    ((5, 7), 32, (5, 7)),  # smaller than a window: as it is
    ((96, 96), 96, (96, 96)),
])  # fmt: skip
def test_centre_crop(shape: tuple[int, int], size: int, expected: tuple[int, int]) -> None:
    from basicsr_quant.data.calibration import centre_crop

    image = torch.arange(shape[0] * shape[1], dtype=torch.float32).reshape(1, 1, *shape)
    crop = centre_crop(image, size)
    assert crop.shape[-2:] == expected and crop.is_contiguous()
    top, left = divmod(int(crop[0, 0, 0, 0]), shape[1])
    assert (top, left) == ((shape[0] - expected[0]) // 2, (shape[1] - expected[1]) // 2)


@pytest.mark.parametrize(('asked', 'there', 'taken'), [(None, 10, 10), (None, 300, 100), (7, 10, 7), (10, 10, 10)])
def test_number_of_images(asked: int | None, there: int, taken: int) -> None:
    from basicsr_quant.data.calibration import number_of_images

    assert number_of_images(CalibrationConfig(asked), there, {'dataroot_lq': 'x'}) == taken


@pytest.mark.parametrize(('asked', 'there', 'words'), [(11, 10, '11 given'), (None, 0, 'at least 1 needed')])
def test_too_few_images(asked: int | None, there: int, words: str) -> None:
    from basicsr_quant.data.calibration import number_of_images

    with pytest.raises(QuantError, match=f'{words}, but x holds {there} images'):
        number_of_images(CalibrationConfig(asked), there, {'dataroot_lq': 'x'})


@pytest.mark.parametrize('kind', ['folder', 'lmdb', 'pairs', 'training set'])
def test_images_of_any_data_set_and_random_states_untouched(kind: str, images: Path, options: dict[str, Any]) -> None:
    from basicsr_quant.data.calibration import CalibrationImages, dataset_options

    lmdb = {'dataroot_lq': str(images / 'lq.lmdb'), 'io_backend': {'type': 'lmdb'}}
    given = {
        'folder': {'dataroot_lq': str(images / 'lq')},
        'lmdb': lmdb,
        'pairs': {'dataroot_lq': str(images / 'lq'), 'dataroot_gt': str(images / 'gt')},
        'training set': None,
    }[kind]
    config = CalibrationConfig(4, 16, given)
    train = options['datasets']['train'] if given is None else None
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # type: ignore[union-attr]

    def taken() -> list[torch.Tensor]:
        return list(CalibrationImages(config, dataset_options(config, train, 2), lambda data: data['lq'], seed=0))

    first, second = taken(), taken()
    assert [tuple(image.shape) for image in first] == [(1, 3, 16, 16)] * 4
    assert all(torch.equal(a, b) for a, b in zip(first, second))
    assert states[0] == random.getstate()
    assert states[1] == np.random.get_state()[1].tolist()  # type: ignore[union-attr]
    assert torch.equal(states[2], torch.get_rng_state())


def test_no_data_set_is_one_sentence() -> None:
    from basicsr_quant.data.calibration import dataset_options

    with pytest.raises(QuantError, match=r'quant\.calibration\.dataset is missing'):
        dataset_options(CalibrationConfig(), None, 2)
