"""Observers: what a tensor's values look like over a calibration set, and the range that follows from it.

An observer sees batches one after another and keeps a bounded summary; its memory does not grow with their number.
Per tensor the range is two 0-dim tensors, per channel (output channels of a weight, dimension 0) two tensors of
shape (C, 1, ..., 1). Units are those of the observed tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..registry import Registry
from .fake_quantize import fake_quantize

OBSERVERS: Registry[type[Observer]] = Registry('observer')

_SAMPLES = 1 << 17
_LONG = 1 << 16
_SAMPLED = 1 << 12
_TAIL = 5.0
_SEARCHED_AT_ONCE = 1 << 16  # values, so that they stay in the processor's cache


class Observer:
    """Base class: ``update`` takes a batch, ``range`` returns (lower, upper) with lower <= upper.

    Args:
        per_channel: One range for each index of dimension 0 (weights), instead of one for the tensor.

    Attributes:
        channel_dim: The dimension that ``per_channel`` means, 0 unless set.
    """

    channel_dim = 0

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
            shape = [1] * x.dim()
            shape[self.channel_dim] = x.shape[self.channel_dim]
            self._shape = tuple(shape)
            return x.movedim(self.channel_dim, 0).reshape(x.shape[self.channel_dim], -1)
        self._shape = ()
        return x.reshape(1, -1)

    def _extremes(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows = self._rows(x)
        if len(rows) > 1:
            return rows.aminmax(dim=1)
        lower, upper = rows.aminmax()  # 15 times as fast as along a dimension
        return lower[None], upper[None]

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
        lower, upper = self._extremes(x)
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

    def _batch_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def update(self, x: Tensor) -> None:
        new = torch.stack(self._batch_range(x))
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

    def _batch_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._extremes(x)


@OBSERVERS.register('percentile')
class PercentileObserver(_MeanObserver):
    """Mean over batches of the (100 - p)-th and p-th percentile, the initialisation of ODM with p = 99.

    Computed by :func:`percentile_range`, on tensors of any size.
    """

    def __init__(self, per_channel: bool = False, percent: float = 99.0) -> None:
        super().__init__(per_channel)
        self.percent = percent

    def _batch_range(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return percentile_range(self._rows(x), self.percent)


@OBSERVERS.register('mse')
class MSEObserver(Observer):
    """The range whose b-bit grid reconstructs the seen values with the least squared error (OMSE).

    Keeps at most ``samples`` values of a channel or tensor, the same number of each batch however many there are, drawn
    with a random state of its own. At the end it searches lower and upper in turn, :func:`search_mse_range`.

    Args:
        bits: Bits of the grid.
        symmetric: Search one bound u and return (-u, u).
        narrow_range, zero_point: As in :func:`~basicsr_quant.quantizers.fake_quantize`.
        samples: How many values are kept, 2^17 by default.
    """

    def __init__(
        self,
        per_channel: bool = False,
        bits: int = 8,
        symmetric: bool = False,
        narrow_range: bool = False,
        zero_point: str = 'float',
        samples: int = _SAMPLES,
    ) -> None:
        super().__init__(per_channel)
        self.bits, self.symmetric, self.narrow_range, self.zero_point = bits, symmetric, narrow_range, zero_point
        self._kept: Tensor | None = None  # one tensor: many small ones would keep the heap from shrinking
        self._lengths: list[int] = []
        self._most = self._each = samples
        self._draw = torch.Generator().manual_seed(0)

    def update(self, x: Tensor) -> None:
        rows = self._rows(x)
        size = rows.shape[1]
        if size > self._each:
            index = torch.randint(size, (self._each,), generator=self._draw)
        else:
            index = torch.randperm(size, generator=self._draw)
        sample = rows[:, index.to(rows.device)]
        while self._each > 1 and sum(self._lengths) + sample.shape[1] > self._most:
            self._each //= 2  # the order is random, so the first half of a sample is a sample
            self._shorten()
            sample = sample[:, : self._each]
        self._keep(sample)

    def _shorten(self) -> None:
        start = end = 0
        for index, length in enumerate(self._lengths):
            assert self._kept is not None
            kept = min(length, self._each)
            self._kept[:, end : end + kept] = self._kept[:, start : start + kept].clone()
            self._lengths[index] = kept
            start, end = start + length, end + kept

    def _keep(self, sample: Tensor) -> None:
        start, size = sum(self._lengths), sample.shape[1]
        if self._kept is None:
            self._kept = sample
        elif start + size <= self._most:  # beyond it only with more batches than values
            if self._kept.shape[1] < self._most:
                self._kept = torch.cat([self._kept, sample.new_empty(len(sample), self._most - self._kept.shape[1])], 1)
            self._kept[:, start : start + size] = sample
        else:
            return
        self._lengths.append(size)

    def range(self) -> tuple[Tensor, Tensor]:
        return self.search(self.bits)[:2]

    def search(self, bits: int, every: int = 1) -> tuple[Tensor, Tensor, float]:
        """The range for another number of bits, and its mean squared error; on every ``every``-th value kept."""
        assert self._kept is not None, 'range() before update()'
        values = self._kept[:, : sum(self._lengths) : every].contiguous()
        settings = {'narrow_range': self.narrow_range, 'zero_point': self.zero_point}
        lower, upper = self._search(values, bits, **settings)
        rounded = fake_quantize(values, lower[:, None], upper[:, None], bits, **settings)  # type: ignore[arg-type]
        return *self._shaped(lower, upper), float((rounded - values).square().mean())

    def _search(self, values: Tensor, bits: int, **settings: Any) -> tuple[Tensor, Tensor]:
        return search_mse_range(values, bits, self.symmetric, **settings)


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


def percentile_of(bits: float) -> float:
    """A percentile that suits a number of bits: the part cut off falls as the step does, from 1 % at 4 bits on.

    100 (1 - 10^(-b/2)) for b >= 4, and 99 below.

    >>> percentile_of(2), percentile_of(4), percentile_of(8)
    (99.0, 99.0, 99.99)
    """
    return 100.0 * (1.0 - 10.0 ** (-max(bits, 4) / 2))


def percentile_range(rows: Tensor, percent: float) -> tuple[Tensor, Tensor]:
    """The (100 - ``percent``)-th and the ``percent``-th percentile of each row of (C, N) values, as :func:`percentile`.

    Exact, but far quicker in long rows: thresholds from a sample of the row, a little inside of what is sought; one
    pass picks the values beyond them, and the order statistics are those of the few that were picked.
    """
    if rows.shape[1] < _LONG or not 100 - _TAIL < percent <= 100:
        return percentile(rows, 100.0 - percent), percentile(rows, percent)
    lower, upper = zip(*(_tails(row, percent) for row in rows))
    return torch.stack(lower), torch.stack(upper)


def _tails(row: Tensor, percent: float) -> tuple[Tensor, Tensor]:
    size, position = len(row), (100.0 - percent) / 100.0 * (len(row) - 1)
    needed = min(int(position) + 2, size)  # ranks from either end
    # Drawn, not every n-th: images have rows, and a step that falls in with them sees a few columns only.
    index = torch.randint(size, (_SAMPLED,), generator=torch.Generator().manual_seed(0))
    sample = _sorted(row[index.to(row.device)])
    expected = needed * len(sample) / size
    cut = int(expected + 4 * expected**0.5 + 4)  # four deviations of a binomial count
    low, high = sample[cut], sample[-1 - cut]
    picked = _sorted(_outside(row, low, high))
    count = int((picked < low).sum())
    found = []
    for tail, threshold in ((picked[:count], low), (picked[count:].flip(0), high)):
        if len(tail) < needed:  # many values equal the threshold, such as the zeros behind a ReLU; or a bad sample
            if len(tail) + _count(row, threshold) < needed:
                return percentile(row[None], 100.0 - percent)[0], percentile(row[None], percent)[0]
            tail = torch.cat([tail, threshold.expand(needed - len(tail))])
        below, above = tail[int(position)], tail[needed - 1]
        found.append(below + (above - below) * (position - int(position)))
    return found[0], found[1]


# NumPy compares, counts, selects and sorts several times as fast as torch does on a CPU.


def _sorted(values: Tensor) -> Tensor:
    if values.device.type != 'cpu':
        return values.sort().values
    return torch.from_numpy(np.sort(values.numpy()))


def _count(row: Tensor, value: Tensor) -> int:
    if row.device.type != 'cpu':
        return int((row == value).sum())
    return int(np.count_nonzero(row.numpy() == value.item()))


def _outside(row: Tensor, low: Tensor, high: Tensor) -> Tensor:
    if row.device.type != 'cpu':
        return row[(row < low) | (row > high)]
    values = row.numpy()
    return torch.from_numpy(values[(values < low.item()) | (values > high.item())])


def search_mse_range(
    rows: Tensor,
    bits: int,
    symmetric: bool = False,
    narrow_range: bool = False,
    zero_point: str = 'float',
    candidates: int = 80,
) -> tuple[Tensor, Tensor]:
    """The range of each row of (C, N) values with the least mean squared error under ``fake_quantize``.

    Candidates lie at the fractions 1/candidates ... 1 of the way from zero to the extreme (from one extreme to the
    other in a row that stays on one side of zero), then at eighths of that step around the best one. Asymmetric ranges
    search the upper bound, then the lower, three times in turn, and stop early where nothing changes. A row whose
    extreme is zero (after a ReLU) keeps that bound.

    Returns:
        lower, upper: two tensors of shape (C,).
    """
    low, high = rows.aminmax(dim=1)

    def error(lower: Tensor, upper: Tensor) -> Tensor:
        return range_errors(rows, torch.minimum(lower, upper), upper, bits, narrow_range, zero_point)

    if symmetric:
        high = torch.maximum(low.abs(), high.abs())
        upper = _search(torch.zeros_like(high), high, candidates, lambda u: error(-u, u))
        return -upper, upper
    lower, upper = low, high
    start_high = torch.where(high > 0, low.clamp(min=0), low)
    start_low = torch.where(low < 0, high.clamp(max=0), high)
    for _ in range(3):
        before = (lower, upper)
        if high.any():
            found = _search(start_high, high, candidates, partial(error, lower[:, None]))
            upper = torch.where(high == 0, high, found)
        if low.any():
            found = _search(start_low, low, candidates, partial(error, upper=upper[:, None]))
            lower = torch.where(low == 0, low, found)
        if torch.equal(before[0], lower) and torch.equal(before[1], upper):
            break
    return lower, upper


def range_errors(
    rows: Tensor, lower: Tensor, upper: Tensor, bits: int, narrow_range: bool, zero_point: str
) -> Tensor:
    """Mean squared error (C, K) of (C, N) values under K ranges for each row; bounds (C, K) or (C, 1)."""
    lower, upper = torch.broadcast_tensors(lower, upper)
    found = []
    at_once = max(1, _SEARCHED_AT_ONCE // rows.numel())
    for low, high in zip(lower.split(at_once, dim=1), upper.split(at_once, dim=1)):
        values = rows[:, None].expand(-1, low.shape[1], -1)
        q = fake_quantize(
            values, low[..., None], high[..., None], bits, zero_point=zero_point, narrow_range=narrow_range
        )
        found.append((q - values).square_().mean(dim=2))
    return torch.cat(found, dim=1)


def _search(start: Tensor, end: Tensor, candidates: int, error: Callable[[Tensor], Tensor]) -> Tensor:
    """The point between ``start`` and ``end`` with the least error, row by row; of equal ones the widest."""

    def best(fractions: Tensor) -> Tensor:
        points = start[:, None] + (end - start)[:, None] * fractions
        return fractions.gather(1, error(points).argmin(dim=1, keepdim=True))

    coarse = torch.arange(candidates, 0, -1).to(end) / candidates
    around = torch.arange(7, -8, -1).to(end) / (8 * candidates)
    fraction = best((best(coarse.expand(len(end), -1)) + around).clamp(max=1.0))
    return start + (end - start) * fraction[:, 0]
