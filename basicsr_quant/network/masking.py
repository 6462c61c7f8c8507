"""Masks on a network: layers get them after the surgery, whether they are quantized or not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import nn

from ..errors import QuantError
from ..nn import QuantLayer, WeightMask, dense_rows, twin_class
from .plan import Plan
from .sparsity_plan import SparseLayer, SparsityPlan

MaskFactory = Callable[[SparseLayer, tuple[int, ...]], WeightMask]


def apply_masks(net: nn.Module, sparsity: SparsityPlan, make_mask: MaskFactory) -> nn.Module:
    """Give the planned layers of ``net`` their masks in place; nothing is ranked yet, see :func:`start_masks`.

    Layers in floating point become :class:`QuantConv2d` and :class:`QuantLinear` without quantizers; names and values
    of their tensors stay.

    Raises:
        QuantError: if the plan names a layer that the network lacks, or one of other width.
    """
    modules = dict(net.named_modules(remove_duplicate=False))
    twins: dict[int, QuantLayer] = {}
    for planned in sparsity.layers:
        module = modules.get(planned.layer)
        kind = None if module is None else (type(module) if isinstance(module, QuantLayer) else twin_class(module))
        if module is None or kind is None:
            raise QuantError(f"the plan masks layer '{planned.layer}', which this network does not have")
        rows = dense_rows(module)
        if rows.shape[1] != planned.channels:
            raise QuantError(
                f"the plan masks layer '{planned.layer}' with {planned.channels} input channels, in this network it "
                f'has {rows.shape[1]}'
            )
        layer = module if isinstance(module, QuantLayer) else kind.from_float(module)
        layer.weight_mask = make_mask(planned, tuple(rows.shape)).to(rows.device).train(module.training)
        if layer is not module:
            twins[id(module)] = layer
    for name, module in modules.items():  # every place where a shared module stands
        if id(module) in twins:
            parent, _, child = name.rpartition('.')
            setattr(net.get_submodule(parent), child, twins[id(module)])
    return net


def masked_layers(net: nn.Module) -> dict[str, QuantLayer]:
    """The layers of ``net`` that have a mask, by name."""
    layers = {name: m for name, m in net.named_modules() if isinstance(m, QuantLayer)}
    return {name: m for name, m in layers.items() if m.weight_mask is not None}


def masks(net: nn.Module) -> dict[str, WeightMask]:
    """The masks of ``net`` by the name of their layer."""
    return {name: layer.weight_mask for name, layer in masked_layers(net).items()}  # type: ignore[misc]


def start_masks(net: nn.Module) -> None:
    """Rank every masked weight by its present magnitudes; N stays."""
    for layer in masked_layers(net).values():
        layer.weight_mask.rank(dense_rows(layer))  # type: ignore[union-attr]


def masks_in_force(net: nn.Module, plan: Plan) -> Plan:
    """``plan`` with the N that the masks of ``net`` have, where training chose them."""
    if plan.sparsity is None:
        return plan
    found = masks(net)
    layers = tuple(
        dataclasses.replace(layer, kept=int(found[layer.layer].kept)) if layer.layer in found else layer
        for layer in plan.sparsity.layers
    )
    return dataclasses.replace(plan, sparsity=dataclasses.replace(plan.sparsity, layers=layers))
