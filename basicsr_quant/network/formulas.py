"""Multiply-accumulates of an operator, by torch's own formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils import flop_counter

# The CPU kernel of attention, which torch's own table leaves out.
_ATTENTION = tuple(
    getattr(torch.ops.aten, name)
    for name in ('_scaled_dot_product_flash_attention_for_cpu',)
    if hasattr(torch.ops.aten, name)
)


def _table() -> dict[Any, Callable[..., int]]:
    if hasattr(flop_counter, 'flop_registry'):
        return {**dict.fromkeys(_ATTENTION, flop_counter.sdpa_flop), **flop_counter.flop_registry}
    # torch 2.1: formulas of shapes, not of tensors
    published: dict[Any, Any] = vars(flop_counter)['flop_mapping']
    shapes = {**dict.fromkeys(_ATTENTION, flop_counter.sdpa_flop), **published}
    return {operator: _of_tensors(formula) for operator, formula in shapes.items()}


def _of_tensors(formula: Callable[..., int]) -> Callable[..., int]:
    def counted(*args: Any, out_val: Any, **kwargs: Any) -> int:
        args, kwargs, out = torch.utils._pytree.tree_map(flop_counter.get_shape, (args, kwargs, out_val))
        return formula(*args, **kwargs, out_shape=out)

    return counted


_FORMULAS = _table()


def formula_of(func: Any) -> Callable[..., int] | None:
    """The formula of an operator, as a ``TorchDispatchMode`` receives it; None where it multiplies nothing.

    It takes the operator's arguments and ``out_val``, its result, and gives twice the multiply-accumulates.
    """
    return _FORMULAS.get(func._overloadpacket)
