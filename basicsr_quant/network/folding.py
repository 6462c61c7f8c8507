"""Folding BatchNorm into the convolution before it, so that what is quantized is what runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import QuantError
from .channels import output_channels
from .trace import NetworkTrace

_NORMS: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_LAYERS: tuple[type[nn.Module], ...] = (
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip


@dataclass(frozen=True)
class Fold:
    """One BatchNorm (name ``norm``) that went into ``layer``; what folding the tensors of a file needs to know."""

    norm: str
    layer: str
    eps: float
    groups: int
    transposed: bool


def foldable(net: nn.Module, traced: NetworkTrace) -> dict[str, str]:
    """Which BatchNorm can go into which convolution: BatchNorm's name -> convolution's name.

    The BatchNorm alone must read what the convolution computes, both must run once in a pass, and it must have running
    statistics. Layers of classes derived from torch's stay as they are.

    Args:
        net: The network in floating point.
        traced: Its trace, which knows the data flow.
    """
    modules = dict(net.named_modules())
    found = {}
    for layer in traced.layers:
        step = layer.chain[0] if layer.chain else None
        if step is None or not step.sole:
            continue
        convolution, norm = modules[layer.name], modules[step.name]
        own = type(convolution) in _LAYERS and 'weight' in convolution._parameters
        if own and type(norm) in _NORMS and norm.running_mean is not None:
            found[step.name] = layer.name
    return found


@torch.no_grad()
def fold_batch_norms(net: nn.Module, folded: Mapping[str, str]) -> nn.Module:
    """Fold BatchNorms into convolutions, in place, and return ``net``.

    With s = gamma / sqrt(var + eps): W' = s W, b' = s (b - mean) + beta. Each BatchNorm becomes an ``nn.Identity``, a
    convolution without a bias gains one. In evaluation mode the network computes what it did, up to rounding.
    :func:`folds_of` knows afterwards what was folded.

    Args:
        net: A network in floating point, before quantization.
        folded: From :func:`foldable`, or from the plan of a checkpoint.

    Raises:
        QuantError: if the network lacks a layer that is named.
    """
    modules = dict(net.named_modules(remove_duplicate=False))
    folds = []
    for norm_name, layer_name in folded.items():
        norm, layer = modules.get(norm_name), modules.get(layer_name)
        if not isinstance(norm, _NORMS) or not isinstance(layer, _LAYERS):
            raise QuantError(f"the plan folds '{norm_name}' into '{layer_name}', which this network does not have so")
        fold = Fold(norm_name, layer_name, norm.eps, layer.groups, layer.transposed)  # type: ignore[arg-type]
        weight, bias = layer.weight, layer.bias
        assert isinstance(weight, nn.Parameter)
        state = {f'{layer_name}.{k}': v for k, v in layer.state_dict().items()}
        state.update({f'{norm_name}.{k}': v for k, v in norm.state_dict().items()})
        state = _fold(state, fold)
        if not isinstance(bias, nn.Parameter):
            layer.bias = bias = nn.Parameter(torch.empty_like(state[f'{layer_name}.bias']), weight.requires_grad)
        weight.copy_(state[f'{layer_name}.weight'])
        bias.copy_(state[f'{layer_name}.bias'])
        for name, module in modules.items():
            if module is norm:
                parent, _, child = name.rpartition('.')
                setattr(modules[parent], child, nn.Identity())
        folds.append(fold)
    net._folds = tuple(folds)  # type: ignore[assignment]
    return net


def folds_of(net: nn.Module) -> tuple[Fold, ...]:
    """What :func:`fold_batch_norms` did to ``net``."""
    return getattr(net, '_folds', ())


def unfolded_names(net: nn.Module) -> set[str]:
    """Names of the tensors of ``net``, and of those that its folded BatchNorms had."""
    tensors = ('weight', 'bias', 'running_mean', 'running_var', 'num_batches_tracked')
    return {*net.state_dict(), *(f'{fold.norm}.{tensor}' for fold in folds_of(net) for tensor in tensors)}


def fold_state(state: Mapping[str, Tensor], folds: tuple[Fold, ...]) -> dict[str, Tensor]:
    """The state dict of a network in floating point, folded; tensors of other layers are passed on as they are.

    A BatchNorm whose tensors are not all there is left alone, so that a strict load names what is missing.
    """
    folded = dict(state)
    for fold in folds:
        if {f'{fold.norm}.running_mean', f'{fold.norm}.running_var', f'{fold.layer}.weight'} <= folded.keys():
            folded = _fold(folded, fold)
    return folded


def _fold(state: dict[str, Tensor], fold: Fold) -> dict[str, Tensor]:
    weight, bias = state[f'{fold.layer}.weight'], state.get(f'{fold.layer}.bias')
    norm = {k: v.double() for k, v in state.items() if k.startswith(f'{fold.norm}.')}
    mean, var = norm[f'{fold.norm}.running_mean'], norm[f'{fold.norm}.running_var']
    gamma, beta = norm.get(f'{fold.norm}.weight'), norm.get(f'{fold.norm}.bias')
    scale = (var + fold.eps).rsqrt() * (1.0 if gamma is None else gamma)
    shift = -mean if bias is None else bias.double() - mean
    shift = shift * scale + (0.0 if beta is None else beta)
    scaled = weight.double() * output_channels(scale, weight, fold.groups, fold.transposed)
    kept = {k: v for k, v in state.items() if k not in norm}
    return {**kept, f'{fold.layer}.weight': scaled.to(weight.dtype), f'{fold.layer}.bias': shift.to(weight.dtype)}
