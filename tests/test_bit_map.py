"""Pictures of bits: where the cells lie and how they are coloured."""

from __future__ import annotations

import pytest

pytest.importorskip('cv2')

import numpy as np

from basicsr_quant.network.patches import spans
from basicsr_quant.report.bit_map import Cell, cells_of, draw_bit_map


def test_cells_cover_the_output_once_and_row_by_row():
    rows, columns = spans(30, 16, 12), spans(50, 16, 12)
    bits = [float(i) for i in range(len(rows) * len(columns))]
    cells = cells_of(rows, columns, bits, 2)
    covered = np.zeros((60, 100), int)
    for cell in cells:
        covered[cell.top : cell.bottom, cell.left : cell.right] += 1
    assert (covered == 1).all()
    assert [c.bits for c in cells] == bits and cells[1].left > cells[0].left and cells[1].top == 0
    with pytest.raises(ValueError, match='3 passes for 12 patches'):
        cells_of(rows, columns, bits[:3], 2)


@pytest.mark.parametrize('shape', [(80, 160, 3), (80, 160)])
def test_more_bits_are_redder(shape):
    image = np.full(shape, 100, np.uint8)
    picture = draw_bit_map(image, [Cell(0, 80, 0, 80, 4.0), Cell(0, 80, 80, 160, 8.0)], 4.0, 8.0)
    assert picture.shape == (80, 160, 3) and picture.dtype == np.uint8
    blue, _, red = picture[60, 40].astype(int)
    assert blue > 100 > red
    blue, _, red = picture[60, 120].astype(int)
    assert red > 100 > blue
    assert (image == 100).all()
