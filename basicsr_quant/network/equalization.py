"""Cross-layer range equalization (Nagel, van Baalen, Blankevoort, Welling 2019, arXiv 1906.04721, section 4.1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .channels import input_channels, input_range, layout, output_channels, output_range
from .dataflow import Step
from .nonnegative import names
from .scope import WEIGHT_LAYERS
from .trace import NetworkTrace

_SCALE_FREE = names("""
    ReLU PReLU LeakyReLU Identity relu leaky_relu _prelu_kernel upsample_nearest2d _upsample_nearest_exact2d
""")
"""Modules and operators f with f(s x) = s f(x) for any s > 0 of a channel, and that keep channels where they are."""

_ROUNDS = 30
_CLOSE = 1e-3


def equalizable(net: nn.Module, traced: NetworkTrace, folded: Mapping[str, str], layers: set[str]) -> dict[str, str]:
    """Pairs of layers whose weight ranges can be equalized: name of the first -> name of the second.

    Between them stand ReLU-like functions of any slope only, each tensor on the way is read by nothing else (so never
    across a residual branch), and both layers run once in a pass.

    Args:
        net: The network in floating point.
        traced: Its trace.
        folded: BatchNorms that will be folded away, as :func:`.folding.foldable` gives them.
        layers: Only pairs of these layers (those with a quantized weight).
    """
    modules = dict(net.named_modules())
    pairs = {}
    for first in traced.layers:
        *between, last = [Step('', ''), *(step for step in first.chain if step.name not in folded)]
        if first.name not in layers or last.name not in layers or not last.sole:
            continue
        own = all('weight' in modules[name]._parameters for name in (first.name, last.name))
        if own and isinstance(modules[last.name], WEIGHT_LAYERS) and all(s.type in _SCALE_FREE for s in between[1:]):
            pairs[first.name] = last.name
    return pairs


@torch.no_grad()
def equalize(net: nn.Module, pairs: Mapping[str, str]) -> None:
    r"""Give each channel between two layers the same weight range in both, in place; the function stays.

    With r1 the range (max \|W\|) of an output channel of the first layer and r2 that of the same input channel of the
    second, s = sqrt(r1 r2) / r2: W1 / s, b1 / s, W2 s. Both ranges become sqrt(r1 r2). Chains of more than two layers
    are gone through until they settle. A channel that is zero on either side is left alone.

    The paper goes on to absorb high biases, which needs the statistics of a BatchNorm; that part is left out.

    Args:
        net: The network with its weights in place (BatchNorms folded), quantized or not.
        pairs: From :func:`equalizable`.
    """
    modules = dict(net.named_modules())
    for _ in range(_ROUNDS):
        moved = max((_equalize_pair(modules[a], modules[b]) for a, b in pairs.items()), default=0.0)
        if moved < _CLOSE:
            break


def _equalize_pair(first: nn.Module, second: nn.Module) -> float:
    """Equalize two layers and return the greatest change of a scale, as \\|log s\\|."""
    one, two = first.weight, second.weight
    assert isinstance(one, Tensor) and isinstance(two, Tensor)
    before, after = output_range(one, *layout(first)), input_range(two, *layout(second))
    scale = torch.sqrt(before.double() / after.double())
    scale = torch.where((before > 0) & (after > 0), scale, torch.ones_like(scale))
    one.div_(output_channels(scale, one, *layout(first)))
    if isinstance(first.bias, Tensor):
        first.bias.div_(scale)
    two.mul_(input_channels(scale, two, *layout(second)))
    return float(scale.log().abs().max())
