"""Reading and writing image files of any kind: names in any script, 8 and 16 bits, grey, colour and alpha."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from ..errors import QuantError

SUFFIXES = ('.png', '.jpg', '.jpeg', '.bmp', '.tif', '.tiff', '.webp')


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
    """Height and width from the file's head.

    Raises:
        QuantError: if it is no image.
    """
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception as error:
        raise QuantError(f'{path} cannot be read as an image: {_said(error)}') from None


def read_image(path: Path) -> np.ndarray:
    """Read an image as it is stored: (H, W), (H, W, 3) BGR or (H, W, 4) BGRA, uint8 or uint16.

    Raises:
        QuantError: if it is truncated, or no image.
    """
    try:
        with Image.open(path) as image:
            image.load()  # OpenCV returns what it has of a truncated file
    except Exception as error:
        raise QuantError(f'{path} cannot be read as an image: {_said(error)}') from None
    content = np.frombuffer(path.read_bytes(), np.uint8)  # cv2.imread does not take every name on every system
    found = cv2.imdecode(content, cv2.IMREAD_UNCHANGED)
    if found is None or found.dtype not in (np.uint8, np.uint16):
        kind = 'nothing' if found is None else str(found.dtype)
        raise QuantError(f'{path} cannot be read as an image of 8 or 16 bits: OpenCV gives {kind}')
    return np.asarray(found)


def encode_png(image: np.ndarray) -> bytes:
    """A PNG file, 8 or 16 bits as the array has."""
    fine, content = cv2.imencode('.png', image)
    if not fine:
        raise QuantError(f'an image of shape {image.shape} and type {image.dtype} cannot be written as PNG')
    return bytes(content.tobytes())


def through_network(
    image: np.ndarray, channels: int, scale: int, upscale: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """Up-scale an image of any kind with a network of ``channels`` (3: RGB, 1: grey).

    Grey images go through an RGB network three times over and come back as their mean; colour images go through a grey
    network channel by channel. Alpha is up-scaled bicubically.

    Args:
        image: From :func:`read_image`.
        channels: What the network takes.
        scale: Up-scaling factor.
        upscale: (H, W, channels) in RGB to (H scale, W scale, channels).
    """
    colours, alpha = (image[..., :3], image[..., 3]) if image.ndim == 3 and image.shape[2] == 4 else (image, None)
    if colours.ndim == 2 or colours.shape[2] == 1:
        grey = colours.reshape(*colours.shape[:2], 1)
        made = upscale(np.repeat(grey, channels, axis=2))
        result = np.rint(made.mean(axis=2)).astype(image.dtype)
    elif channels == 1:
        result = np.concatenate([upscale(colours[..., i : i + 1]) for i in range(3)], axis=2)
    else:
        result = upscale(np.ascontiguousarray(colours[..., ::-1]))[..., ::-1]
    if alpha is None:
        return np.ascontiguousarray(result)
    size = (result.shape[1], result.shape[0])
    return np.dstack([result, cv2.resize(alpha, size, interpolation=cv2.INTER_CUBIC)])


def passes(shape: tuple[int, ...], channels: int) -> int:
    """How many times :func:`through_network` calls the network's up-scaling for an image of this shape."""
    return 3 if channels == 1 and len(shape) == 3 and shape[2] >= 3 else 1


def _said(error: Exception) -> str:
    return ' '.join(str(error).split())[:120] or type(error).__name__
