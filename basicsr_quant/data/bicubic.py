"""Bicubic resizing exactly as MATLAB's ``imresize``, the operator behind every published super-resolution LR image."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from basicsr_quant.errors import QuantError

KERNEL_WIDTH = 4.0
"""Support of the cubic kernel in pixels of the coarser of the two grids."""


def cubic(x: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Keys' cubic convolution kernel with a = -0.5 at the distances ``x``; zero from 2 on.

    ``1.5|x|^3 - 2.5|x|^2 + 1`` up to 1, ``-0.5|x|^3 + 2.5|x|^2 - 4|x| + 2`` from 1 to 2.
    """
    d = np.abs(x)
    near = (1.5 * d - 2.5) * d**2 + 1
    far = ((-0.5 * d + 2.5) * d - 4) * d + 2
    return np.where(d <= 1, near, np.where(d <= 2, far, 0.0))


def contributions(in_size: int, out_size: int, scale: float) -> tuple[NDArray[np.float64], NDArray[np.intp]]:
    """Say which input pixels make each output pixel, and with what weight, along one dimension.

    Args:
        in_size: Number of input pixels.
        out_size: Number of output pixels.
        scale: Output pixels per input pixel. Below 1 the kernel is widened by ``1 / scale`` (antialiasing).

    Returns:
        ``weights`` and ``indices``, both of shape (out_size, taps). Rows of ``weights`` sum to 1; ``indices``
        count from 0 and are reflected at the borders with the border pixel repeated (``2 1 0 | 0 1 2``).
    """
    shrink = min(scale, 1.0)
    width = KERNEL_WIDTH / shrink
    # Pixel centres: those of output pixel i lie at (i + 1/2) / scale - 1/2 on the input grid.
    centre = (np.arange(out_size) + 0.5) / scale - 0.5
    first = np.floor(centre - width / 2).astype(np.intp)
    indices = first[:, None] + np.arange(int(np.ceil(width)) + 2)
    weights = shrink * cubic(shrink * (centre[:, None] - indices))
    weights /= weights.sum(axis=1, keepdims=True)
    used = (weights != 0).any(axis=0)
    indices = np.mod(indices, 2 * in_size)
    indices = np.where(indices < in_size, indices, 2 * in_size - 1 - indices)
    return weights[:, used], indices[:, used]


def _resize_axis(image: NDArray[np.generic], scale: float, out_size: int, axis: int) -> NDArray[np.generic]:
    weights, indices = contributions(image.shape[axis], out_size, scale)
    shape = [1] * image.ndim
    shape[axis] = -1
    out = np.zeros([out_size if a == axis else n for a, n in enumerate(image.shape)])
    for k in range(weights.shape[1]):
        out += weights[:, k].reshape(shape) * np.take(image, indices[:, k], axis=axis)
    if image.dtype == np.uint8:
        # MATLAB stores the result of each pass in the image's own type: half away from zero, saturated.
        return np.floor(np.clip(out, 0, 255) + 0.5).astype(np.uint8)
    return out.astype(image.dtype)


def imresize(image: NDArray[np.generic], scale: float | Fraction) -> NDArray[np.generic]:
    """Resize by bicubic interpolation with antialiasing, as MATLAB's ``imresize(image, scale)``.

    Rows are resized first, then columns, in float64. uint8 images are rounded and saturated after *each* of the
    two passes, as MATLAB does; this reproduces the official low-resolution images of Set5 and Set14 bit for bit,
    where rounding once at the end differs in some per cent of the pixels.

    Args:
        image: Shape (H, W) or (H, W, C); uint8 0-255, or floating point in any range (not rounded, not clipped).
        scale: Output pixels per input pixel, e.g. ``Fraction(1, 4)`` or ``0.25`` to shrink, ``2`` to enlarge.

    Returns:
        Shape (ceil(H * scale), ceil(W * scale)[, C]), of the same type.

    Raises:
        QuantError: If the type, the number of dimensions or the scale is another.
    """
    image = np.asarray(image)
    if image.dtype != np.uint8 and not np.issubdtype(image.dtype, np.floating):
        raise QuantError(f'imresize takes images of type uint8 or floating point, not {image.dtype}')
    if image.ndim not in (2, 3) or 0 in image.shape:
        raise QuantError(f'imresize takes images of shape (H, W) or (H, W, C), not {image.shape}')
    if not scale > 0:
        raise QuantError(f'imresize takes a scale above 0, not {scale}')
    # limit_denominator: 1/3 given as a float still makes exactly a third of the pixels.
    exact = Fraction(scale).limit_denominator(10000)
    for axis in (0, 1):
        out_size = -(-image.shape[axis] * exact.numerator // exact.denominator)
        image = _resize_axis(image, float(exact), out_size, axis)
    return image


def crop_to_multiple(image: NDArray[np.generic], scale: int) -> NDArray[np.generic]:
    """Cut rows at the bottom and columns at the right so that both sizes are multiples of ``scale``."""
    height, width = image.shape[:2]
    return image[: height - height % scale, : width - width % scale]


def low_resolution(image: NDArray[np.generic], scale: int) -> NDArray[np.generic]:
    """Make the low-resolution partner of a ground truth: crop to a multiple of ``scale``, shrink by ``scale``."""
    return imresize(crop_to_multiple(image, scale), Fraction(1, scale))
