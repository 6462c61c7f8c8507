"""Applying a plan to a network: modules are replaced, the architecture is not touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..errors import QuantError
from ..nn import QuantLayer, SparsityModule, quantized_products, twin_class
from ..quantizers import NetworkMeasure, QuantContext, Quantizer
from .additions import CONTAINER, add_tensor_quantizers
from .plan import FLOAT_BITS, LayerPlan, Plan, TensorPlan

QuantizerFactory = Callable[[LayerPlan, nn.Module], Quantizer]


def apply_plan(
    net: nn.Module,
    plan: Plan,
    make_input: QuantizerFactory,
    make_weight: QuantizerFactory,
    measures: Mapping[str, NetworkMeasure] | None = None,
    make_tensor: Callable[[TensorPlan], Quantizer] | None = None,
    share_tensors: bool = True,
) -> nn.Module:
    """Replace the planned layers of ``net`` in place by quantized ones and return it.

    Names and values of the FP32 tensors stay; layers in floating point stay the objects they were. The network
    becomes the owner of a :class:`QuantContext`, begun by a hook at each forward pass.

    Args:
        net: The network; still of its own class afterwards.
        plan: From :func:`make_plan` or a checkpoint.
        make_input, make_weight: Build the quantizer of a layer's input and weight.
        measures: What quantizers read of the network's input, by name; becomes ``net.quant_measures``.
        make_tensor: Builds the quantizer of a tensor of :attr:`Plan.tensors`.
        share_tensors: Let a layer's input quantizer be its tensor's, where both have the same bits.

    Raises:
        QuantError: if the plan names a layer that the network lacks, or one of another type.
    """
    modules = dict(net.named_modules(remove_duplicate=False))
    _check_fits(plan, modules)
    context = QuantContext()
    twins: dict[int, nn.Module] = {}

    def put(layer: LayerPlan, twin: QuantLayer, attribute: str, make: QuantizerFactory, module: nn.Module) -> None:
        quantizer = make(layer, module)
        quantizer.context = context
        device = next(p.device for p in (*module.parameters(), *net.parameters()))
        setattr(twin, attribute, quantizer.to(device))

    for layer in plan.quantized:
        module = modules[layer.layer]
        if layer.operands:
            products: Any = quantized_products(module, len(layer.operands) // 2)
            for index, rectified in enumerate(layer.operands):
                side, bits = (('left', layer.a_bits), ('right', layer.w_bits))[index % 2]
                name = f'{layer.layer}.quant_products.{index // 2}.{side}'
                if bits < FLOAT_BITS:
                    part = dataclasses.replace(layer, layer=name, a_bits=bits, rectified=rectified)
                    operand = getattr(products.quant_products[index // 2], side)
                    put(part, operand, 'input_quantizer', make_input, module)
            twins[id(module)] = products
            continue
        kind = twin_class(module)
        assert kind is not None, layer.layer
        twin = kind.from_float(module)
        for bits, attribute, make in (
            (layer.a_bits, 'input_quantizer', make_input),
            (layer.w_bits, 'weight_quantizer', make_weight),
        ):
            if bits < FLOAT_BITS:
                put(layer, twin, attribute, make, module)
        twins[id(module)] = twin
    for name, module in modules.items():  # every place where a shared module stands
        if id(module) in twins:
            parent, _, child = name.rpartition('.')
            owner = twins.get(id(modules[parent]), modules[parent])
            setattr(owner, child, twins[id(module)])
    if measures:
        net.quant_measures = nn.ModuleDict(measures).to(next(net.parameters()).device)
    if plan.tensors and make_tensor is not None:
        add_tensor_quantizers(net, plan, make_tensor, share_tensors)
    net._quant_context = context  # type: ignore[assignment]
    net.register_forward_pre_hook(begin_pass, with_kwargs=True)
    return net


def begin_pass(net: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
    """Forward pre-hook of the root network: the pass is over its first tensor, given by position or by name."""
    context = net._quant_context
    image = next((value for value in (*inputs, *named.values()) if isinstance(value, Tensor)), None)
    if image is not None and isinstance(context, QuantContext):
        context.measures = dict(getattr(net, 'quant_measures', {}).items())
        context.begin(image)


def quant_layers(net: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers of ``net`` by name; not those that have a mask and no quantizer."""
    layers = {name: m for name, m in net.named_modules() if isinstance(m, QuantLayer)}
    return {name: m for name, m in layers.items() if m.quantizers() or m.weight_mask is None}


def quantizers(net: nn.Module) -> dict[str, Quantizer]:
    """The quantizers of ``net`` by name, e.g. ``body.0.conv1.input_quantizer``."""
    return {name: m for name, m in net.named_modules() if isinstance(m, Quantizer)}


def quant_state(net: nn.Module) -> list[str]:
    """Names of the modules added to ``net``: quantizers, measures of the whole network, masks and their progress.

    A quantizer that stands under two names, a layer's and a tensor's, has both here, as in the state dict.
    """
    every = net.named_modules(remove_duplicate=False)
    return [name for name, m in every if isinstance(m, (Quantizer, NetworkMeasure, SparsityModule))]


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


def tensor_quantizers(net: nn.Module) -> dict[str, Quantizer]:
    """Quantizers of tensors by name, without those that are a layer's input quantizer too."""
    return {name: q for name, q in quantizers(net).items() if name.startswith(f'{CONTAINER}.')}


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
