"""Asymmetric bounds, learned or fixed: ODM's activations, and the calibrated baselines."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .quantizer import RelativeRange

_LEAST_WIDTH = 1e-3
"""No learned range becomes narrower than this share of its calibrated width."""


class LearnedRange(RelativeRange):
    """Range [l, u] with l and u parameters, as the activation ranges of ODM.

    Args:
        bits: Bits of the grid.
        shape: () for one range, (C, 1, 1, 1) for one per output channel of a weight.
        learn: False keeps the calibrated range fixed (parameters without gradient).
    """

    def __init__(self, bits: int, shape: tuple[int, ...] = (), learn: bool = True, **kwargs: object) -> None:
        super().__init__(bits, shape, **kwargs)
        self.lower = nn.Parameter(torch.full(shape, -0.5), requires_grad=learn)
        self.upper = nn.Parameter(torch.full(shape, 0.5), requires_grad=learn)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.lower * self.unit, self.upper * self.unit

    @torch.no_grad()
    def set_range(self, lower: Tensor, upper: Tensor) -> None:
        self._set_unit(upper - lower)
        self.lower.copy_(lower.to(self.unit) / self.unit)
        self.upper.copy_(upper.to(self.unit) / self.unit)

    @torch.no_grad()
    def clamp_range(self) -> None:
        self.upper.copy_(torch.maximum(self.upper, self.lower + _LEAST_WIDTH))
