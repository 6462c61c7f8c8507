"""BitOPs, bits of features and bytes of weights as sums over a trace and a plan. No network is needed here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil
from typing import Any

from ..network.plan import FLOAT_BITS, LayerPlan, Plan
from ..network.sparsity_plan import SparsityPlan
from ..network.trace import LayerTrace, NetworkTrace
from .sizing import SizedTrace

FORMULA = (
    'macs = multiply-accumulates of convolutions, linear layers and matrix products for one output of {size}; '
    'bitops = sum of macs x w_bits x a_bits, floating point counted as 32 bits; '
    'weight_bytes = quantized weights at w_bits, rounded up for each tensor, all other parameters as stored, '
    'and the ranges of quantizers; '
    'fab = mean of a_bits over the activation quantizers, without first and last layers at 8 bits; '
    'fab_mac = the same, weighted by macs'
)
MASKED = (
    'masked macs, bitops = those of the weights that masks keep; masked weight bytes = these weights at w_bits '
    '(floating point as stored) and their places, in each layer log2 M bits a kept weight or 1 bit a weight, whichever '
    'is less'
)
_ENDS = ('first layer', 'last layer')
_END_BITS = 8


@dataclass(frozen=True)
class LayerCost:
    """One row: a layer, or a module that multiplies matrices of its own.

    Bits are means over images where a method chooses them for each image. ``density`` is the share of its weights that
    an N:M mask keeps, ``masked_weight_bytes`` what these take with their places; None without a mask.
    """

    layer: str
    type: str
    macs: int
    w_bits: float
    a_bits: float
    bitops: int
    weight_bytes: int
    density: float = 1.0
    masked_weight_bytes: int | None = None


@dataclass(frozen=True)
class Cost:
    """What a network costs for one output image.

    Args:
        macs: Multiply-accumulates.
        bitops: Sum of MAC x w_bits x a_bits; floating point counts 32.
        weight_bytes: Bytes of all parameters and ranges as the plan would store them.
        range_bytes: The part of ``weight_bytes`` that quantizers add. 0 if the network is not quantized yet.
        float_bitops, float_weight_bytes: The same network in floating point.
        fab, fab_mac: Mean bits of activations, over layers and weighted by MACs; None without activation quantizers.
        output_size, input_size: Width and height in pixels.
        formula: What the numbers mean, in one line.
        not_counted: Operators whose arithmetic no number here holds.
        notes: What else one must know to compare the numbers.
        layers: One row for each layer.
        bitops_with_overlap: ``bitops`` with pixels counted as often as patches hold them; None without patches.
        masked_macs, masked_bitops, masked_weight_bytes: The same, of the weights that N:M masks keep, their places
            among the bytes; None without masks. ``macs``, ``bitops`` and ``weight_bytes`` count the dense network,
            which is what an engine without N:M kernels runs.
    """

    macs: int
    bitops: int
    weight_bytes: int
    range_bytes: int
    float_bitops: int
    float_weight_bytes: int
    fab: float | None
    fab_mac: float | None
    output_size: tuple[int, int]
    input_size: tuple[int, int] | None
    formula: str
    not_counted: tuple[str, ...]
    notes: tuple[str, ...]
    layers: tuple[LayerCost, ...]
    bitops_with_overlap: int | None = None
    masked_macs: int | None = None
    masked_bitops: int | None = None
    masked_weight_bytes: int | None = None

    def to_plain(self) -> dict[str, Any]:
        """Return the ``cost`` object of ``metrics.json``: dictionaries, lists, strings and numbers only."""
        plain = asdict(self)
        for key in ('output_size', 'input_size', 'not_counted', 'notes', 'layers'):
            plain[key] = None if plain[key] is None else list(plain[key])
        return plain


def cost_of(
    sized: SizedTrace,
    plan: Plan | None,
    bits: Mapping[str, tuple[float, float]] | None = None,
    products: Mapping[str, float] | None = None,
) -> Cost:
    """Sum up what the traced network costs under ``plan``.

    Args:
        sized: From :func:`basicsr_quant.cost.trace_at`; the network may be quantized already or not.
        plan: Bits of each layer; None for a network in floating point. Layers that it does not name are in floating
            point, matrix products of attention among them.
        bits: Layer -> (w_bits, a_bits) as measured, in place of the plan's, for methods that choose bits. Weights are
            stored at the plan's bits.
        products: Layer -> mean of w_bits x a_bits, where both were chosen together.

    Raises:
        ValueError: if ``bits`` names a layer that was not traced.
    """
    traced = {layer.name: layer for layer in sized.trace.layers + sized.trace.functional}
    in_force = {layer.layer: (float(layer.w_bits), float(layer.a_bits)) for layer in plan or ()}
    in_force.update(bits or {})
    unknown = sorted(set(bits or ()) - set(traced))
    if unknown:
        raise ValueError(f'measured bits name layers that the network does not run: {", ".join(unknown)}')
    kept = {layer.layer: layer.w_bits for layer in plan or ()}
    sparse = None if plan is None else plan.sparsity
    rows = tuple(
        _masked(_row(layer, sized, in_force, kept, products or {}), layer, sparse) for layer in traced.values()
    )
    stored = sum(layer.weight_bytes for layer in traced.values())
    others = sized.trace.parameter_bytes - stored
    macs = sum(row.macs for row in rows)
    weights = [(in_force[name][1], macs_) for name, macs_ in counted_layers(sized, plan).items()]
    total = sum(weight for _, weight in weights)
    masked = [row.weight_bytes if row.masked_weight_bytes is None else row.masked_weight_bytes for row in rows]
    return Cost(
        macs=macs,
        bitops=sum(row.bitops for row in rows),
        weight_bytes=sum(row.weight_bytes for row in rows) + others + sized.trace.range_bytes,
        range_bytes=sized.trace.range_bytes,
        float_bitops=macs * FLOAT_BITS**2,
        float_weight_bytes=sized.trace.parameter_bytes,
        fab=sum(bits_ for bits_, _ in weights) / len(weights) if weights else None,
        fab_mac=sum(bits_ * weight for bits_, weight in weights) / total if total else None,
        output_size=sized.output_size,
        input_size=sized.input_size,
        formula=FORMULA.format(size='x'.join(map(str, sized.output_size))),
        not_counted=sized.trace.not_counted,
        notes=(*sized.notes, *_of_quantizers(sized.trace), *((MASKED, sparse.engines) if sparse else ())),
        layers=rows,
        masked_macs=round(sum(row.macs * row.density for row in rows)) if sparse else None,
        masked_bitops=round(sum(row.bitops * row.density for row in rows)) if sparse else None,
        masked_weight_bytes=sum(masked) + others + sized.trace.range_bytes if sparse else None,
    )


def _of_quantizers(trace: NetworkTrace) -> list[str]:
    if not trace.quantizer_macs:
        return []
    return [f'quantizers spend {trace.quantizer_macs:,} more MACs on the ranges of each image, which no number holds']


def counted_layers(sized: SizedTrace, plan: Plan | None) -> dict[str, int]:
    """The layers whose activation bits make up FAB, with their MACs: those with a quantized input, without first and
    last layers held at 8 bits."""
    traced = {layer.name: layer for layer in sized.trace.layers + sized.trace.functional}
    ends = {sized.trace.layers[0].name, sized.trace.layers[-1].name} if sized.trace.layers else set()
    counted = [layer.layer for layer in plan or () if layer.layer in traced and _counts_for_fab(layer, ends)]
    return {name: sized.macs(traced[name].macs) for name in counted}


def _row(
    layer: LayerTrace,
    sized: SizedTrace,
    in_force: Mapping[str, tuple[float, float]],
    kept: Mapping[str, int],
    products: Mapping[str, float],
) -> LayerCost:
    w_bits, a_bits = in_force.get(layer.name, (FLOAT_BITS, FLOAT_BITS))
    macs = sized.macs(layer.macs)
    stored = kept.get(layer.name, FLOAT_BITS)
    quantized = stored < FLOAT_BITS and layer.weight_numel
    return LayerCost(
        layer=layer.name,
        type=layer.type,
        macs=macs,
        w_bits=w_bits,
        a_bits=a_bits,
        bitops=round(macs * products.get(layer.name, w_bits * a_bits)),
        weight_bytes=ceil(layer.weight_numel * stored / 8) if quantized else layer.weight_bytes,
    )


def _masked(row: LayerCost, layer: LayerTrace, sparse: SparsityPlan | None) -> LayerCost:
    found = next((x for x in sparse.layers if x.layer == layer.name), None) if sparse else None
    if found is None or sparse is None or not layer.weight_numel:
        return row
    bits = row.w_bits if row.w_bits < FLOAT_BITS else 8 * layer.weight_bytes / layer.weight_numel
    stored = found.stored_bytes(sparse.group, layer.weight_numel, bits)
    return replace(row, density=found.density(sparse.group), masked_weight_bytes=stored)


def _counts_for_fab(layer: LayerPlan, ends: set[str]) -> bool:
    """False for layers whose input stays in floating point, and for first and last layers held at 8 bits, whether the
    scope or a rule of the user's holds them there."""
    fixed_end = layer.why in _ENDS or (layer.layer in ends and layer.why.startswith('layers:'))
    return layer.a_bits < FLOAT_BITS and not (fixed_end and layer.a_bits == _END_BITS)
