"""What pruning took out of a network, as text."""

from __future__ import annotations

from ..cost import SizedTrace
from ..sparsity.filter_pruning import PruningReport
from .spans import by_pattern, span
from .tables import plain


def pruning_card(report: PruningReport, before: SizedTrace, after: SizedTrace, *, show_all: bool = False) -> str:
    """Tables of the layers and of the whole.

    Args:
        report: What was done.
        before, after: Traces of both networks at one output size.
        show_all: One row for each layer that changed, else equal ones are one.
    """
    kinds: dict[tuple[int, int], list[str]] = {}
    for name, width in report.widths.items():
        kinds.setdefault((report.before[name], width), []).append(name)
    groups = [(key, names) for key, found in kinds.items()
              for names in ([[n] for n in found] if show_all else by_pattern(found))]  # fmt: skip
    order = {name: place for place, name in enumerate(report.before)}
    groups.sort(key=lambda entry: order[entry[1][0]])
    lines = [plain(['layer', 'filters', 'kept'], [[span(names), *key] for key, names in groups]), '']
    share = f'{report.removed:,} of {report.prunable:,} prunable filters ({report.removed / report.prunable:.1%})'
    lines.append(f'{share} taken out; the smaller network computes what the whole one does with them at zero, '
                 f'to {report.difference:.0e}')  # fmt: skip
    width, height = before.output_size
    rows: list[list[object]] = [
        [f'MACs for {width}x{height}', before.macs(before.trace.macs), after.macs(after.trace.macs)],
        ['bytes of weights, FP32', before.trace.parameter_bytes, after.trace.parameter_bytes],
    ]
    for row in rows:
        row.append(f'{float(row[1]) / max(float(row[2]), 1):.2f}x')  # type: ignore[arg-type]
    lines += ['', plain(['', 'before', 'after', ''], rows)]
    if report.compensated:
        lines += ['', f'means of removed filters went into the next layer for {len(report.compensated)} layers'
                  + (f'; not for {_names(report.uncompensated)}' if report.uncompensated else '')]  # fmt: skip
    reasons: dict[str, list[str]] = {}
    for name, why in report.left.items():
        reasons.setdefault(why, []).append(name)
    if reasons:
        left = [f'  {_names(names)}: {why}' for why, names in reasons.items()]
        lines += ['', 'left whole:', *left]
    return '\n'.join(lines)


def _names(names: list[str]) -> str:
    return ', '.join(map(span, by_pattern(names)))
