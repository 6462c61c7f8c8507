"""Moments of what layers multiply their weights with, over calibration images."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from math import ceil
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quantizers.compensated_rounding import InputMoments
from .calibration import evaluating
from .surgery import quant_layers

_LEAST_COLUMNS = 1 << 14
_COLUMNS_FOR_EACH_ROW = 16  # so many times K columns estimate a (K, K) matrix
_BYTES_AT_ONCE = 1 << 29


@torch.no_grad()
def input_moments(
    net: nn.Module, names: Sequence[str], images: Iterable[Tensor], count: int
) -> dict[str, InputMoments]:
    """Collect the moments of the named quantized layers as the quantized network runs over ``images``.

    Output positions are drawn at random, so that memory depends on no image's size.

    Args:
        net: The quantized network.
        names: Layers of it; see :func:`moment_groups` for how many at once.
        images: Inputs (N, C, H, W); gone through once.
        count: How many they are.
    """
    layers = quant_layers(net)
    moments: dict[str, InputMoments] = {}
    draw = torch.Generator().manual_seed(0)
    handles = []
    for name in names:

        def hook(layer: Any, inputs: tuple[Tensor, ...], name: str = name) -> None:
            wanted = ceil(columns_wanted(layer.weight[0].numel()) / count)
            x = inputs[0].float()
            pair = columns(layer, (x, layer.input_quantizer(x)), wanted, draw)
            if name in moments:
                moments[name].add(*pair)
            else:
                moments[name] = InputMoments.of(*pair)

        handles.append(layers[name].register_forward_pre_hook(hook))
    device = next(net.parameters()).device
    try:
        with evaluating(net):
            for image in images:
                net(image.to(device))
    finally:
        for handle in handles:
            handle.remove()
    return moments


def columns_wanted(length: int) -> int:
    """How many columns of a length are drawn in all."""
    return max(_LEAST_COLUMNS, _COLUMNS_FOR_EACH_ROW * length)


def moment_groups(net: nn.Module, names: Sequence[str]) -> list[list[str]]:
    """Cut ``names`` into groups whose moments fit into half a gigabyte together; at least one layer each."""
    layers = quant_layers(net)
    groups: list[list[str]] = []
    size = 0
    for name in names:
        weight: Any = layers[name].weight
        own = 8 * weight[0].numel() ** 2 * _groups(layers[name])
        if not groups or size + own > _BYTES_AT_ONCE:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += own
    return groups


def columns(layer: Any, inputs: Sequence[Tensor], count: int, draw: torch.Generator) -> tuple[Tensor, ...]:
    """Of each of ``inputs``, the (G, K, P) columns that ``layer`` multiplies its weight with at the same P outputs.

    Args:
        layer: A Conv2d or Linear.
        inputs: Inputs of it, of one shape: (N, C, H, W), or (..., C).
        count: P; positions are drawn with replacement.
        draw: Draws them.
    """
    if isinstance(layer, nn.Linear):
        flat = [x.reshape(-1, x.shape[-1]) for x in inputs]
        index = torch.randint(len(flat[0]), (count,), generator=draw).to(flat[0].device)
        return tuple(x[index].mT[None] for x in flat)
    mode = 'constant' if layer.padding_mode == 'zeros' else layer.padding_mode
    padded = [F.pad(x, layer._reversed_padding_repeated_twice, mode=mode) for x in inputs]
    n, channels, *size = padded[0].shape
    device = padded[0].device
    image = torch.randint(n, (count,), generator=draw).to(device)
    taps = []
    for side, kernel, stride, dilation in zip(size, layer.kernel_size, layer.stride, layer.dilation):
        outputs = (side - dilation * (kernel - 1) - 1) // stride + 1
        start = torch.randint(outputs, (count,), generator=draw).to(device) * stride
        taps.append(start[:, None] + dilation * torch.arange(kernel, device=device))  # (P, kernel)
    rows, cols = taps[0][:, :, None], taps[1][:, None]
    found = [x.permute(0, 2, 3, 1)[image[:, None, None], rows, cols] for x in padded]  # (P, kh, kw, C)
    shape = (layer.groups, channels // layer.groups * layer.kernel_size[0] * layer.kernel_size[1], count)
    return tuple(x.permute(3, 1, 2, 0).reshape(shape) for x in found)


def _groups(layer: Any) -> int:
    return int(getattr(layer, 'groups', 1))
