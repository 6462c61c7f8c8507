"""One picture that shows the same crop of every method side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from basicsr_quant.data.sub_images import Image as Pixels

CROP, ZOOM, GAP, LABEL = 80, 3, 6, 40
"""Pixels of a crop, enlargement (nearest: no method is flattered), space between crops, height of a label."""


def side_by_side(
    truth: dict[str, Pixels], rows: list[dict[str, Any]], corners: dict[str, tuple[int, int]], path: Path
) -> None:
    """Draw one line a photograph and one column a method; PSNR of the whole photograph under each name.

    Args:
        truth: Ground truth by name, BGR uint8 of shape (H, W, 3).
        rows: One dictionary a method: ``label``, ``pictures`` (as ``truth``), ``images`` (name -> ``psnr``).
        corners: Upper left corner (row, column) of the crop by name.
        path: PNG file to write.
    """
    side = CROP * ZOOM
    width, height = (len(rows) + 1) * (side + GAP) + GAP, len(corners) * (side + LABEL + GAP) + GAP
    canvas = Image.new('RGB', (width, height), 'white')
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=15)
    for line, (name, (top, left)) in enumerate(corners.items()):
        columns = [(f'{name}: original', '', truth[name])]
        columns += [(r['label'], f'{r["images"][name]["psnr"]:.2f} dB', r['pictures'][name]) for r in rows]
        y = GAP + line * (side + LABEL + GAP)
        for column, (label, figure, image) in enumerate(columns):
            x = GAP + column * (side + GAP)
            crop = Image.fromarray(image[top : top + CROP, left : left + CROP, ::-1].copy())
            canvas.paste(crop.resize((side, side), Image.Resampling.NEAREST), (x, y))
            draw.multiline_text((x, y + side + 2), f'{label}\n{figure}', fill='black', font=font, spacing=2)
    canvas.save(path)
