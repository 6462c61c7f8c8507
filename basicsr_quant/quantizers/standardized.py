"""Quantization in units of a tensor's own standard deviation: the mathematics of DAQ (WACV 2022), without state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fake_quantize import Bits


def channel_statistics(x: Tensor, rectified: bool = False) -> tuple[Tensor | None, Tensor]:
    """Mean and standard deviation of each channel of each sample.

    Signed inputs: mean and unbiased deviation over all pixels (a single pixel has deviation 0). Rectified inputs: no
    mean, and the deviation of the positive entries with one zero added to them, as the published code computes it:
    var = S2 / (k + 1) - (S1 / (k + 1))^2 with k positive entries, sum S1, sum of squares S2. A channel without positive
    entries has deviation 0.

    Args:
        x: (N, C, H, W), or another number of dimensions; half precision is measured in float32.
        rectified: ``x`` follows a ReLU; read from the network's structure, never from values.

    Returns:
        mean (None if rectified) and deviation, both (N, C, 1, ..., 1), constants to autograd.
    """
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    spatial = tuple(range(2, x.dim()))
    count = x[0, 0].numel()
    if not rectified:
        mean = x.mean(spatial, keepdim=True)
        # Norms, because torch.var takes 50 times as long on the CPU.
        norm = torch.linalg.vector_norm(x - mean, dim=spatial, keepdim=True)
        return mean, norm / max(count - 1, 1) ** 0.5
    positive = torch.linalg.vector_norm(x, 0, dim=spatial, keepdim=True) + 1
    first = x.sum(spatial, keepdim=True) / positive
    second = torch.linalg.vector_norm(x, dim=spatial, keepdim=True).square() / positive
    return None, (second - first.square()).clamp(min=0.0).sqrt()


def quantize_statistics(values: Tensor, steps: float, bits: int, published: bool = False) -> Tensor:
    """Quantize the C statistics of each sample, standardized over the channels ("quantization of quantization").

    With m and s the mean and unbiased deviation of the C values: q = m + Q(values - m), Q the mid-rise grid of 2^bits
    levels with step ``steps`` s. A deviation may come out at zero or below on that grid, so results are held at the
    least of the given values.

    Args:
        values: (N, C, 1, 1).
        steps: Step of the grid in units of s.
        bits: Bits of a statistic.
        published: Leave out the hold, as the published code.
    """
    channels = values.shape[1]
    variance, mean = torch.var_mean(values, 1, correction=0, keepdim=True)
    deviation = (variance * (channels / max(channels - 1, 1))).sqrt()
    q = quantize_standardized(values, mean, steps * deviation, bits)
    return q if published else torch.maximum(q, values.amin(dim=1, keepdim=True))


def quantize_standardized(x: Tensor, mean: Tensor | None, step: Tensor, bits: Bits, clamp: bool = True) -> Tensor:
    """Round ``x`` to a grid around its mean, or to multiples of the step from zero on.

    Mid-rise, with a mean: q = (clip(round((x - mean) / step + 1/2), 1 - L, L) - 1/2) step + mean, L = 2^(b-1): the
    2^b levels of :func:`fake_quantize` between mean -+ (L - 1/2) step. Anchored, without a mean (rectified inputs):
    q = clip(round(x / step), 0, 2^b - 1) step. The gradient is the identity everywhere, clipped values included, and
    none flows to mean and step (the published form).

    Args:
        x: Any shape; half precision is computed in float32 and returned as given.
        mean: Broadcasts against ``x``; None for the anchored grid.
        step: Broadcasts against ``x``. A step of zero (constant channel) gives the mean.
        bits: A number, or a tensor that broadcasts.
        clamp: False leaves the anchored grid open above, so that more than 2^b codes may occur: the published code.
    """
    return _Standardized.apply(x, mean, step, bits, clamp)  # type: ignore[no-any-return]


class _Standardized(torch.autograd.Function):
    """Four passes over ``x``; nothing is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor | None, step: Tensor, bits: Bits, clamp: bool) -> Tensor:
        dtype = x.dtype
        x = x.to(torch.promote_types(dtype, torch.float32))
        tiny = torch.finfo(x.dtype).tiny
        step = torch.where(step.abs() > tiny, step, tiny).to(x.dtype)
        levels: Any = torch.exp2(bits) if isinstance(bits, Tensor) else 2.0**bits
        if mean is None:
            code = torch.div(x, step).round_()
            if clamp:
                code.clamp_(0 * levels, levels - 1)
            return code.mul_(step).to(dtype)
        code = torch.div(x - mean, step).add_(0.5).round_().clamp_(1 - levels / 2, levels / 2)
        return torch.addcmul(mean - 0.5 * step, code, step).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return grad, None, None, None, None


def allocate_bits(deviation: Tensor, bits: int, least: int = 1, most: int = 8) -> Tensor:
    """Bits of each channel from its relative sensitivity, log2 sigma; their mean over the channels is at most ``bits``.

    The error of a channel is a share of sigma^2 that falls by 4 with each bit, so equal errors ask for
    b_c = b + log2 sigma_c - mean(log2 sigma), rounded down after a common shift that spends what rounding and the
    limits leave, as far as the mean allows.

    Args:
        deviation: (N, C, 1, 1).
        bits: The mean.
        least, most: Limits of a channel.

    Returns:
        Whole numbers as floating point, (N, C, 1, 1).
    """
    tiny = torch.finfo(deviation.dtype).tiny
    exact = deviation.clamp(min=tiny).log2().clamp(min=-60.0)
    exact = exact - exact.mean(dim=1, keepdim=True) + bits
    low = torch.full_like(exact[:, :1], -128.0)
    high = torch.full_like(low, 128.0)
    for _ in range(24):  # bisection for the largest shift within the mean; C numbers a sample, no pass over the image
        middle = (low + high) / 2
        fits = (exact + middle).floor().clamp(least, most).mean(dim=1, keepdim=True) <= bits
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle)
    return (exact + low).floor().clamp(least, most)
