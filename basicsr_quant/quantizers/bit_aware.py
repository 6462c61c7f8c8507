"""AdaBM's searches for ranges: weights by OMSE, activations by clipping to the bits that a layer has."""

from __future__ import annotations

import torch
from torch import Tensor

from .fake_quantize import fake_quantize

OMSE_CANDIDATES = 50
CLIP_CANDIDATES = 100


@torch.no_grad()
def search_omse_bound(rows: Tensor, bits: int, start: Tensor | None = None, narrow_range: bool = False) -> Tensor:
    """The bound u of each row of (C, N) weights with the least squared error among u_0 (1 - 0.01 i), i = 0 ... 49.

    Args:
        rows: Weights of a layer as one row, or of each output channel.
        bits: Bits of the symmetric grid on [-u, u].
        start: u_0 of each row; by default max |W|. The published code starts at max W, too low where the negative tail
            is the longer one.
        narrow_range: As in :func:`fake_quantize`.

    Returns:
        (C,); of equal ones the widest.
    """
    widest = rows.abs().amax(dim=1) if start is None else start
    fractions = 1 - 0.01 * torch.arange(OMSE_CANDIDATES, device=rows.device, dtype=rows.dtype)
    errors = []
    for fraction in fractions:
        upper = (widest * fraction)[:, None]
        errors.append((fake_quantize(rows, -upper, upper, bits, narrow_range=narrow_range) - rows).square().mean(dim=1))
    return widest * fractions[torch.stack(errors).argmin(dim=0)]


@torch.no_grad()
def clip_to_bits(
    x: Tensor, lower: Tensor, upper: Tensor, bits: float, zero_point: str = 'float'
) -> tuple[Tensor, Tensor]:
    """Bit-aware clipping: both bounds of one range times the factor 1 - 0.01 i, i = 0 ... 99, of the least squared
    error of ``x`` on the grid of ``bits``.

    Args:
        x: Values of any shape.
        lower, upper: The range to shrink, 0-dim.
        bits: Bits that the layer has.
        zero_point: As in :func:`fake_quantize`.
    """
    fractions = 1 - 0.01 * torch.arange(CLIP_CANDIDATES, device=x.device, dtype=lower.dtype)
    errors = [
        (fake_quantize(x, lower * f, upper * f, bits, zero_point=zero_point) - x).square().mean() for f in fractions
    ]
    best = fractions[torch.stack(errors).argmin()]
    return lower * best, upper * best
