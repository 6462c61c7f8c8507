"""What quantizers do to the values of one pass: their ranges beside the extremes, as a table and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import log10
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from ..network.surgery import quantizers
from .tables import plain

_ROW, _NAMES, _BARS = 18, 330, 560
_INK, _VALUES, _RANGE, _LINE = (40, 40, 40), (200, 200, 200), (200, 110, 30), (150, 150, 150)  # BGR


@dataclass(frozen=True)
class RangeSeen:
    """One quantizer in one pass.

    Attributes:
        bits: Bits of its grid, a mean where it chose them.
        lower, upper: Extremes of what it put out: its range, as far as the values reached it.
        least, greatest: Extremes of its input.
        sqnr: 10 log10(sum x^2 / sum (x - q)^2) in dB; None where nothing was lost.
    """

    bits: float
    lower: float
    upper: float
    least: float
    greatest: float
    sqnr: float | None


@contextmanager
def watch_ranges(net: nn.Module) -> Iterator[dict[str, RangeSeen]]:
    """Within it the dictionary holds, by quantizer, what each saw at its last call."""
    seen: dict[str, RangeSeen] = {}

    def follow(name: str) -> Any:
        layer = name.rsplit('.', 1)[0]

        @torch.no_grad()
        def keep(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x, q = inputs[0].detach().float(), output.detach().float()
            noise, power = (float(v.square().sum(dtype=torch.float64)) for v in (x - q, x))
            takes = module.context is not None and name.endswith('.input_quantizer')
            chosen = module.context.bits.get(layer) if takes else None
            seen[name] = RangeSeen(
                bits=float(chosen.detach().float().mean()) if chosen is not None else float(module.num_bits),
                lower=float(q.min()),
                upper=float(q.max()),
                least=float(x.min()),
                greatest=float(x.max()),
                sqnr=10 * log10(power / noise) if noise and power else None,
            )

        return keep

    handles = [module.register_forward_hook(follow(name)) for name, module in quantizers(net).items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def ranges_table(seen: Mapping[str, RangeSeen]) -> str:
    """The figures as a table for the log, a row for each quantizer.

    >>> print(ranges_table({'body.0.input_quantizer': RangeSeen(4.0, -1.0, 2.0, -3.0, 2.0, 12.5)}))
    quantizer               bits  lower  upper  least  greatest  SQNR dB
    ----------------------  ----  -----  -----  -----  --------  -------
    body.0.input_quantizer     4     -1      2     -3         2     12.5
    """
    header = ['quantizer', 'bits', 'lower', 'upper', 'least', 'greatest', 'SQNR dB']
    numbers = ((name, [r.bits, r.lower, r.upper, r.least, r.greatest, r.sqnr]) for name, r in seen.items())
    return plain(header, [[name, *(n if n is None else float(f'{n:.4g}') for n in row)] for name, row in numbers])


def draw_ranges(seen: Mapping[str, RangeSeen]) -> Any:
    """A row for each quantizer: grey what the values span, colour what the quantizer keeps, a line at zero.

    Each row is drawn to its own scale, the greatest absolute value at the edge.

    Returns:
        (H, W, 3) BGR, uint8.
    """
    picture = np.full((_ROW * (len(seen) + 1), _NAMES + _BARS + 150, 3), 255, np.uint8)
    _write(picture, 0, 4, 'quantizer')
    _write(picture, 0, _NAMES + _BARS + 8, 'bits  SQNR dB')
    for row, (name, found) in enumerate(seen.items(), start=1):
        edge = max(abs(v) for v in (found.lower, found.upper, found.least, found.greatest)) or 1.0
        top, middle = row * _ROW, _NAMES + _BARS // 2

        def at(value: float, edge: float = edge, middle: int = middle) -> int:
            return middle + round(value / edge * (_BARS // 2 - 4))

        cv2.rectangle(picture, (at(found.least), top + 3), (at(found.greatest), top + _ROW - 4), _VALUES, -1)
        cv2.rectangle(picture, (at(found.lower), top + 6), (at(found.upper), top + _ROW - 7), _RANGE, -1)
        cv2.line(picture, (middle, top), (middle, top + _ROW - 1), _LINE, 1)
        _write(picture, row, 4, name.replace('_quantizer', '')[-46:])
        sqnr = '-' if found.sqnr is None else f'{found.sqnr:.1f}'
        _write(picture, row, _NAMES + _BARS + 8, f'{found.bits:.2f}  {sqnr}')
    return picture


def _write(picture: Any, row: int, left: int, text: str) -> None:
    where = (left, row * _ROW + _ROW - 5)
    cv2.putText(picture, text, where, cv2.FONT_HERSHEY_SIMPLEX, 0.4, _INK, 1, cv2.LINE_AA)
