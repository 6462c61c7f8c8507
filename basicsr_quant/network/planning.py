"""Making the plan: scope, then name globs, first match wins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..errors import QuantError, nearest
from ..nn import twin_class
from .plan import CANNOT, FLOAT_BITS, LayerPlan, Plan
from .scope import body_layers, weight_layers
from .trace import LayerTrace

_END_BITS = 8
"""Bits of the first and last layer under ``scope: all``."""


@dataclass(frozen=True)
class LayerRule:
    """What an entry of ``quant.layers`` says: bits for weight and input, or floating point (both 32)."""

    w_bits: int | None = None
    a_bits: int | None = None


@dataclass(frozen=True)
class PlanRequest:
    """Everything that decides a plan, checked and without raw options.

    Args:
        method: Name of the method.
        w_bits, a_bits: Base bits; 32 is floating point.
        scope: ``body`` or ``all``.
        layers: Glob over layer names -> rule; first match wins over ``scope``.
        settings: Goes into :attr:`Plan.settings` as it is.
        attention: Quantize the operands of matrix products too, of the modules whose layers are quantized.
    """

    method: str
    w_bits: int
    a_bits: int
    scope: str = 'body'
    layers: Mapping[str, LayerRule] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    attention: bool = False


def make_plan(
    net: nn.Module,
    request: PlanRequest,
    rectified: frozenset[str] = frozenset(),
    unused: frozenset[str] = frozenset(),
    functional: tuple[LayerTrace, ...] = (),
) -> Plan:
    """Decide for each convolution and linear layer of ``net`` what happens to it, and why.

    Args:
        net: The FP32 network; it is not changed.
        request: Bits, scope and globs.
        rectified: Names of layers whose input follows a ReLU, from :func:`basicsr_quant.network.trace.trace`.
        unused: Names of layers whose forward a pass never calls, from the same; the network may use their weight all
            the same (ECBSR merges it), but replacing such a layer would change nothing.

        functional: Modules whose own forward multiplies matrices, from the same; looked at with ``request.attention``.

    Raises:
        QuantError: if a glob of ``layers`` matches no layer, or nothing is left to quantize.
    """
    layers = weight_layers(net)
    functional = tuple(found for found in functional if found.name) if request.attention else ()
    _refuse_idle_globs(request.layers, [*layers, *(found.name for found in functional)])
    body = body_layers(net)
    ends = {0: 'first layer', len(layers) - 1: 'last layer'}
    planned = []
    for index, (name, module) in enumerate(layers.items()):
        w_bits, a_bits, why = _decide(name, index, request, body, ends)
        if (w_bits, a_bits) != (FLOAT_BITS, FLOAT_BITS) and twin_class(module) is None:
            w_bits = a_bits = FLOAT_BITS
            why = f"{CANNOT}a {type(module).__name__} may have a forward of its own; quantized are torch's own layers"
        elif (w_bits, a_bits) != (FLOAT_BITS, FLOAT_BITS) and name in unused:
            w_bits = a_bits = FLOAT_BITS
            why = f'{CANNOT}the network never calls it, or only reads its weight'
        planned.append(
            LayerPlan(
                layer=name,
                type=type(module).__name__,
                w_bits=w_bits,
                a_bits=a_bits,
                why=why,
                rectified=name in rectified,
            )
        )
    quantized = [layer.layer for layer in planned if layer.is_quantized]
    planned += [_plan_products(found, request, quantized, functional) for found in functional]
    return Plan(method=request.method, layers=tuple(planned), settings=dict(request.settings))


def _plan_products(
    found: LayerTrace, request: PlanRequest, quantized: list[str], functional: tuple[LayerTrace, ...]
) -> LayerPlan:
    """Decide for a module that multiplies matrices: as its layers, unless a glob names it."""
    rule = next(((glob, rule) for glob, rule in request.layers.items() if fnmatchcase(found.name, glob)), None)
    bits, why = (FLOAT_BITS, FLOAT_BITS), 'attention: true, but its layers are in floating point'
    if request.method != 'none' and rule is not None:
        bits, why = _decide(found.name, -1, request, set(), {})[:2], f"layers: '{rule[0]}'"
        bits = (bits[1], bits[1]) if rule[1].w_bits is None else bits
    elif request.method != 'none' and any(name.startswith(f'{found.name}.') for name in quantized):
        bits, why = (request.a_bits, request.a_bits), 'attention: true'
    if bits != (FLOAT_BITS, FLOAT_BITS):
        if not found.operands:
            bits, why = (FLOAT_BITS,) * 2, f'{CANNOT}it does more than plain matrix products (fused attention ...)'
        elif any(other.name.startswith(f'{found.name}.') for other in functional):
            bits, why = (FLOAT_BITS,) * 2, f'{CANNOT}a module inside it multiplies matrices too'
    return LayerPlan(found.name, found.type, bits[0], bits[1], why, operands=found.operands)


def _decide(
    name: str, index: int, request: PlanRequest, body: set[str], ends: Mapping[int, str]
) -> tuple[int, int, str]:
    if request.method == 'none':
        return FLOAT_BITS, FLOAT_BITS, 'method: none'
    for glob, rule in request.layers.items():
        if fnmatchcase(name, glob):
            w_bits = request.w_bits if rule.w_bits is None else rule.w_bits
            a_bits = request.a_bits if rule.a_bits is None else rule.a_bits
            return w_bits, a_bits, f"layers: '{glob}'"
    if name in body and (request.scope == 'body' or index not in ends):
        return request.w_bits, request.a_bits, 'body'
    if request.scope == 'body':
        return FLOAT_BITS, FLOAT_BITS, 'outside the body (scope: body)'
    if index in ends:
        bits = [_END_BITS if b < FLOAT_BITS else FLOAT_BITS for b in (request.w_bits, request.a_bits)]
        return bits[0], bits[1], ends[index]
    return request.w_bits, request.a_bits, 'scope: all'


def _refuse_idle_globs(globs: Mapping[str, LayerRule], names: list[str]) -> None:
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            some = ', '.join(names if len(names) <= 5 else [*names[:4], '...', names[-1]])
            raise QuantError(
                f"quant.layers: '{glob}' matches no layer{nearest(glob, names)}; "
                f'the network has {len(names)} layers: {some}'
            )
