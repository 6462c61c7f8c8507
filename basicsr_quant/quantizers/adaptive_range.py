"""AdaBM's activations: a learned range, and bits that depend on the image and the layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .fake_quantize import fake_quantize
from .learned_range import LearnedRange

LEAST_BITS, MOST_BITS = 2, 8


class AdaptiveRange(LearnedRange):
    r"""Range [l, u] on a grid of b = base + b_I(image) + b_L(layer) bits.

    b_I in {-1, 0, 1} comes once a pass from the network's :class:`ImageBits`. b_L = round(clip(m, -1, 1)) of the layer
    factor m; backward tanh(m) in its place. The gradient reaches both through 2^b, see :func:`fake_quantize`.

    Deviation: b is held in 2 to 8 bits (``limited``), for a grid of zero bits is none and int8 ends at eight; the
    published code has no limit.

    State beside the range: ``layer_factor`` m (0-dim), which wants no gradient unless a method asks.

    Args:
        bits: Base bits.
        name: The layer, under which the bits (N,) of a pass stand in ``context.bits``.
        limited: Hold b in 2 to 8.
    """

    def __init__(self, bits: int, name: str = '', limited: bool = True, **kwargs: Any) -> None:
        super().__init__(bits, **kwargs)
        self.name, self.limited = name, limited
        self.layer_factor = nn.Parameter(torch.tensor(0.0), requires_grad=False)

    @property
    def layer_bits(self) -> Tensor:
        """b_L, with its gradient."""
        hard = self.layer_factor.detach().clamp(-1.0, 1.0).round()
        if not (torch.is_grad_enabled() and self.layer_factor.requires_grad):
            return hard
        soft = torch.tanh(self.layer_factor)
        return soft + (hard - soft).detach()

    def chosen_bits(self) -> Tensor:
        """b of each image of the pass, (N,), or () where there is no network around this quantizer."""
        image: Tensor | float = 0.0
        if self.context is not None and 'image_bits' in self.context.measures:
            image = self.context.read('image_bits')
        bits = self.num_bits + self.layer_bits + image
        return bits.clamp(LEAST_BITS, MOST_BITS) if self.limited else bits

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        bits = self.chosen_bits()
        if self.context is not None:
            self.context.bits[self.name] = bits.reshape(-1)
        lower, upper = self.bounds(x)
        return fake_quantize(x, lower, upper, per_sample(bits, x), zero_point=self.zero_point)

    @torch.no_grad()
    def at_bits(self, bits: int) -> LearnedRange:
        """The static quantizer that this one is where it has ``bits`` bits."""
        static = LearnedRange(bits, self.lower.shape, learn=False, zero_point=self.zero_point)
        for name in ('lower', 'upper', 'unit', 'calibrated'):
            getattr(static, name).copy_(getattr(self, name))
        return static

    def range_parameters(self) -> list[nn.Parameter]:
        return [self.lower, self.upper]


def per_sample(bits: Tensor, x: Tensor) -> Tensor:
    """Bits (N,) of N images, or () of all, in the shape that broadcasts against ``x``; dimension 0 of ``x`` holds the
    images one after another, each perhaps in several parts (windows, frames)."""
    if bits.dim() == 0:
        return bits.reshape(*[1] * x.dim())
    if x.shape[0] % len(bits):
        raise RuntimeError(f'bits of {len(bits)} images do not divide an activation of shape {tuple(x.shape)}')
    return bits.repeat_interleave(x.shape[0] // len(bits)).reshape(-1, *[1] * (x.dim() - 1))
