"""Filter pruning: ranking, choosing, taking out. The result is a smaller network, not a masked one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from ..errors import QuantError, nearest
from ..network.trace import NetworkTrace, trace
from .filter_groups import FilterGroup, difference, find_groups, remove_filters
from .filter_importance import (
    batch_norm_constant,
    batch_norm_importance,
    combined,
    magnitude_importance,
    random_importance,
    slope_of,
)
from .filter_options import FilterPruning
from .widths import widths_of


@dataclass
class PruningReport:
    """What :func:`prune` did.

    Args:
        before, after: Filters of each convolution.
        left: Convolutions whose filters stay, and why.
        prunable: How many filters could have gone.
        removed: How many went (of filters that go together, each counts).
        traced_before, traced_after: The networks, for MACs and bytes.
        difference: How far the smaller network was from the one with the same filters at zero, relative.
        compensated: Layers that took over the mean of removed filters; ``uncompensated``: those that had no bias and no
            BatchNorm to put it into.
    """

    before: dict[str, int]
    traced_before: NetworkTrace
    left: dict[str, str] = field(default_factory=dict)
    prunable: int = 0
    removed: int = 0
    after: dict[str, int] = field(default_factory=dict)
    traced_after: NetworkTrace | None = None
    difference: float = 0.0
    compensated: list[str] = field(default_factory=list)
    uncompensated: list[str] = field(default_factory=list)

    @property
    def widths(self) -> dict[str, int]:
        """Convolutions that changed."""
        return {name: width for name, width in self.after.items() if width != self.before[name]}


def prune(net: nn.Module, options: FilterPruning) -> PruningReport:
    """Take filters out of an FP32 network, in place.

    Raises:
        QuantError: if nothing can be pruned so, with what would work instead.
    """
    report = PruningReport(widths_of(net), trace(net))
    found = find_groups(net)
    report.left.update(found.left)
    ranked = _ranked(net, found.groups, report, options)
    if not ranked:
        raise QuantError(_nothing(net, options, report))
    report.prunable = sum(group.size * len(group.convs) for group, _ in ranked)
    chosen = _choose(ranked, options)
    removals = [group.removal(units) for (group, _), units in zip(ranked, chosen) if units]
    report.removed = sum(len(numbers) for removal in removals for numbers in removal.values())
    if removals:
        report.difference = difference(net, removals)
        if options.compensate:
            _compensate(net, removals, report)
        remove_filters(net, removals)
    report.after = widths_of(net)
    report.traced_after = trace(net)
    return report


def _ranked(
    net: nn.Module, groups: Sequence[FilterGroup], report: PruningReport, options: FilterPruning
) -> list[tuple[FilterGroup, Tensor]]:
    """The groups that may be pruned with the importance of their units; the others go into ``report.left``."""
    dense = {name for name in report.before if any(fnmatchcase(name, glob) for glob in options.dense)}
    for glob in options.dense:
        if not any(fnmatchcase(name, glob) for name in report.before):
            raise QuantError(f"sparsity.layers: '{glob}' matches no convolution{nearest(glob, report.before)}")
    generator = torch.Generator().manual_seed(options.seed)
    ranked = []
    for group in groups:
        if dense & set(group.convs):
            why = 'sparsity.layers: dense'
        elif len(group.convs) > 1 and not options.joint:
            why = 'feeds sums together with others (joint: true prunes them)'
        else:
            importance = _importance(net, group, report.traced_before, options, generator)
            if isinstance(importance, Tensor):
                ranked.append((group, importance))
                continue
            why = importance
        report.left.update(dict.fromkeys(group.convs, why))
    return ranked


def _importance(
    net: nn.Module, group: FilterGroup, traced: NetworkTrace, options: FilterPruning, generator: torch.Generator
) -> Tensor | str:
    """One value a unit, or why there is none."""
    if options.method == 'random':
        return random_importance(group.size, generator)
    found, why = [], 'there is no BatchNorm behind it'
    for name, numbers in zip(group.convs, group.filters):
        if options.method == 'magnitude':
            weight = net.get_submodule(name).weight
            assert isinstance(weight, Tensor)
            found.append(magnitude_importance(weight)[list(numbers)])
            continue
        norm, slope, reason = _norm_behind(net, traced, name)
        why = reason or why
        if norm is not None and slope is not None:
            found.append(batch_norm_importance(norm, slope, options.moment)[list(numbers)])
    return combined(found) if found else why


def _norm_behind(
    net: nn.Module, traced: NetworkTrace, name: str
) -> tuple[nn.BatchNorm2d | None, Tensor | float | None, str]:
    """The BatchNorm right behind a convolution, the slope of the activation behind that, or why there is none."""
    modules = dict(net.named_modules())
    chain = traced[name].chain
    norm = modules.get(chain[0].name) if chain else None
    if not isinstance(norm, nn.BatchNorm2d):
        return None, None, ''
    after = chain[1] if len(chain) > 1 else None
    slope = slope_of(None if after is None else modules[after.name] if after.name else after.type)
    if slope is None:
        assert after is not None
        return norm, None, f'no formula for the {after.type} behind its BatchNorm'
    return norm, slope, ''


def _choose(ranked: Sequence[tuple[FilterGroup, Tensor]], options: FilterPruning) -> list[list[int]]:
    """The units that go, for each group: the least important, leaving each layer at least ``multiple_of`` filters."""
    step = options.multiple_of
    wanted = [0] * len(ranked)
    if options.ranking == 'layer':
        wanted = [round(options.ratio * group.size) for group, _ in ranked]
    else:
        target = round(options.ratio * sum(group.size * len(group.convs) for group, _ in ranked))
        order = sorted(
            ((float(value), place) for place, (_, importance) in enumerate(ranked) for value in importance),
            key=lambda entry: entry[0],
        )
        for _, place in order:
            group = ranked[place][0]
            if target >= len(group.convs) and group.size - wanted[place] > min(step, group.size):
                wanted[place] += 1
                target -= len(group.convs)
    chosen = []
    for (group, importance), count in zip(ranked, wanted):
        keep = min(group.size, max(step, -(-(group.size - count) // step) * step))
        order_here = importance.argsort(stable=True).tolist()
        chosen.append(sorted(order_here[: group.size - keep]))
    return chosen


@torch.no_grad()
def _compensate(net: nn.Module, removals: Sequence[dict[str, list[int]]], report: PruningReport) -> None:
    """Put the mean of what is removed into the bias, or the BatchNorm, of the one layer that reads it."""
    modules = dict(net.named_modules())
    for removal in removals:
        name, numbers = next(iter(removal.items()))
        reader = next((step.name for step in report.traced_before[name].chain if step.name
                       and isinstance(modules[step.name], nn.Conv2d)), None)  # fmt: skip
        norm, slope, _ = _norm_behind(net, report.traced_before, name)
        conv = modules.get(reader) if reader else None
        if len(removal) > 1 or norm is None or slope is None or not isinstance(conv, nn.Conv2d) or conv.groups > 1:
            report.uncompensated.append(name)
            continue
        constant = batch_norm_constant(norm, slope)[numbers].to(conv.weight)
        shift = (conv.weight[:, numbers].sum(dim=(2, 3)) * constant).sum(dim=1)
        behind = report.traced_before[reader].chain if reader else ()
        own = modules.get(behind[0].name) if behind else None
        if conv.bias is not None:
            conv.bias += shift
        elif isinstance(own, nn.BatchNorm2d) and own.running_mean is not None:
            own.running_mean -= shift
        else:
            report.uncompensated.append(name)
            continue
        report.compensated.append(name)


def _nothing(net: nn.Module, options: FilterPruning, report: PruningReport) -> str:
    kind = type(net).__name__
    if options.method == 'bn_filter' and not report.traced_before.batch_norms:
        return f"sparsity.method: 'bn_filter' ranks filters by BatchNorm, and {kind} has none; use magnitude"
    reasons = '; '.join(sorted(set(report.left.values())))
    return f'sparsity.method: {options.method!r} finds no filter in {kind} that could go: {reasons}'
