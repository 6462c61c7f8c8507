"""One learned bound alpha on both sides: PAMS."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .quantizer import RelativeRange

_LEAST_BOUND = 1e-3


class SymmetricRange(RelativeRange):
    """Range [-alpha, alpha] with 2^b - 1 levels (zero is one of them), alpha a parameter.

    q = round(clip(x, -a, a) m / a) a / m with m = 2^(b-1) - 1; dq/da = (q - x) / a inside, sign(x) outside, which is
    the gradient of the published PAMS code (not PACT's, which is 0 inside).

    Args:
        bits: Bits of the grid.
        shape: () or (C, 1, 1, 1).
        learn: False keeps the calibrated bound fixed.
        narrow_range: False gives 2^b levels without zero (mid-rise), as ODM's weights.
        unsigned: The range [0, alpha] with 2^b levels instead, for inputs behind a ReLU.
    """

    def __init__(
        self,
        bits: int,
        shape: tuple[int, ...] = (),
        learn: bool = True,
        narrow_range: bool = True,
        unsigned: bool = False,
        **kwargs: object,
    ) -> None:
        super().__init__(bits, shape, narrow_range=narrow_range and not unsigned, **kwargs)
        self.unsigned = unsigned
        self.alpha = nn.Parameter(torch.ones(shape), requires_grad=learn)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        alpha = self.alpha * self.unit
        return (torch.zeros_like(alpha) if self.unsigned else -alpha), alpha

    @torch.no_grad()
    def set_range(self, lower: Tensor, upper: Tensor) -> None:
        alpha = torch.maximum(lower.abs(), upper.abs())
        self._set_unit(alpha)
        self.alpha.copy_(alpha.to(self.unit) / self.unit)

    @torch.no_grad()
    def clamp_range(self) -> None:
        self.alpha.clamp_(min=_LEAST_BOUND)
