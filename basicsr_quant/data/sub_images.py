"""Cutting training images into overlapping sub-images and packing them into an LMDB, as BasicSR's recipes expect."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import cv2
from numpy.typing import NDArray

from basicsr_quant.errors import QuantError

Image = NDArray[Any]
Entry = tuple[str, bytes, tuple[int, int, int]]
"""Key, PNG file, shape (H, W, C): what BasicSR's LMDB maker stores."""

COMPRESSION = 1
"""PNG level inside the LMDB, BasicSR's default: read often, so quick rather than small."""


def starts(length: int, size: int, step: int) -> list[int]:
    """Return where windows of ``size`` begin every ``step`` pixels; a last one ends exactly at ``length``."""
    found = list(range(0, length - size + 1, step))
    if found and found[-1] + size < length:
        found.append(length - size)
    return found


def sub_images(image: Image, size: int, step: int) -> Iterator[Image]:
    """Yield the ``size`` x ``size`` windows of an (H, W[, C]) image, row by row."""
    for top in starts(image.shape[0], size, step):
        for left in starts(image.shape[1], size, step):
            yield image[top : top + size, left : left + size]


def entries(name: str, image: Image, size: int, step: int) -> list[Entry]:
    """Cut one image and encode its parts under the keys ``<name>_s001`` ..., the same for every scale.

    Raises:
        QuantError: If the image is smaller than one window.
    """
    if min(image.shape[:2]) < size:
        height, width = image.shape[:2]
        raise QuantError(f'{name} has {height}x{width} pixels, smaller than one sub-image of {size}x{size}')
    # BasicSR reads the names in meta_info.txt up to the first dot.
    stem = name.replace('.', '_')
    found = []
    for index, part in enumerate(sub_images(image, size, step), start=1):
        png = cv2.imencode('.png', part, [cv2.IMWRITE_PNG_COMPRESSION, COMPRESSION])[1].tobytes()
        height, width = part.shape[:2]
        found.append((f'{stem}_s{index:03d}', png, (height, width, part.shape[2] if part.ndim == 3 else 1)))
    return found


def write_lmdb(path: Path, groups: Iterable[list[Entry]]) -> int:
    """Write an LMDB with BasicSR's own maker, under a temporary name until it is whole.

    Args:
        path: Folder to make; its name ends in ``.lmdb``. It must not exist yet.
        groups: The entries, e.g. of one image after the other.

    Returns:
        Number of images written.
    """
    from basicsr.utils.lmdb_util import LmdbMaker

    unfinished = path.with_name(f'{path.stem}.unfinished.lmdb')
    shutil.rmtree(unfinished, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A short batch bounds the memory that uncommitted pages take. The maker's map size (1 TB) is address space only.
    maker: Any = LmdbMaker(str(unfinished), batch=200, compress_level=COMPRESSION)
    try:
        for group in groups:
            for key, png, shape in group:
                maker.put(png, key, shape)
    finally:
        maker.close()
    os.replace(unfinished, path)
    return int(maker.counter)
