"""Distribution-oriented bound initialization, the first stage of 2DQuant (Liu et al., NeurIPS 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .observers import OBSERVERS, MSEObserver, range_errors

POINTS = 100
"""Candidates of the search, as in the published code."""

_TAIL = 0.1
"""A side of zero this much shorter than the other, or more, counts as none."""


@OBSERVERS.register('dobi')
class BoundSearchObserver(MSEObserver):
    """The best of the paper's 100 ranges between the extremes, see :func:`search_bounds`.

    The extremes are those of everything seen; errors are measured on the values that :class:`MSEObserver` keeps. The
    paper takes all values of one calibration batch.
    """

    def __init__(self, per_channel: bool = False, **settings: Any) -> None:
        super().__init__(per_channel, **settings)
        self._low: Tensor | None = None
        self._high: Tensor | None = None

    def update(self, x: Tensor) -> None:
        low, high = self._extremes(x)
        self._low = low if self._low is None else torch.minimum(self._low, low)
        self._high = high if self._high is None else torch.maximum(self._high, high)
        super().update(x)

    def _search(self, values: Tensor, bits: int, **settings: Any) -> tuple[Tensor, Tensor]:
        assert self._low is not None and self._high is not None
        return search_bounds(values, bits, (self._low, self._high), symmetric=self.symmetric, **settings)


def search_bounds(
    rows: Tensor,
    bits: int,
    extremes: tuple[Tensor, Tensor] | None = None,
    *,
    symmetric: bool = False,
    narrow_range: bool = False,
    zero_point: str = 'float',
    points: int = POINTS,
) -> tuple[Tensor, Tensor]:
    """The range of each row of (C, N) values with the least squared error among K candidates (DOBI).

    Between the extremes m and M of a row, i = 0 ... K - 1:

    - two-sided, for values of both signs (bell-shaped): [m + i d, M - i d], d = (M - m) / 2K;
    - one-sided, for values of one sign (softmax, ReLU): [m, M - i d], d = (M - m) / K, and its mirror image. The
      short negative tail of a GELU counts as none, up to a tenth of the other side;
    - symmetric, for weights on a grid around zero: [-u, u], u = max(-m, M) (1 - i / K).

    Of equal errors the widest range counts. Readings: the paper names the distributions, we tell them by their signs,
    and the published code runs the two-sided search everywhere; its weights are searched two-sided, too, where ours
    keep zero in the middle.

    Args:
        rows: (C, N).
        bits: Bits of the grid.
        extremes: m and M, (C,), where ``rows`` are a sample; left out, those of ``rows``.
        symmetric, narrow_range, zero_point: The grid, see :func:`fake_quantize`.
        points: K.

    Returns:
        lower, upper: two tensors of shape (C,).

    >>> search_bounds(torch.tensor([[0.0, 1.0, 2.0, 9.0]]), 2)
    (tensor([0.]), tensor([8.7300]))
    """
    low, high = rows.aminmax(dim=1) if extremes is None else extremes
    if symmetric:
        high = torch.maximum(low.abs(), high.abs())
        low = -high
    keeps_low, keeps_high = low >= -_TAIL * high, high <= -_TAIL * low
    if symmetric:
        keeps_low = keeps_high = torch.zeros_like(keeps_low)
    both = ~(keeps_low | keeps_high)
    way = (high - low) * torch.where(both, 0.5, 1.0)
    fractions = torch.arange(points).to(rows) / points
    lower = low[:, None] + torch.where(keeps_low, 0.0, way)[:, None] * fractions
    upper = high[:, None] - torch.where(keeps_high & ~keeps_low, 0.0, way)[:, None] * fractions
    errors = range_errors(rows, lower, upper, bits, narrow_range, zero_point)
    best = errors.argmin(dim=1, keepdim=True)
    return lower.gather(1, best)[:, 0], upper.gather(1, best)[:, 0]
