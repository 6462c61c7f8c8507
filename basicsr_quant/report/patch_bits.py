"""The bits of every patch and layer of a test, as a table, and what they say of the data set."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .files import write_text


@dataclass(frozen=True)
class PatchBits:
    """One patch, or a whole image where a test runs without patches.

    Args:
        image: Name of its image.
        left, top, width, height: Where it lies, in pixels of the LQ image.
        gradient: 1000 mean(\\|Sobel_x\\|, \\|Sobel_y\\|) of the LQ patch, see
            :func:`~basicsr_quant.quantizers.complexity`.
        bits: Layer -> bits of its input, of the layers that FAB counts.
    """

    image: str
    left: int
    top: int
    width: int
    height: int
    gradient: float
    bits: Mapping[str, float]

    @property
    def fab(self) -> float:
        return sum(self.bits.values()) / len(self.bits)


def write_patch_bits(path: str | os.PathLike[str], patches: Sequence[PatchBits]) -> None:
    """Write one row for each patch, layers as columns, to a CSV file."""
    layers = list(dict.fromkeys(name for patch in patches for name in patch.bits))
    text = io.StringIO()
    table = csv.writer(text, lineterminator='\n')
    table.writerow(['image', 'left', 'top', 'width', 'height', 'gradient', 'fab', *layers])
    for p in patches:
        place = [p.image, p.left, p.top, p.width, p.height, f'{p.gradient:.4f}', f'{p.fab:.4f}']
        table.writerow([*place, *(f'{p.bits[name]:g}' if name in p.bits else '' for name in layers)])
    write_text(path, text.getvalue())


def layer_shares(patches: Sequence[PatchBits]) -> dict[str, dict[int, float]]:
    """Layer -> bits -> share of the patches that ran at them; means of several images are rounded to whole bits."""
    counts: dict[str, dict[int, int]] = {}
    for patch in patches:
        for name, bits in patch.bits.items():
            found = counts.setdefault(name, {})
            found[round(bits)] = found.get(round(bits), 0) + 1
    return {name: {b: n / sum(found.values()) for b, n in found.items()} for name, found in counts.items()}


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Spearman's: the linear correlation of ranks, equal values sharing their mean rank. None where one is constant.

    >>> rank_correlation([1, 2, 3], [10, 20, 20])
    0.8660254037844387
    """
    a, b = _ranks(first), _ranks(second)
    mean = (len(a) + 1) / 2
    a, b = [x - mean for x in a], [x - mean for x in b]
    norm = sum(x * x for x in a) * sum(x * x for x in b)
    return sum(x * y for x, y in zip(a, b)) / norm**0.5 if norm else None


def _ranks(values: Sequence[float]) -> list[float]:
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values), 1):
        places.setdefault(value, []).append(place)
    return [(places[v][0] + places[v][-1]) / 2 for v in values]
