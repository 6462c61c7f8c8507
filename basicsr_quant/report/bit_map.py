"""A picture of chosen bits: each patch of an image tinted and labelled by the mean bits of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

_FEW, _MANY = (255, 96, 0), (0, 32, 255)  # BGR, blue and red
_SHARE = 0.35


@dataclass(frozen=True)
class Cell:
    """A part of an image in its own pixels, [top, bottom) x [left, right), and the mean bits it was computed with."""

    top: int
    bottom: int
    left: int
    right: int
    bits: float


def cells_of(
    rows: Sequence[tuple[int, int, int]], columns: Sequence[tuple[int, int, int]], bits: Sequence[float], scale: int
) -> list[Cell]:
    """Cells of the patches of :func:`~basicsr_quant.network.patches.spans`, row by row, in pixels of the output."""
    places = [(a, b, c, d) for _, a, b in rows for _, c, d in columns]
    if len(places) != len(bits):
        raise ValueError(f'{len(bits)} passes for {len(places)} patches')
    scaled = [[side * scale for side in place] for place in places]
    return [Cell(top, bottom, left, right, value) for (top, bottom, left, right), value in zip(scaled, bits)]


def draw_bit_map(image: Any, cells: Sequence[Cell], few: float = 2.0, many: float = 8.0) -> Any:
    """Tint ``image`` from blue (``few`` bits) to red (``many``) and write the bits into each cell.

    Args:
        image: (H, W, 3) BGR or (H, W) gray, uint8.
        cells: What to tint.
        few, many: Ends of the colour scale.

    Returns:
        (H, W, 3), uint8.
    """
    picture = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR) if image.ndim == 2 else image.copy()
    for cell in cells:
        place = np.s_[cell.top : cell.bottom, cell.left : cell.right]
        t = min(max((cell.bits - few) / (many - few), 0.0), 1.0) if many > few else 0.5
        colour = (1 - t) * np.array(_FEW, np.float32) + t * np.array(_MANY, np.float32)
        tinted = (1 - _SHARE) * picture[place].astype(np.float32) + _SHARE * colour
        picture[place] = tinted.round().astype(np.uint8)
    for cell in cells:
        corner, opposite = (cell.left, cell.top), (cell.right - 1, cell.bottom - 1)
        cv2.rectangle(picture, corner, opposite, (255, 255, 255), 1)
        where = (cell.left + 4, min(cell.top + 16, cell.bottom - 2))
        for width, shade in ((3, (0, 0, 0)), (1, (255, 255, 255))):
            cv2.putText(picture, f'{cell.bits:.2f}', where, cv2.FONT_HERSHEY_SIMPLEX, 0.45, shade, width, cv2.LINE_AA)
    return picture
