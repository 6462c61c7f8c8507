"""Reading and writing image files of any kind: names in any script, 8 and 16 bits, grey, colour and alpha."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ..errors import QuantError

_ORIENTATION = 0x0112
"""EXIF tag: how the camera was held."""
_LYING = (5, 6, 7, 8)
"""Its values that exchange width and height."""
_CUBIC = 2
"""Neighbours to each side that a cubic kernel sees."""

SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')


class UnreadableImage(QuantError):
    """An image that cannot be read; others of its folder may be."""


def find_images(given: str) -> list[Path]:
    """The image files of a folder, or the file itself.

    Raises:
        QuantError: if there is none.
    """
    path = Path(given)
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise QuantError(f'-i {given} does not exist')
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
    if not found:
        raise QuantError(f'-i {given} holds no image ({" ".join(SUFFIXES)})')
    return found


def image_size(path: Path) -> tuple[int, int]:
    """Height and width as the image is to be seen, from the file's head.

    Raises:
        UnreadableImage: if it is none.
    """
    try:
        with Image.open(path) as image:
            lies = image.getexif().get(_ORIENTATION, 1) in _LYING
            return (image.width, image.height) if lies else (image.height, image.width)
    except Exception as error:
        raise UnreadableImage(f'{path} cannot be read as an image: {_said(error)}') from None


def read_image(path: Path) -> np.ndarray:
    """Read an image as it is stored, turned as its camera says: (H, W), (H, W, 3) RGB or (H, W, 4) RGBA, uint8 or
    uint16.

    Raises:
        UnreadableImage: if it is truncated, or none.
    """
    try:
        with Image.open(path) as image:
            image.load()  # OpenCV returns what it has of a truncated file
            orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception as error:
        raise UnreadableImage(f'{path} cannot be read as an image: {_said(error)}') from None
    content = np.frombuffer(path.read_bytes(), np.uint8)  # cv2.imread does not take every name on every system
    found = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype not in (np.uint8, np.uint16):
        kind = 'nothing' if found is None else str(found.dtype)
        raise UnreadableImage(f'{path} cannot be read as an image of 8 or 16 bits: OpenCV gives {kind}')
    if found.ndim == 3:
        found = cv2.cvtColor(found, cv2.COLOR_BGRA2RGBA if found.shape[2] == 4 else cv2.COLOR_BGR2RGB)
    return _upright(np.asarray(found), orientation)


def through_network(
    image: np.ndarray, channels: int, scale: int, upscale: Callable[[np.ndarray], Iterator[np.ndarray]]
) -> Iterator[np.ndarray]:
    """Up-scale an image of any kind with a network of ``channels`` (3: RGB, 1: grey).

    Grey images go through an RGB network three times over and come back as their mean; colour images go through a grey
    network channel by channel. Alpha is up-scaled bicubically.

    Args:
        image: From :func:`read_image`.
        channels: What the network takes.
        scale: Up-scaling factor.
        upscale: (H, W, channels) to its result from top to bottom, in bands (h scale, W scale, channels).

    Yields:
        Bands of the result, of the image's kind.
    """
    colours, alpha = (image[..., :3], image[..., 3]) if image.ndim == 3 and image.shape[2] == 4 else (image, None)
    bands: Iterator[np.ndarray]
    if colours.ndim == 2:
        made = upscale(np.repeat(colours[..., None], channels, axis=2))
        bands = (np.rint(band.mean(axis=2)).astype(image.dtype) for band in made)
    elif channels == 1:
        parts = zip(*(upscale(np.ascontiguousarray(colours[..., i : i + 1])) for i in range(3)))
        bands = (np.concatenate(band, axis=2) for band in parts)
    else:
        bands = upscale(np.ascontiguousarray(colours))
    top = 0
    for band in bands:
        bottom = top + len(band) // scale
        yield band if alpha is None else np.dstack([band, _bicubic(alpha, top, bottom, scale)])
        top = bottom


def passes(shape: tuple[int, ...], channels: int) -> int:
    """How many times :func:`through_network` calls the network's up-scaling for an image of this shape."""
    return 3 if channels == 1 and len(shape) == 3 else 1


def _bicubic(alpha: np.ndarray, top: int, bottom: int, scale: int) -> np.ndarray:
    """Rows ``top`` to ``bottom`` of ``alpha``, up-scaled as in the whole."""
    first, last = max(0, top - _CUBIC), min(len(alpha), bottom + _CUBIC)
    size = (alpha.shape[1] * scale, (last - first) * scale)
    made = cv2.resize(alpha[first:last], size, interpolation=cv2.INTER_CUBIC)
    return made[(top - first) * scale : (bottom - first) * scale]


def _upright(image: np.ndarray, orientation: int) -> np.ndarray:
    """Turn and mirror by the EXIF orientation, 1 to 8; any other value leaves the image as it is."""
    if orientation in (2, 4, 5, 7):
        image = image[:, ::-1]
    turns = {3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}.get(orientation, 0)
    return np.ascontiguousarray(np.rot90(image, turns))


def _said(error: Exception) -> str:
    return ' '.join(str(error).split())[:120] or type(error).__name__
