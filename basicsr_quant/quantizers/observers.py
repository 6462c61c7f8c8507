"""Observers: what a tensor's values look like over a calibration set, and the range that follows from it.

An observer sees batches one after another and keeps a bounded summary; its memory does not grow with their number.
Per tensor the range is two 0-dim tensors, per channel (output channels of a weight, dimension 0) two tensors of
shape (C, 1, ..., 1). Units are those of the observed tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..registry import Registry
from .fake_quantize import fake_quantize

OBSERVERS: Registry[type[Observer]] = Registry('observer')

_SAMPLES = 1 << 17
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
        self._samples: list[Tensor] = []
        self._most = self._each = samples
        self._draw = torch.Generator().manual_seed(0)

    def update(self, x: Tensor) -> None:
        rows = self._rows(x)
        size = rows.shape[1]
        if size > self._each:
            index = torch.randint(size, (self._each,), generator=self._draw)
        else:
            index = torch.randperm(size, generator=self._draw)
        self._samples.append(rows[:, index.to(rows.device)])
        while self._each > 1 and sum(s.shape[1] for s in self._samples) > self._most:
            self._each //= 2  # the order is random, so the first half of a sample is a sample
            self._samples = [s[:, : self._each].clone() for s in self._samples]

    def range(self) -> tuple[Tensor, Tensor]:
        return self.search(self.bits)[:2]

    def search(self, bits: int, every: int = 1) -> tuple[Tensor, Tensor, float]:
        """The range for another number of bits, and its mean squared error; on every ``every``-th value kept."""
        assert self._samples, 'range() before update()'
        values = torch.cat(self._samples, dim=1)[:, ::every]
        settings = {'narrow_range': self.narrow_range, 'zero_point': self.zero_point}
        lower, upper = search_mse_range(values, bits, self.symmetric, **settings)  # type: ignore[arg-type]
        rounded = fake_quantize(values, lower[:, None], upper[:, None], bits, **settings)  # type: ignore[arg-type]
        return *self._shaped(lower, upper), float((rounded - values).square().mean())


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

    def error(lower: Tensor, upper: Tensor) -> Tensor:  # of (C, K) ranges, K candidates for each row
        lower, upper = torch.minimum(lower, upper)[..., None], upper[..., None]
        values = rows[:, None].expand(-1, max(lower.shape[1], upper.shape[1]), -1)
        q = fake_quantize(values, lower, upper, bits, zero_point=zero_point, narrow_range=narrow_range)
        return (q - values).square_().mean(dim=2)

    at_once = max(1, _SEARCHED_AT_ONCE // rows.numel())
    if symmetric:
        high = torch.maximum(low.abs(), high.abs())
        upper = _search(torch.zeros_like(high), high, candidates, at_once, lambda u: error(-u, u))
        return -upper, upper
    lower, upper = low, high
    start_high = torch.where(high > 0, low.clamp(min=0), low)
    start_low = torch.where(low < 0, high.clamp(max=0), high)
    for _ in range(3):
        before = (lower, upper)
        if high.any():
            found = _search(start_high, high, candidates, at_once, partial(error, lower[:, None]))
            upper = torch.where(high == 0, high, found)
        if low.any():
            found = _search(start_low, low, candidates, at_once, partial(error, upper=upper[:, None]))
            lower = torch.where(low == 0, low, found)
        if torch.equal(before[0], lower) and torch.equal(before[1], upper):
            break
    return lower, upper


def _search(
    start: Tensor, end: Tensor, candidates: int, at_once: int, error: Callable[[Tensor], Tensor]
) -> Tensor:
    """The point between ``start`` and ``end`` with the least error, row by row; of equal ones the widest."""

    def best(fractions: Tensor) -> Tensor:
        points = start[:, None] + (end - start)[:, None] * fractions
        errors = torch.cat([error(chunk) for chunk in points.split(at_once, dim=1)], dim=1)
        return fractions.gather(1, errors.argmin(dim=1, keepdim=True))

    coarse = torch.arange(candidates, 0, -1).to(end) / candidates
    around = torch.arange(7, -8, -1).to(end) / (8 * candidates)
    fraction = best((best(coarse.expand(len(end), -1)) + around).clamp(max=1.0))
    return start + (end - start) * fraction[:, 0]
