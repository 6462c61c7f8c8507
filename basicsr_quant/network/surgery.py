"""Applying a plan to a network: modules are replaced, the architecture is not touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import QuantError
from ..nn import QUANTIZED_TWINS, QuantLayer
from ..quantizers import NetworkMeasure, QuantContext, Quantizer
from .plan import FLOAT_BITS, LayerPlan, Plan

QuantizerFactory = Callable[[LayerPlan, nn.Module], Quantizer]


def apply_plan(
    net: nn.Module,
    plan: Plan,
    make_input: QuantizerFactory,
    make_weight: QuantizerFactory,
    measures: Mapping[str, NetworkMeasure] | None = None,
) -> nn.Module:
    """Replace the planned layers of ``net`` in place by quantized ones and return it.

    Names and values of the FP32 tensors stay; layers in floating point stay the objects they were. The network
    becomes the owner of a :class:`QuantContext`, begun by a hook at each forward pass.

    Args:
        net: The network; still of its own class afterwards.
        plan: From :func:`make_plan` or a checkpoint.
        make_input, make_weight: Build the quantizer of a layer's input and weight.
        measures: What quantizers read of the network's input, by name; becomes ``net.quant_measures``.

    Raises:
        QuantError: if the plan names a layer that the network lacks, or one of another type.
    """
    modules = dict(net.named_modules(remove_duplicate=False))
    _check_fits(plan, modules)
    context = QuantContext()
    twins: dict[int, QuantLayer] = {}
    for layer in plan.quantized:
        module = modules[layer.layer]
        twin = QUANTIZED_TWINS[type(module)].from_float(module)
        for bits, attribute, make in (
            (layer.a_bits, 'input_quantizer', make_input),
            (layer.w_bits, 'weight_quantizer', make_weight),
        ):
            if bits < FLOAT_BITS:
                quantizer = make(layer, module)
                quantizer.context = context
                setattr(twin, attribute, quantizer.to(next(module.parameters()).device))
        twins[id(module)] = twin
    for name, module in modules.items():  # every place where a shared module stands
        if id(module) in twins:
            parent, _, child = name.rpartition('.')
            setattr(modules[parent], child, twins[id(module)])
    if measures:
        net.quant_measures = nn.ModuleDict(measures).to(next(net.parameters()).device)
    net._quant_context = context  # type: ignore[assignment]
    net.register_forward_pre_hook(begin_pass, with_kwargs=True)
    return net


def begin_pass(net: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Forward pre-hook of the root network: the pass is over its first tensor, given by position or by name."""
    context = net._quant_context
    image = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
    if image is not None and isinstance(context, QuantContext):
        context.begin(image, dict(getattr(net, 'quant_measures', {}).items()))


def quant_layers(net: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of ``net`` by name."""
    return {name: m for name, m in net.named_modules() if isinstance(m, QuantLayer)}


def quantizers(net: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of ``net`` by name, e.g. ``body.0.conv1.input_quantizer``."""
    return {name: m for name, m in net.named_modules() if isinstance(m, Quantizer)}


def quant_state(net: nn.Module) -> list[str]:
    """Names of the modules that quantization added to ``net``: quantizers, and measures of the whole network."""
    return [name for name, m in net.named_modules() if isinstance(m, (Quantizer, NetworkMeasure))]


def plan_in_force(net: nn.Module, plan: Plan) -> Plan:
    """``plan`` with the bits that the quantizers of ``net`` have, where a method chose others."""
    layers = quant_layers(net)

    def bits(layer: LayerPlan) -> LayerPlan:
        found: Any = layers.get(layer.layer)
        if found is None:
            return layer
        a_bits = getattr(found.input_quantizer, 'num_bits', layer.a_bits)
        w_bits = getattr(found.weight_quantizer, 'num_bits', layer.w_bits)
        return dataclasses.replace(layer, a_bits=a_bits, w_bits=w_bits)

    return dataclasses.replace(plan, layers=tuple(bits(layer) for layer in plan))


@contextmanager
def floating_point(net: nn.Module) -> Iterator[None]:
    """Within it the network computes what its FP32 original does."""
    found = list(quantizers(net).values())
    before = [q.enabled for q in found]
    for q in found:
        q.enabled = False
    try:
        yield
    finally:
        for q, enabled in zip(found, before):
            q.enabled = enabled


def _check_fits(plan: Plan, modules: dict[str, nn.Module]) -> None:
    for layer in plan.quantized:
        module = modules.get(layer.layer)
        if module is None:
            raise QuantError(f"the plan quantizes layer '{layer.layer}', which this network does not have")
        if not layer.layer:
            raise QuantError(f'the network is one layer, a {layer.type}, and has nothing to be replaced in')
        if type(module).__name__ != layer.type:
            raise QuantError(
                f"the plan has layer '{layer.layer}' as a {layer.type}, in this network it is a {type(module).__name__}"
            )
