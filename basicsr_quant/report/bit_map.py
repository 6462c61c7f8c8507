"""Pictures of chosen bits: a map over each image, and a chart of layers against bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np

_FEW, _MIDDLE, _MANY = (200, 80, 20), (215, 215, 215), (30, 30, 200)  # BGR: blue, light gray, red
_SHARE = 0.55
_FONT = cv2.FONT_HERSHEY_SIMPLEX
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)
_ROW, _COLUMN, _MARGIN = 22, 64, 12  # pixels of the chart


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


def colour(bits: float, few: float, many: float) -> Any:
    """BGR, float32: blue at ``few`` bits over light gray to red at ``many``."""
    t = min(max((bits - few) / (many - few), 0.0), 1.0) if many > few else 0.5
    low, high, t = (_FEW, _MIDDLE, 2 * t) if t < 0.5 else (_MIDDLE, _MANY, 2 * t - 1)
    return (1 - t) * np.array(low, np.float32) + t * np.array(high, np.float32)


def draw_bit_map(image: Any, cells: Sequence[Cell], few: float = 2.0, many: float = 8.0) -> Any:
    """Lay a colour over the gray ``image``, from blue (``few`` bits) to red (``many``), and write the bits into each
    cell that is wide enough.

    Args:
        image: (H, W, 3) BGR or (H, W) gray, uint8.
        cells: What to colour.
        few, many: Ends of the colour scale.

    Returns:
        (H, W, 3), uint8.
    """
    gray = image if image.ndim == 2 else cv2.cvtColor(image, cv2.COLOR_BGR2GRAY)
    picture = cv2.cvtColor(gray, cv2.COLOR_GRAY2BGR)
    for cell in cells:
        place = np.s_[cell.top : cell.bottom, cell.left : cell.right]
        tinted = (1 - _SHARE) * picture[place].astype(np.float32) + _SHARE * colour(cell.bits, few, many)
        picture[place] = tinted.round().astype(np.uint8)
    size = _text_scale(picture)
    for cell in cells:
        corner, opposite = (cell.left, cell.top), (cell.right - 1, cell.bottom - 1)
        cv2.rectangle(picture, corner, opposite, _WHITE, 1)
        label = f'{cell.bits:.2f}'
        (width, height), _ = cv2.getTextSize(label, _FONT, size, 1)
        if width + 6 <= cell.right - cell.left and height + 6 <= cell.bottom - cell.top:
            _write(picture, label, (cell.left + 4, cell.top + height + 4), size)
    return picture


def with_legend(picture: Any, title: str, few: float, many: float) -> Any:
    """``picture`` with a strip below it: the title, and the colour scale with its ends and middle.

    Args:
        picture: (H, W, 3), uint8.
        title: Cut where the picture is too narrow for it.
        few, many: As for :func:`draw_bit_map`.

    Returns:
        (H + strip, W, 3), uint8.
    """
    size = _text_scale(picture)
    line = cv2.getTextSize('0', _FONT, size, 1)[0][1]
    width, pad = picture.shape[1], max(4, line // 2)
    strip = np.full((5 * pad + 3 * line, width, 3), 255, np.uint8)
    _write(strip, _fitting(title, width - 2 * pad, size), (pad, pad + line), size, outlined=False)
    top, left, right = 2 * pad + line, pad, width - pad
    for x in range(left, right):
        strip[top : top + line, x] = colour(few + (many - few) * (x - left) / max(right - left - 1, 1), few, many)
    for value, anchor in ((few, 0.0), ((few + many) / 2, 0.5), (many, 1.0)):
        label = f'{value:g} bits'
        wide = cv2.getTextSize(label, _FONT, size, 1)[0][0]
        where = round(left + anchor * (right - left - wide))
        _write(strip, label, (where, top + 2 * line + pad), size, outlined=False)
    return np.vstack([picture, strip])


def draw_layer_chart(shares: Mapping[str, Mapping[int, float]], title: str) -> Any:
    """A chart of layers (rows, in the order of the mapping) against bits (columns): which share of the patches each
    layer ran at which bits, as a shade and in per cent, and the layer's mean.

    Args:
        shares: Layer -> bits -> share, shares of a layer summing to 1.
        title: Written above.

    Returns:
        (H, W, 3), uint8.
    """
    columns = sorted({bits for found in shares.values() for bits in found})
    size = 0.45
    names = max(cv2.getTextSize(name, _FONT, size, 1)[0][0] for name in [*shares, 'layer'])
    wide = names + 3 * _MARGIN + (len(columns) + 1) * _COLUMN
    wide = max(wide, cv2.getTextSize(title, _FONT, size, 1)[0][0] + 2 * _MARGIN)
    chart = np.full(((len(shares) + 2) * _ROW + 2 * _MARGIN, wide, 3), 255, np.uint8)
    left = names + 2 * _MARGIN

    def put(text: str, row: int, x: int, shade: tuple[int, int, int] = _BLACK) -> None:
        cv2.putText(chart, text, (x, _MARGIN + row * _ROW + 15), _FONT, size, shade, 1, cv2.LINE_AA)

    put(title, 0, _MARGIN)
    put('layer', 1, _MARGIN)
    for index, bits in enumerate(columns):
        put(f'{bits} bits', 1, left + index * _COLUMN + 6)
    put('mean', 1, left + len(columns) * _COLUMN + 6)
    for row, (name, found) in enumerate(shares.items(), 2):
        put(name, row, _MARGIN)
        for index, bits in enumerate(columns):
            share = found.get(bits, 0.0)
            corner = left + index * _COLUMN, _MARGIN + row * _ROW
            level = round(255 * (1 - share))
            cv2.rectangle(chart, corner, (corner[0] + _COLUMN - 2, corner[1] + _ROW - 2), (255, level, level), -1)
            if share:
                put(f'{100 * share:.0f} %', row, corner[0] + 8, _WHITE if share > 0.5 else _BLACK)
        mean = sum(bits * share for bits, share in found.items())
        put(f'{mean:.2f}', row, left + len(columns) * _COLUMN + 8)
    return chart


def _text_scale(picture: Any) -> float:
    """Letters of a size that stays readable when the whole picture is looked at."""
    return max(0.4, min(1.2, max(picture.shape[:2]) / 1400))


def _fitting(text: str, width: int, size: float) -> str:
    while text and cv2.getTextSize(text, _FONT, size, 1)[0][0] > width:
        text = text[:-1]
    return text


def _write(picture: Any, text: str, where: tuple[int, int], size: float, outlined: bool = True) -> None:
    for width, shade in ((3, _WHITE), (1, _BLACK)) if outlined else ((1, _BLACK),):
        cv2.putText(picture, text, where, _FONT, size, shade, width, cv2.LINE_AA)
