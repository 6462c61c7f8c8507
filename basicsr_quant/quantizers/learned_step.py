"""A learned step: LSQ."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .quantizer import RelativeRange

_LEAST_STEP = 1e-3


class LearnedStep(RelativeRange):
    """Range [-Q_N s, Q_P s] with the step s a parameter (LSQ, Esser et al. 2020).

    Signed: Q_N = 2^(b-1), Q_P = 2^(b-1) - 1; unsigned (an input behind a ReLU): Q_N = 0, Q_P = 2^b - 1. Zero is a
    code. dq/ds = round(x/s) - x/s inside, -Q_N below, Q_P above, times g = 1 / sqrt(numel Q_P).

    Deviation: the gradient's factor g matters to a plain SGD; under Adam, which divides it out, it only weighs
    against Adam's epsilon. It is kept because the method has it. numel counts what shares a step: all values of a
    weight (or of its channel), and one sample's values of an activation.

    Args:
        bits: Bits of the grid.
        shape: () or (C, 1, 1, 1).
        signed: Whether negative values occur.
        batched: Whether dimension 0 of the input counts samples: true for activations, false for weights.
    """

    def __init__(
        self, bits: int, shape: tuple[int, ...] = (), signed: bool = True, batched: bool = False, **kwargs: object
    ) -> None:
        super().__init__(bits, shape, zero_point='integer')
        self.signed, self.batched = signed, batched
        self.negative_steps = 2 ** (bits - 1) if signed else 0
        self.positive_steps = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        self.step = nn.Parameter(torch.ones(shape))

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = max(1, x.numel() // (x.shape[0] if self.batched and x.numel() else self.step.numel()))
        step = _ScaleGradient.apply(self.step * self.unit, 1.0 / math.sqrt(values * self.positive_steps))
        return -self.negative_steps * step, self.positive_steps * step

    @torch.no_grad()
    def set_range(self, lower: Tensor, upper: Tensor) -> None:
        step = upper / self.positive_steps
        if self.signed:
            step = torch.maximum(step, -lower / self.negative_steps)
        self.set_step(step)

    @torch.no_grad()
    def set_step(self, step: Tensor) -> None:
        """Take over an initial step, in units of the quantized tensor."""
        self._set_unit(step)
        self.step.copy_(step.to(self.unit) / self.unit)

    @torch.no_grad()
    def clamp_range(self) -> None:
        self.step.clamp_(min=_LEAST_STEP)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:  # type: ignore[no-untyped-def, override]
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def, override]
        return grad * ctx.factor, None
