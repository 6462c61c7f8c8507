"""Parameter groups: ranges at their own learning rate."""

from __future__ import annotations

from typing import Any

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

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
            params[:] = run_of(net).method.parameter_groups(net, params, self.base_lr)


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
