"""Weight bounds that follow the current weight: max |W| (PAMS), percentiles of W (DDTB) and of |W| (ODM)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .observers import percentile, percentile_range
from .quantizer import Quantizer, RelativeRange

_LEAST_GAMMA = 1e-3


def _rows(weight: Tensor, per_channel: bool) -> tuple[Tensor, tuple[int, ...]]:
    """W as (channels, values) and the shape of one bound per channel."""
    weight = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    if per_channel:
        return weight.reshape(weight.shape[0], -1), (weight.shape[0],) + (1,) * (weight.dim() - 1)
    return weight.reshape(1, -1), ()


def _magnitudes(weight: Tensor, per_channel: bool) -> tuple[Tensor, tuple[int, ...]]:
    """The same of |W|."""
    rows, shape = _rows(weight, per_channel)
    return rows.abs(), shape


class MaxAbsWeight(Quantizer):
    """Range [-m, m], m = max |W| of the current weight, without gradient (PAMS's weights; 2^b - 1 levels).

    Args:
        bits: Bits of the grid.
        per_channel: One bound for each output channel.
    """

    def __init__(self, bits: int, per_channel: bool = False, narrow_range: bool = True, **kwargs: object) -> None:
        super().__init__(bits, narrow_range=narrow_range, **kwargs)  # type: ignore[arg-type]
        self.per_channel = per_channel
        self.calibrated.fill_(True)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, shape = _magnitudes(x, self.per_channel)
        bound = rows.amax(dim=1).reshape(shape)
        return -bound, bound

    def set_range(self, lower: Tensor, upper: Tensor) -> None:
        """Nothing to take over: the range is a function of the weight."""


class PercentileBounds(Quantizer):
    """Range between the (100 - p)-th and the p-th percentile of the current weight, without gradient (DDTB's weights).

    2^b levels, zero is one of them: an integer zero point, as in the published code. Weights beyond the bounds get no
    gradient, as there.

    Args:
        bits: Bits of the grid.
        per_channel: One range for each output channel.
        percent: p, 99 in the published code.
    """

    def __init__(self, bits: int, per_channel: bool = False, percent: float = 99.0) -> None:
        super().__init__(bits, zero_point='integer')
        self.per_channel, self.percent = per_channel, percent
        self.calibrated.fill_(True)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        rows, shape = _rows(x, self.per_channel)
        lower, upper = percentile_range(rows, self.percent)
        return lower.reshape(shape), upper.reshape(shape)

    def set_range(self, lower: Tensor, upper: Tensor) -> None:
        """Nothing to take over: the range is a function of the weight."""


class PercentileWeight(RelativeRange):
    r"""ODM's weight-clipping correction: range [-u, u], u = gamma f(W), f(W) the p-th percentile of \|W\|.

    f follows the current weight and is a constant in the backward pass; gamma (one value a layer, or one a channel)
    is learned from the reconstruction loss: dL/dgamma = f(W) sum dL/dq dq/du. 2^b levels, zero is not one of them.

    Reading of the paper (its text is second-hand to us): f takes \|W\|, percentile 99, gamma starts at 1. gamma is
    kept above 1e-3, a guard the paper does not mention.

    Args:
        bits: Bits of the grid.
        shape: () or (C, 1, 1, 1).
        percent: Percentile of the magnitudes.
    """

    def __init__(self, bits: int, shape: tuple[int, ...] = (), percent: float = 99.0, **kwargs: object) -> None:
        super().__init__(bits, shape, **kwargs)
        self.percent = percent
        self.gamma = nn.Parameter(torch.ones(shape))

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        upper = self.gamma * self._magnitude(x)
        return -upper, upper

    def _magnitude(self, weight: Tensor) -> Tensor:
        rows, shape = _magnitudes(weight, self.gamma.dim() > 0)
        return percentile(rows, self.percent).reshape(shape)

    @torch.no_grad()
    def set_range(self, lower: Tensor, upper: Tensor) -> None:
        """Start gamma at 1 whatever the range: gamma is a correction of f(W). :meth:`fit` starts it elsewhere."""
        self.gamma.fill_(1.0)
        self.calibrated.fill_(True)

    @torch.no_grad()
    def fit(self, weight: Tensor, upper: Tensor) -> None:
        """Start gamma where gamma f(W) equals ``upper``, for an initialisation by reconstruction error."""
        magnitude = self._magnitude(weight).clamp(min=torch.finfo(torch.float32).tiny)
        self.gamma.copy_((upper.to(magnitude) / magnitude).expand_as(self.gamma))
        self.calibrated.fill_(True)

    @torch.no_grad()
    def clamp_range(self) -> None:
        self.gamma.clamp_(min=_LEAST_GAMMA)
