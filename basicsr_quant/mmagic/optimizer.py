"""What training under MMEngine's optimizer wrappers needs: groups for ranges, factors of losses, and checks."""

from __future__ import annotations

from typing import Any

import torch
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper, OptimWrapperDict
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from ..errors import QuantError
from .generator import quantized_networks, run_of


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class QuantizedOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """MMEngine's default constructor, with the ranges of quantized networks in groups of their own.

    Ranges train at ``range_lr`` times the learning rate of the group they stood in (10 in ODM's paper), as the
    method says. ``paramwise_cfg`` works as in the default constructor; parameters with equal options share a group.
    """

    def __init__(self, optim_wrapper_cfg: dict[str, Any], paramwise_cfg: dict[str, Any] | None = None) -> None:
        # The default constructor asks for groups only where there is such a configuration.
        super().__init__(optim_wrapper_cfg, {'bypass_duplicate': True, **(paramwise_cfg or {})})

    def add_params(self, params: list[dict[str, Any]], module: nn.Module, prefix: str = '', **kwargs: Any) -> None:
        super().add_params(params, module, prefix=prefix, **kwargs)
        if prefix:  # the default constructor comes here again for each child
            return
        params[:] = _merged(params)
        for net in quantized_networks(module).values():
            run = run_of(net)
            params[:] = run.method.parameter_groups(net, params, self.base_lr)
            if run.sparsity is not None:
                params[:] = run.sparsity.parameter_groups(net, params, self.base_lr)


def _merged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    merged: list[dict[str, Any]] = []
    for group in groups:
        options = {key: value for key, value in group.items() if key != 'params'}
        same = (other for other in merged if {k: v for k, v in other.items() if k != 'params'} == options)
        found = next(same, None)
        if found is None:
            merged.append({**options, 'params': list(group['params'])})
        else:
            found['params'] += group['params']
    return merged


def wrapper_of(wrapper: Any, name: str) -> OptimWrapper:
    """The optimizer wrapper of the network ``name``: the only one, or the entry of that name."""
    if isinstance(wrapper, OptimWrapperDict):
        if name not in wrapper:
            have = ', '.join(wrapper)
            raise QuantError(f"optim_wrapper has no entry '{name}', which is the quantized network; it has: {have}")
        wrapper = wrapper[name]
    assert isinstance(wrapper, OptimWrapper)
    return wrapper


def loss_factor(wrapper: Any) -> float:
    """What ``wrapper`` multiplies the next loss by: 1 / n where n passes accumulate, the scale of a gradient scaler."""
    if wrapper is None:
        return 1.0
    scaler = getattr(wrapper, 'loss_scaler', None)
    return float(wrapper.scale_loss(torch.ones(()))) * (float(scaler.get_scale()) if scaler is not None else 1.0)


def check_groups(net: nn.Module, optimizer: Any) -> None:
    """Refuse an optimizer that mixes ranges and weights: the ranges' learning rate is not the network's."""
    groups = [{'params': group['params'], 'lr': group['lr']} for group in optimizer.param_groups]
    rate = getattr(run_of(net).method.options, 'range_lr', 1.0)
    split = run_of(net).method.parameter_groups(net, groups, 0.0)
    if rate != 1.0 and len(split) > len(groups):
        raise QuantError(
            f'the optimizer trains ranges at the learning rate of the weights, not at {rate:g} times it; set '
            "optim_wrapper['constructor'] = 'QuantizedOptimWrapperConstructor'"
        )


def check_distribution(model: nn.Module, unused: bool) -> None:
    """Refuse a distributed wrapper that would wait for gradients that the method does not give."""
    for module in model.modules() if unused else ():
        if getattr(module, 'find_unused_parameters', True) is False:
            raise QuantError(
                'the method leaves parameters without gradient; set model_wrapper_cfg = '
                "dict(type='MMSeparateDistributedDataParallel', find_unused_parameters=True)"
            )
