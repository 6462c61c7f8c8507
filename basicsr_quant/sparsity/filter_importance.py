r"""How much a filter matters: read from BatchNorm alone, from its weights, or drawn.

BatchNorm says without data what stands behind it: of a channel with shift beta and scale gamma, z ~ N(beta, gamma^2).
For an activation f(z) = max(z, 0) + a min(z, 0) (a = 0: ReLU, a slope: PReLU and LeakyReLU, a = 1: none), with
s = |gamma|, Phi and phi the standard normal distribution and density at beta / s, and m = E[max(z, 0)]:

    m           = beta Phi + s phi
    E[f(z)]     = m + a (beta - m)
    E|f(z)|     = m + |a| (m - beta)
    E[f(z)^2]   = (1 - a^2) ((beta^2 + s^2) Phi + beta s phi) + a^2 (beta^2 + s^2)

The paper (BN-based filter pruning, arXiv 2112.01155) ranks by the first moment after ReLU; slopes, no activation and
the second moment are this package's additions for super-resolution networks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

_TINY = 1e-12  # stands for a scale of zero: the formulas have that limit


def mean_activation(beta: Tensor, gamma: Tensor, slope: Tensor | float) -> Tensor:
    """E[f(z)] of each channel; all of shape (C,) or numbers."""
    rectified, _, _ = _rectified(beta, gamma)
    return rectified + (beta - rectified) * slope


def mean_magnitude(beta: Tensor, gamma: Tensor, slope: Tensor | float) -> Tensor:
    """E|f(z)| of each channel."""
    rectified, _, _ = _rectified(beta, gamma)
    steep: Tensor | float = slope.abs() if isinstance(slope, Tensor) else abs(slope)
    return rectified + (rectified - beta) * steep


def mean_square(beta: Tensor, gamma: Tensor, slope: Tensor | float) -> Tensor:
    """E[f(z)^2] of each channel."""
    _, cdf, pdf = _rectified(beta, gamma)
    whole = beta**2 + gamma**2
    positive = whole * cdf + beta * gamma.abs() * pdf
    return positive + (whole - positive) * slope**2


def _rectified(beta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scale = gamma.abs().clamp_min(_TINY)
    at = beta / scale
    cdf = torch.special.ndtr(at)
    pdf = torch.exp(-at.square() / 2) / math.sqrt(2 * math.pi)
    return beta * cdf + scale * pdf, cdf, pdf


def slope_of(activation: nn.Module | str | None) -> Tensor | float | None:
    """The slope for negative values of what follows a BatchNorm; 1 where nothing does, None where there is no formula.

    Args:
        activation: A module, the name of an operator, or None.
    """
    if isinstance(activation, nn.PReLU):
        slope: Tensor = activation.weight
        return slope.detach().double()
    if isinstance(activation, nn.LeakyReLU):
        return float(activation.negative_slope)
    if isinstance(activation, nn.ReLU) or activation == 'relu':
        return 0.0
    if activation is None or isinstance(activation, (nn.Conv2d, nn.Identity)) or activation in _LINEAR:
        return 1.0
    return None


_LINEAR = ('add', 'sub', 'mul', 'cat', 'convolution', 'pixel_shuffle')


def batch_norm_importance(norm: nn.BatchNorm2d, slope: Tensor | float, moment: int) -> Tensor:
    """Importance (C,) of the filters before ``norm``: E|f(z)|, or the root of E[f(z)^2], which has the same unit."""
    gamma, beta = _affine(norm)
    if moment == 1:
        return mean_magnitude(beta, gamma, slope)
    return mean_square(beta, gamma, slope).clamp_min(0).sqrt()


def batch_norm_constant(norm: nn.BatchNorm2d, slope: Tensor | float) -> Tensor:
    """E[f(z)] (C,): what a removed filter gave the next layer in the mean."""
    gamma, beta = _affine(norm)
    return mean_activation(beta, gamma, slope)


def _affine(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    ones = torch.ones(norm.num_features, dtype=torch.float64)
    if norm.weight is None:
        return ones, torch.zeros_like(ones)
    return norm.weight.detach().double(), norm.bias.detach().double()


def magnitude_importance(weight: Tensor) -> Tensor:
    """Mean |w| of each filter (Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017: the sum, which makes
    layers of another width incomparable; within one layer the order is the same)."""
    return weight.detach().double().abs().flatten(1).mean(dim=1)


def random_importance(count: int, generator: torch.Generator) -> Tensor:
    """A random order of ``count`` filters."""
    return torch.rand(count, generator=generator, dtype=torch.float64)


def combined(members: Sequence[Tensor]) -> Tensor:
    """Filters that go together matter as much as they do in the mean."""
    return torch.stack(list(members)).mean(dim=0)
