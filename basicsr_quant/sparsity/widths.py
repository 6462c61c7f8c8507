"""Giving the layers of a network other widths, as filter pruning leaves them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .. import random_state
from ..errors import QuantError
from ..network.trace import trace

_READERS = (nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm2d, nn.PReLU)


def widths_of(net: nn.Module) -> dict[str, int]:
    """Convolution -> number of its filters."""
    return {name: module.out_channels for name, module in net.named_modules() if isinstance(module, nn.Conv2d)}


def set_widths(net: nn.Module, widths: Mapping[str, int]) -> nn.Module:
    """Give convolutions another number of filters, in place, and return ``net``.

    Everything that reads them follows: a small image runs through the network once, and each convolution, transposed
    convolution, BatchNorm and PReLU takes as many channels as reach it. Values are those of the first channels; load a
    checkpoint after it.

    Args:
        net: An FP32 network.
        widths: Name of a ``Conv2d`` -> its filters, at least 1 and no more than it has. Convolutions that are not named
            keep theirs.

    Raises:
        QuantError: for a name that is no convolution, a number out of range, or widths that do not fit together.
    """
    have = widths_of(net)
    for name, width in widths.items():
        if name not in have:
            raise QuantError(f"widths: '{name}' is no convolution of {type(net).__name__}")
        if not isinstance(width, int) or not 1 <= width <= have[name]:
            raise QuantError(f"widths: '{name}' has {have[name]} filters; {width!r} given, 1 to {have[name]} needed")
    shape = trace(net).input_shape
    for name, width in widths.items():
        _cut_output(net.get_submodule(name), width)
    handles = [module.register_forward_pre_hook(_cut_input) for module in net.modules()
               if isinstance(module, _READERS)]  # fmt: skip
    training = net.training
    try:
        with torch.no_grad(), random_state.preserved():
            weight = next(net.parameters())
            net.eval()(torch.zeros(shape, dtype=weight.dtype, device=weight.device))
    except Exception as error:
        raise QuantError(f'widths do not fit together in {type(net).__name__}: {error}') from None
    finally:
        net.train(training)
        for handle in handles:
            handle.remove()
    return net


def _cut_output(conv: nn.Module, width: int) -> None:
    _cut(conv, ('weight', 'bias'), width)
    conv.out_channels = width  # type: ignore[assignment]


def _cut_input(module: nn.Module, args: tuple[Any, ...]) -> None:
    channels = args[0].shape[1]
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        if module.groups == 1 and channels < module.in_channels:
            _cut(module, ('weight',), channels, dim=0 if module.transposed else 1)
            module.in_channels = channels
    elif isinstance(module, nn.BatchNorm2d):
        if channels < module.num_features:
            _cut(module, ('weight', 'bias', 'running_mean', 'running_var'), channels)
            module.num_features = channels
    elif isinstance(module, nn.PReLU) and module.num_parameters > 1 and channels < module.num_parameters:
        _cut(module, ('weight',), channels)
        module.num_parameters = channels


def _cut(module: nn.Module, names: tuple[str, ...], count: int, dim: int = 0) -> None:
    for name in names:
        tensor = getattr(module, name, None)
        if tensor is None:
            continue
        cut = tensor.detach().narrow(dim, 0, count).clone()
        if isinstance(tensor, nn.Parameter):
            setattr(module, name, nn.Parameter(cut, tensor.requires_grad))
        else:
            module.register_buffer(name, cut)
