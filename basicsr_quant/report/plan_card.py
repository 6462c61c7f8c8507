"""The card of a plan: what is quantized, what is not, and why, before anything is done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

from ..cost import SizedTrace, cost_of
from ..network.clamps import FinalClamp
from ..network.plan import FLOAT_BITS, LayerPlan, Plan
from ..network.trace import LayerTrace, NetworkTrace
from ..sparsity import SPARSITY
from . import densities
from .spans import by_pattern, span
from .tables import plain

_HEADER = ('layer', 'type', 'input', 'MACs', 'W', 'A', 'quantizer', 'why')
_FUNCTIONAL = 'matrix products outside layers'


def plan_card(trace: NetworkTrace, plan: Plan, *, show_all: bool = False) -> str:
    """Return the plan of a network as a table with totals.

    Layers that differ by numbers in their names only and are alike in everything else stand in one row, as
    ``body.0-15.conv1``; the share of MACs is their sum.

    Args:
        trace: Of the network in floating point; gives shapes, MACs and sizes.
        plan: What would be done with it.
        show_all: One row for each layer.
    """
    traced = {layer.name: layer for layer in trace.layers + trace.functional}
    planned = {layer.name: LayerPlan(layer.name, layer.type, why=_FUNCTIONAL) for layer in trace.functional}
    planned.update({layer.layer: layer for layer in plan})
    names = [name for name in traced if name in planned] + [name for name in planned if name not in traced]
    groups = [[name] for name in names] if show_all else _alike(names, traced, planned)
    rows = [_row(group, traced, planned[group[0]], plan.method, trace.macs) for group in groups]
    settings = [f'{key} {value}' for key, value in plan.settings.items() if value and not isinstance(value, dict)]
    heading = f'{", ".join(["method " + plan.method, *settings])}; MACs for an input of {_times(trace.input_shape[1:])}'
    floating = _floating([planned[name] for name in names])
    changes = [*_changes(trace, plan), *_tensors(plan), *_output(plan)]
    if plan.sparsity is not None:
        changes += densities.lines(plan.sparsity, SPARSITY[plan.sparsity.method].chooses_kept)
    return '\n'.join([heading, '', plain(_HEADER, rows), '', *_totals(trace, plan), *changes, *floating])


def _alike(
    names: Sequence[str], traced: Mapping[str, LayerTrace], planned: Mapping[str, LayerPlan]
) -> list[list[str]]:
    """Group names that share everything that a row shows, in the order of their first members."""
    kinds: dict[object, list[str]] = {}
    for name in names:
        found = traced.get(name)
        shape = None if found is None else (found.input_shape, found.output_shape, found.calls, found.macs)
        kinds.setdefault((replace(planned[name], layer=''), shape), []).append(name)
    order = {name: index for index, name in enumerate(names)}
    return sorted((group for kind in kinds.values() for group in by_pattern(kind)), key=lambda group: order[group[0]])


def _row(
    group: Sequence[str], traced: Mapping[str, LayerTrace], layer: LayerPlan, method: str, total: int
) -> tuple[object, ...]:
    found = traced.get(group[0])
    shape = 'never runs' if found is None else _times(found.input_shape[1:])
    if found is not None and found.calls > 1:
        shape += f', {found.calls} times'
    return (
        span(group) or '(network)',
        layer.type,
        shape,
        None if found is None else _share(sum(traced[name].macs for name in group), total),
        _bits(layer.w_bits),
        _bits(layer.a_bits),
        method + (', input >= 0' if layer.rectified else '') if layer.is_quantized else None,
        layer.why,
    )


def _totals(trace: NetworkTrace, plan: Plan) -> list[str]:
    found = cost_of(SizedTrace(replace(trace, range_bytes=0), Fraction(1), None, (0, 0)), plan)
    quantized = {layer.layer for layer in plan.quantized}
    macs = sum(layer.macs for layer in trace.layers + trace.functional if layer.name in quantized)
    lines = [
        f'quantized: {len(quantized)} of {len(plan)} layers, {_share(macs, trace.macs)} of the MACs',
        f'weights: {found.float_weight_bytes:,} -> {found.weight_bytes:,} bytes '
        f'({_ratio(found.weight_bytes, found.float_weight_bytes)}), ranges left out',
        f'BitOPs: {_ratio(found.bitops, found.float_bitops)} of floating point',
    ]
    if found.masked_weight_bytes is not None and found.masked_macs is not None and found.masked_macs < found.macs:
        lines.append(
            f'masked: MACs {_ratio(found.masked_macs, found.macs)} of the dense network, weights '
            f'{found.masked_weight_bytes:,} bytes ({_ratio(found.masked_weight_bytes, found.float_weight_bytes)})'
        )
    if found.fab is not None:
        lines.append(f'FAB: {found.fab:.2f}, by MACs {found.fab_mac or found.fab:.2f}')
    if trace.not_counted:
        lines.append(f'not counted: {", ".join(trace.not_counted)}')
    return lines


def _output(plan: Plan) -> list[str]:
    """What a clip-free plan does at the end of the network."""
    output = plan.settings.get('output')
    if not output:
        return []
    clamps = [str(FinalClamp(**clamp)) for clamp in output['clamps']]
    return [f'taken out: {", ".join(clamps)}; the output is quantized instead, 8 bits']


def _changes(trace: NetworkTrace, plan: Plan) -> list[str]:
    """What happens to the network in floating point first: BatchNorms folded, ranges equalized."""
    lines = []
    folded, pairs = plan.settings.get('folded', {}), plan.settings.get('equalized')
    if trace.batch_norms and plan.quantized:
        others = [name for name in trace.batch_norms if name not in folded]
        line = f'BatchNorm: {len(folded)} of {len(trace.batch_norms)} folded into the layers before them'
        if folded and others:
            line += f'; {", ".join(map(span, by_pattern(others)))} cannot be'
        lines.append(line)
    if pairs:
        firsts = ', '.join(map(span, by_pattern(list(pairs))))
        lines.append(f'equalized weight ranges: {len(pairs)} pairs of layers, {firsts} and the one behind each')
    elif pairs is not None:
        lines.append('equalized weight ranges: none; no two quantized layers have only ReLU-like steps between')
    return lines


def _tensors(plan: Plan) -> list[str]:
    """Tensors that are quantized where they are made, one line for each kind."""
    kinds = {
        'sum': 'results of additions', 'skip': 'operands that other steps take too', 'branch': 'other operands',
        'before': 'outputs of layers before functions', 'part': 'parts of concatenations and products',
    }  # fmt: skip
    lines = []
    for kind, words in kinds.items():
        names = [tensor.tensor for tensor in plan.tensors if tensor.kind == kind]
        if names:
            lines.append(f'  {words}: {", ".join(map(span, by_pattern(names)))}')
    return [f'{len(plan.tensors)} tensors between layers at {plan.tensors[0].bits} bits:', *lines] if lines else []


def _floating(layers: Sequence[LayerPlan]) -> list[str]:
    """What stays in floating point, one line for each reason."""
    reasons: dict[str, list[str]] = {}
    for layer in layers:
        if not layer.is_quantized:
            reasons.setdefault(layer.why, []).append(layer.layer)
        elif FLOAT_BITS in (layer.w_bits, layer.a_bits):
            part = 'weights' if layer.w_bits == FLOAT_BITS else 'inputs'
            reasons.setdefault(f'{part} ({layer.why})', []).append(layer.layer)
    lines = [f'  {why}: {", ".join(map(span, by_pattern(names)))}' for why, names in reasons.items()]
    return ['in floating point:', *lines] if lines else []


def _bits(bits: int) -> str:
    return 'fp' if bits == FLOAT_BITS else str(bits)


def _times(shape: Sequence[int]) -> str:
    return 'x'.join(map(str, shape))


def _share(macs: int, total: int) -> str:
    return f'{100 * macs / total:.2f} %' if total else '-'


def _ratio(value: float, reference: float) -> str:
    return f'{value / reference:.3f}' if reference else '-'
