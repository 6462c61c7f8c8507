"""Bicubic resizing: closed forms without data, and bit for bit the published LR images with them."""

from __future__ import annotations

import os
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from basicsr_quant.data.bicubic import contributions, crop_to_multiple, cubic, imresize, low_resolution
from basicsr_quant.errors import QuantError

SCALES = [Fraction(1, 4), Fraction(1, 3), Fraction(1, 2), 0.7, 1, 1.5, 2, 3, 4]


def test_kernel_interpolates():
    assert cubic(np.array([0.0, 1.0, -1.0, 2.0, 3.0])).tolist() == [1, 0, 0, 0, 0]
    assert cubic(np.array([0.5, -1.5])).tolist() == [0.5625, -0.0625]


@pytest.mark.parametrize('scale', SCALES)
def test_weights_sum_to_one_and_indices_lie_inside(scale):
    weights, indices = contributions(23, int(np.ceil(23 * scale)), float(scale))
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
    assert indices.min() == 0 and indices.max() == 22


def test_halving_uses_the_antialiased_kernel():
    # Half of the cubic kernel at distances 1/4, 3/4, 5/4, 7/4: by hand, not by the code under test.
    weights, indices = contributions(64, 32, 0.5)
    half = np.array([-3, -9, 29, 111, 111, 29, -9, -3]) / 256
    np.testing.assert_allclose(weights[10], half, atol=1e-12)
    assert indices[10].tolist() == list(range(17, 25))
    assert indices[0].tolist() == [2, 1, 0, 0, 1, 2, 3, 4]  # the border pixel is repeated


@pytest.mark.parametrize('scale', SCALES)
@pytest.mark.parametrize('dtype', [np.uint8, np.float32, np.float64])
@pytest.mark.parametrize('shape', [(24, 36), (25, 31, 3), (1, 7, 1)])
def test_constant_image_and_shape(scale, dtype, shape):
    out = imresize(np.full(shape, 77, dtype), scale)
    exact = Fraction(scale).limit_denominator(100)
    assert out.shape == tuple(-(-n * exact.numerator // exact.denominator) for n in shape[:2]) + shape[2:]
    assert out.dtype == dtype
    np.testing.assert_allclose(out, 77, rtol=1e-6)


@pytest.mark.parametrize('scale', [Fraction(1, 4), Fraction(1, 2), 2, 3])
def test_ramps_stay_ramps(scale):
    # A cubic kernel reproduces straight lines: pixel centres of the output lie at (i + 1/2) / scale - 1/2.
    rows, columns = np.mgrid[:48, :64].astype(float)
    out = imresize(3 * rows - 2 * columns, scale)
    rows, columns = ((np.mgrid[: out.shape[0], : out.shape[1]] + 0.5) / float(scale)) - 0.5
    inner = slice(12, -12) if scale > 1 else slice(3, -3)
    np.testing.assert_allclose(out[inner, inner], (3 * rows - 2 * columns)[inner, inner], atol=1e-9)


def test_uint8_saturates_and_rounds_after_each_pass():
    rng = np.random.default_rng(0)
    image = np.kron(rng.choice([0, 255], size=(10, 13)), np.ones((5, 5))).astype(np.uint8)  # edges overshoot
    once = np.clip(np.floor(imresize(image.astype(float), 0.5) + 0.5), 0, 255)
    twice = imresize(image, 0.5)
    difference = np.abs(twice.astype(int) - once)
    assert twice.min() == 0 and twice.max() == 255
    assert difference.max() > 0
    columns_first = imresize(np.ascontiguousarray(image.T), 0.5).T
    assert not np.array_equal(twice, columns_first), 'rows are resized before columns'


def test_channels_are_independent():
    image = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    out = imresize(image, Fraction(1, 3))
    for c in range(3):
        np.testing.assert_array_equal(out[..., c], imresize(image[..., c], Fraction(1, 3)))


@pytest.mark.parametrize(
    'image, scale, words',
    [
        (np.zeros((4, 4), np.int32), 2, 'int32'),
        (np.zeros((4, 4, 3, 1)), 2, 'shape'),
        (np.zeros((0, 4)), 2, 'shape'),
        (np.zeros((4, 4)), 0, 'scale above 0'),
    ],
)
def test_refusals(image, scale, words):
    with pytest.raises(QuantError, match=words):
        imresize(image, scale)


def test_crop_to_multiple():
    image = np.arange(7 * 9).reshape(7, 9)
    np.testing.assert_array_equal(crop_to_multiple(image, 3), image[:6])
    np.testing.assert_array_equal(crop_to_multiple(image, 4), image[:4, :8])


@pytest.mark.parametrize('scale', [2, 3, 4])
@pytest.mark.parametrize('name, count', [('Set5', 5), ('Set14', 14)])
def test_published_low_resolution_images(name, count, scale):
    if 'BASICSR_QUANT_DATA' not in os.environ:
        pytest.skip('BASICSR_QUANT_DATA is not set')
    folder = Path(os.environ['BASICSR_QUANT_DATA']) / 'benchmarks' / name
    files = sorted((folder / 'HR').glob('*.png'))
    assert len(files) == count
    for file in files:
        published = cv2.imread(str(folder / f'LR_bicubic/X{scale}/{file.stem}x{scale}.png'), cv2.IMREAD_UNCHANGED)
        ours = low_resolution(cv2.imread(str(file), cv2.IMREAD_UNCHANGED), scale)
        np.testing.assert_array_equal(ours, published, err_msg=file.name)
