"""The result page (``metrics.md``) and the summary in the log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..cost import Cost
from . import densities, tables

if TYPE_CHECKING:
    from .results import ResultWriter


def page(writer: ResultWriter, datasets: Mapping[str, dict[str, Any]]) -> str:
    """Return ``metrics.md``: data sets, then costs with their formulas, then what could not be counted."""
    bits = ' '.join(
        f'{letter}{tables.cell(value)}' for letter, value in (('W', writer.w_bits), ('A', writer.a_bits)) if value
    )
    parts = [
        f'# {writer.name}',
        f'Method {writer.method}{" " + bits if bits else ""}, checkpoint {_code(writer.checkpoint)}. '
        'PSNR (dB) and SSIM on Y, output rounded to uint8, border of the scale left out; seconds in all.',
        tables.markdown(*_datasets(datasets)),
        *_missing(datasets),
        *_calibration(writer.calibration),
    ]
    if writer.cost is not None:
        parts += _cost(writer.cost)
    if writer.plan is not None and writer.plan.sparsity is not None:
        parts += ['## Sparsity', tables.markdown([*densities.HEADER], densities.rows(writer.plan.sparsity))]
    return '\n\n'.join(parts) + '\n'


def summary(datasets: Mapping[str, dict[str, Any]], cost: Cost | None) -> str:
    """Return the table of data sets and one line of costs, for a terminal."""
    lines = [tables.plain(*_datasets(datasets))]
    if cost is not None:
        lines.append(
            f'cost of one {_size(cost.output_size)} output: {_cut(cost.macs)} MACs, {_cut(cost.bitops)} BitOPs '
            f'({_ratio(cost.bitops, cost.float_bitops)} of floating point), weights {tables.cell(cost.weight_bytes)} '
            f'bytes ({_ratio(cost.weight_bytes, cost.float_weight_bytes)})'
        )
        if cost.masked_macs is not None and cost.masked_weight_bytes is not None:
            lines.append(
                f'of these the masks keep {_cut(cost.masked_macs)} MACs ({_ratio(cost.masked_macs, cost.macs)}) and '
                f'{tables.cell(cost.masked_weight_bytes)} bytes with their places'
            )
    return '\n'.join(lines)


def _datasets(datasets: Mapping[str, dict[str, Any]]) -> tuple[list[str], list[list[object]]]:
    extra = list(dict.fromkeys(metric for data in datasets.values() for metric in data['extra']))
    header = ['data set', 'images', 'PSNR', 'SSIM', 'FAB', 'FAB by MACs', 'seconds', *extra]
    return header, [
        [
            name,
            len(data['images']),
            _fixed(data['psnr'], 3),
            _fixed(data['ssim'], 4),
            _fixed(data['fab'], 2),
            _fixed(data['fab_mac'], 2),
            _fixed(data['seconds'], 1),
            *(_fixed(data['extra'].get(metric), 4) for metric in extra),
        ]
        for name, data in datasets.items()
    ]


def _missing(datasets: Mapping[str, dict[str, Any]]) -> list[str]:
    lines = []
    for name, data in datasets.items():
        lacking = [image for image, found in data['images'].items() if found.psnr is None]
        if lacking and len(lacking) < len(data['images']):
            lines.append(
                f'{name} has no mean: {len(lacking)} of {len(data["images"])} images have no ground truth of the '
                f"output's size, {lacking[0]} among them."
            )
    return lines


def _calibration(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    line = f'Calibrated on {found["images"]} images' if found['images'] else 'Calibrated without images'
    seconds = found['seconds']
    if seconds:
        stages = ', '.join(f'{stage} {value:.1f} s' for stage, value in seconds.items())
        line += f' in {sum(seconds.values()):.1f} s: {stages}'
    choices = {k: v for k, v in (found['choices'] or {}).items() if not isinstance(v, (Mapping, list))}
    return [line + '.', *(['\n'.join(f'- {k}: {tables.cell(v)}' for k, v in choices.items())] if choices else [])]


def _cost(cost: Cost) -> list[str]:
    figures = {
        'MACs': (cost.macs, cost.macs),
        'BitOPs': (cost.bitops, cost.float_bitops),
        'weight bytes': (cost.weight_bytes, cost.float_weight_bytes),
    }
    if cost.bitops_with_overlap is not None:
        figures['BitOPs, overlap counted'] = (cost.bitops_with_overlap, cost.float_bitops)
    if cost.masked_macs is not None and cost.masked_bitops is not None and cost.masked_weight_bytes is not None:
        figures['masked MACs'] = (cost.masked_macs, cost.macs)
        figures['masked BitOPs'] = (cost.masked_bitops, cost.float_bitops)
        figures['masked weight bytes'] = (cost.masked_weight_bytes, cost.float_weight_bytes)
    rows: list[list[object]] = [[name, *pair, _ratio(*pair)] for name, pair in figures.items()]
    rows += [
        ['of these ranges', cost.range_bytes, 0, None],
        ['FAB', _fixed(cost.fab, 2), 32, None],
        ['FAB by MACs', _fixed(cost.fab_mac, 2), 32, None],
    ]
    size = f'{_size(cost.output_size)} output'
    if cost.input_size is not None:
        size += f' ({_size(cost.input_size)} input)'
    skipped = ', '.join(cost.not_counted)
    return [
        f'## Cost of one {size}',
        tables.markdown(['', 'this network', 'floating point', 'ratio'], rows),
        '\n'.join(f'- {line}' for line in [*cost.formula.split('; '), *cost.notes]),
        f'Not counted: {skipped}.' if skipped else 'Nothing was left uncounted.',
    ]


def _fixed(value: float | None, decimals: int) -> str | None:
    return None if value is None else f'{value:.{decimals}f}'


def _ratio(value: float, reference: float) -> str | None:
    return f'{value / reference:.3f}' if reference else None


def _cut(number: float) -> str:
    for unit, size in (('T', 1e12), ('G', 1e9), ('M', 1e6)):
        if number >= size:
            return f'{number / size:.2f} {unit}'
    return tables.cell(number)


def _size(size: tuple[int, int]) -> str:
    return 'x'.join(map(str, size))


def _code(path: object) -> str:
    return '-' if path is None else f'`{path}`'
