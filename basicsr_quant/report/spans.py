"""Many names in one: ``body.0-15.conv1`` for sixteen layers that differ by a number."""

from __future__ import annotations

import re
from collections.abc import Sequence

_NUMBER = re.compile(r'\d+$')


def by_pattern(names: Sequence[str]) -> list[list[str]]:
    """Group names that differ by numbers only, so that :func:`span` names each group and nothing else.

    Numbers are whole parts of a name, or end a part that is not the last: ``conv1`` and ``conv2`` are two layers.
    A group is a full grid of numbers: with ``a.0.0``, ``a.0.1`` and ``a.1.0`` alone, ``a.0-1.0-1`` would say too much.

    >>> by_pattern(['a.0.w', 'a.1.w', 'b', 'a.2.w'])
    [['a.0.w', 'a.1.w', 'a.2.w'], ['b']]
    """
    patterns: dict[tuple[str, ...], list[str]] = {}
    for name in names:
        *places, last = name.split('.')
        pattern = (*(_NUMBER.sub('#', place) for place in places), '#' if last.isdigit() else last)
        patterns.setdefault(pattern, []).append(name)
    return [grid for members in patterns.values() for grid in _grids(members)]


def span(names: Sequence[str]) -> str:
    """One name for a group that :func:`by_pattern` made.

    >>> span(['body.0.conv1', 'body.1.conv1', 'body.2.conv1', 'body.5.conv1'])
    'body.0-2,5.conv1'
    >>> span(['body.0.rdb1.conv1', 'body.0.rdb2.conv1'])
    'body.0.rdb1-2.conv1'
    """
    places = [sorted(set(parts), key=lambda part: (len(part), part)) for parts in zip(*(n.split('.') for n in names))]
    return '.'.join(_one_part(parts) if len(parts) > 1 else parts[0] for parts in places)


def _one_part(parts: Sequence[str]) -> str:
    return _NUMBER.sub('', parts[0]) + _ranges([int(found[0]) for part in parts if (found := _NUMBER.search(part))])


def _grids(names: Sequence[str]) -> list[list[str]]:
    """Split names of one pattern into full grids, by merging one place after the other, the last first."""
    boxes = {tuple(frozenset([part]) for part in name.split('.')): [name] for name in names}
    for place in reversed(range(len(names[0].split('.')))):
        lines: dict[tuple[frozenset[str], ...], list[tuple[frozenset[str], ...]]] = {}
        for box in boxes:
            lines.setdefault(box[:place] + box[place + 1 :], []).append(box)
        boxes = {
            (*key[:place], frozenset().union(*(box[place] for box in line)), *key[place:]): [
                name for box in line for name in boxes[box]
            ]
            for key, line in lines.items()
        }
    return list(boxes.values())


def _ranges(numbers: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ','.join(f'{run[0]}-{run[-1]}' if len(run) > 1 else str(run[0]) for run in runs)
