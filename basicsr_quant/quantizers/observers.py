"""Observers: what a tensor's values look like over a calibration set, and the range that follows from it.

An observer sees batches one after another and keeps a bounded summary; its memory does not grow with their number.
Per tensor the range is two 0-dim tensors, per channel (output channels of a weight, dimension 0) two tensors of
shape (C, 1, ..., 1). Units are those of the observed tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..registry import Registry
from .fake_quantize import fake_quantize

OBSERVERS: Registry[type[Observer]] = Registry('observer')

_SAMPLES_PER_BATCH = 1 << 14
_SAMPLES_IN_ALL = 1 << 17


class Observer:
    """Base class: ``update`` takes a batch, ``range`` returns (lower, upper) with lower <= upper.

    Args:
        per_channel: One range for each index of dimension 0 (weights), instead of one for the tensor.
    """

    def __init__(self, per_channel: bool = False) -> None:
        self.per_channel = per_channel

    def update(self, x: Tensor) -> None:
        raise NotImplementedError

    def range(self) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def _rows(self, x: Tensor) -> Tensor:
        """View ``x`` as (channels, values), channels = 1 per tensor; in float32 or wider."""
        x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        if self.per_channel:
            self._shape = (x.shape[0],) + (1,) * (x.dim() - 1)
            return x.reshape(x.shape[0], -1)
        self._shape = ()
        return x.reshape(1, -1)

    def _shaped(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return lower.reshape(self._shape), upper.reshape(self._shape)


@OBSERVERS.register('minmax')
class MinMaxObserver(Observer):
    """The extremes of everything seen."""

    def __init__(self, per_channel: bool = False) -> None:
        super().__init__(per_channel)
        self._lower: Tensor | None = None
        self._upper: Tensor | None = None

    def update(self, x: Tensor) -> None:
        lower, upper = self._rows(x).aminmax(dim=1)
        if self._lower is None or self._upper is None:
            self._lower, self._upper = lower, upper
        else:
            self._lower, self._upper = torch.minimum(self._lower, lower), torch.maximum(self._upper, upper)

    def range(self) -> tuple[Tensor, Tensor]:
        assert self._lower is not None and self._upper is not None, 'range() before update()'
        return self._shaped(self._lower, self._upper)


class _MeanObserver(Observer):
    """A mean over batches of each batch's range: arithmetic (decay None) or exponential."""

    def __init__(self, per_channel: bool = False, decay: float | None = None) -> None:
        super().__init__(per_channel)
        self.decay = decay
        self._bounds: Tensor | None = None
        self._count = 0

    def _batch_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def update(self, x: Tensor) -> None:
        new = torch.stack(self._batch_range(self._rows(x)))
        self._count += 1
        if self._bounds is None:
            self._bounds = new
        else:
            keep = self.decay if self.decay is not None else 1 - 1 / self._count
            self._bounds = keep * self._bounds + (1 - keep) * new

    def range(self) -> tuple[Tensor, Tensor]:
        assert self._bounds is not None, 'range() before update()'
        return self._shaped(*self._bounds)


@OBSERVERS.register('ema_minmax')
class MovingAverageMinMaxObserver(_MeanObserver):
    """Exponential moving average of each batch's extremes; the first batch sets it.

    Args:
        decay: Weight of the past, 0.9 in AdaBM's calibration.
    """

    def __init__(self, per_channel: bool = False, decay: float = 0.9) -> None:
        super().__init__(per_channel, decay)

    def _batch_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        lower, upper = rows.aminmax(dim=1)
        return lower, upper


