"""Tables as text: aligned for the terminal, or as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

_NUMBERS = (*'-+0123456789', 'inf', 'nan')

Rows = Sequence[Sequence[object]]


def plain(header: Sequence[str], rows: Rows, indent: str = '') -> str:
    """Columns aligned by spaces; columns of numbers to the right, the first one never.

    >>> print(plain(['layer', 'MACs'], [['conv', 1728], ['body', None]]))
    layer   MACs
    -----  -----
    conv   1,728
    body       -
    """
    lines = [list(header), *([cell(value) for value in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    right = _numeric(lines[1:], len(header))

    def aligned(line: Sequence[str]) -> str:
        texts = (t.rjust(w) if is_right else t.ljust(w) for t, w, is_right in zip(line, widths, right))
        return indent + '  '.join(texts).rstrip()

    return '\n'.join([aligned(lines[0]), aligned(['-' * w for w in widths]), *map(aligned, lines[1:])])


def markdown(header: Sequence[str], rows: Rows) -> str:
    """The same as a Markdown table.

    >>> print(markdown(['layer', 'MACs'], [['conv', 1728]]))
    | layer | MACs |
    | --- | ---: |
    | conv | 1,728 |
    """
    lines = [[cell(value).replace('|', '\\|') for value in row] for row in rows]
    marks = ['---:' if is_right else '---' for is_right in _numeric(lines, len(header))]
    return '\n'.join('| ' + ' | '.join(line) + ' |' for line in [list(header), marks, *lines])


def cell(value: object) -> str:
    """A value as text: None is a dash, whole numbers get separators, others at most four decimals."""
    if value is None:
        return '-'
    if isinstance(value, int) and not isinstance(value, bool):
        return f'{value:,}'
    if isinstance(value, float):
        return f'{value:,.4f}'.rstrip('0').rstrip('.')
    return str(value)


def _numeric(lines: Sequence[Sequence[str]], columns: int) -> list[bool]:
    """Which columns hold numbers only (a unit may follow), and not the first."""
    return [
        column > 0 and bool(lines) and all(line[column].startswith(_NUMBERS) for line in lines)
        for column in range(columns)
    ]