@OBSERVERS.register('percentile')
class PercentileObserver(_MeanObserver):
    """Mean over batches of the (100 - p)-th and p-th percentile, the initialisation of ODM with p = 99.

    Computed by :func:`percentile`, on tensors of any size.
    """

    def __init__(self, per_channel: bool = False, percent: float = 99.0) -> None:
        super().__init__(per_channel)
        self.percent = percent

    def _batch_range(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return percentile(rows, 100.0 - self.percent), percentile(rows, self.percent)


@OBSERVERS.register('mse')
class MSEObserver(Observer):
    """The range whose b-bit grid reconstructs the seen values with the least squared error (OMSE).

    Keeps at most 2^17 values of a channel or tensor (an even stride through each batch) and, at the end, searches
    lower and upper in turn over fractions of the extremes, :func:`search_mse_range`.

    Args:
        bits: Bits of the grid.
        symmetric: Search one bound u and return (-u, u).
        narrow_range: As in :func:`~basicsr_quant.quantizers.fake_quantize`.
    """

    def __init__(
        self, per_channel: bool = False, bits: int = 8, symmetric: bool = False, narrow_range: bool = False
    ) -> None:
        super().__init__(per_channel)
        self.bits, self.symmetric, self.narrow_range = bits, symmetric, narrow_range
        self._samples: list[Tensor] = []

    def update(self, x: Tensor) -> None:
        rows = self._rows(x)
        self._samples.append(_strided(rows, _SAMPLES_PER_BATCH))
        if sum(s.shape[1] for s in self._samples) > _SAMPLES_IN_ALL:
            self._samples = [_strided(torch.cat(self._samples, dim=1), _SAMPLES_IN_ALL // 2)]

    def range(self) -> tuple[Tensor, Tensor]:
        assert self._samples, 'range() before update()'
        values = torch.cat(self._samples, dim=1)
        return self._shaped(*search_mse_range(values, self.bits, self.symmetric, self.narrow_range))


def percentile(rows: Tensor, percent: float) -> Tensor:
    """The ``percent``-th percentile of each row of (C, N) values, by linear interpolation; any N.

    ``torch.quantile`` refuses more than 16 million values; two order statistics by ``kthvalue`` need no such limit.

    >>> percentile(torch.arange(101.0).reshape(1, -1), 99.0)
    tensor([99.])
    """
    position = percent / 100.0 * (rows.shape[1] - 1)
    below = int(position)
    above = min(below + 1, rows.shape[1] - 1)
    low = rows.kthvalue(below + 1, dim=1).values
    if above == below or position == below:
        return low
    return low + (rows.kthvalue(above + 1, dim=1).values - low) * (position - below)


def search_mse_range(
    rows: Tensor, bits: int, symmetric: bool = False, narrow_range: bool = False, candidates: int = 80
) -> tuple[Tensor, Tensor]:
    """The range of each row of (C, N) values with the least mean squared error under ``fake_quantize``.

    Candidates are the fractions 1/candidates ... 1 of each extreme. Asymmetric ranges search the upper bound, then
    the lower, three times in turn, and stop early where nothing changes; a row that never goes below zero keeps
    its lower bound at its minimum.

    Returns:
        lower, upper: two tensors of shape (C,).
    """
    low, high = rows.aminmax(dim=1)
    if symmetric:
        high = torch.maximum(low.abs(), high.abs())
        upper = _search(rows, high, candidates, lambda u: (-u, u), bits, narrow_range)
        return -upper, upper
    lower, upper = low, high
    for _ in range(3):
        before = (lower, upper)
        upper = _search(rows, high, candidates, lambda u, v=lower: (torch.minimum(v, u), u), bits, narrow_range)
        lower = _search(rows, low, candidates, lambda v, u=upper: (torch.minimum(v, u), u), bits, narrow_range)
        if torch.equal(before[0], lower) and torch.equal(before[1], upper):
            break
    return lower, upper


def _search(rows, extreme, candidates, bounds_of, bits, narrow_range):  # type: ignore[no-untyped-def]
    best_error = torch.full_like(extreme, float('inf'))
    best = extreme.clone()
    for i in range(candidates, 0, -1):
        candidate = extreme * (i / candidates)
        lower, upper = bounds_of(candidate)
        q = fake_quantize(rows, lower[:, None], upper[:, None], bits, narrow_range=narrow_range)
        error = (q - rows).square_().mean(dim=1)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best = torch.where(better, candidate, best)
    return best


def _strided(rows: Tensor, count: int) -> Tensor:
    """At most ``count`` columns at an even, odd-numbered stride (so that image rows do not fall into step with it)."""
    if rows.shape[1] <= count:
        return rows
    stride = -(-rows.shape[1] // count) | 1
    return rows[:, ::stride].contiguous()
