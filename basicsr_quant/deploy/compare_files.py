"""Exported files on the test sets of an option file, beside the network in PyTorch: PSNR, seconds, bits."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .engines import Run
from .parity import ParityImage
from .router import Router


@dataclass(frozen=True)
class FileRow:
    """One network on one data set.

    Attributes:
        name: Of the file, or ``basicsr test``.
        dataset: The set.
        psnr: Mean over the images that have a ground truth, None where none has.
        seconds: Of all images, each the median of the rounds.
        fab: Mean bits of activations over patches and images, None where they are not known.
    """

    name: str
    dataset: str
    psnr: float | None
    seconds: float
    fab: float | None


@torch.no_grad()
def compare_files(
    runs: Mapping[str, Run],
    sets: Mapping[str, Sequence[ParityImage]],
    psnr: Callable[[Tensor, Any], float],
    bits: Mapping[str, Callable[[], float | None]],
    rounds: int = 1,
) -> list[FileRow]:
    """Run each network on each image, one after another, so that drift of the machine falls on all.

    Args:
        runs: By name, (1, C, H, W) to the output; cut into patches already where that is wanted.
        sets: Images by data set.
        psnr: Of an output against :attr:`.parity.ParityImage.truth`.
        bits: By name, called after each image: its FAB.
        rounds: Times that each image is run; the first one, whose output counts, warms up and is not timed if there
            are more.
    """
    rows = []
    for dataset, images in sets.items():
        levels: dict[str, list[float]] = {name: [] for name in runs}
        seconds = dict.fromkeys(runs, 0.0)
        fabs: dict[str, list[float]] = {name: [] for name in runs}
        for item in images:
            times: dict[str, list[float]] = {name: [] for name in runs}
            for index in range(rounds):
                for name, run in runs.items():
                    start = time.perf_counter()
                    output = run(item.image)
                    times[name].append(time.perf_counter() - start)
                    fab = bits[name]() if name in bits else None
                    if index == 0:
                        levels[name] += [] if item.truth is None else [psnr(output, item.truth)]
                        fabs[name] += [] if fab is None else [fab]
            for name, found in times.items():
                seconds[name] += statistics.median(found[1:] or found)
        rows += [FileRow(name, dataset, _mean(levels[name]), seconds[name], _mean(fabs[name])) for name in runs]
    return rows


def table(rows: Sequence[FileRow]) -> tuple[list[str], list[list[Any]]]:
    """Header and cells; times as ratios to the first network of each set."""
    first: dict[str, float] = {}
    cells = []
    for row in rows:
        own = first.setdefault(row.dataset, row.seconds)
        cells.append([
            row.dataset, row.name, None if row.psnr is None else f'{row.psnr:.3f}', f'{row.seconds:.2f}',
            f'{own / row.seconds:.2f}x', None if row.fab is None else f'{row.fab:.2f}',
        ])  # fmt: skip
    return ['data set', 'network', 'PSNR', 'seconds', 'speed', 'bits of inputs'], cells


def bits_of_router(router: Router) -> Callable[[], float]:
    """FAB of the patches since the last call."""
    before = [0] * len(router.counts)

    def fab() -> float:
        new = [now - then for now, then in zip(router.counts, before)]
        before[:] = router.counts
        return sum(b * n for b, n in zip(router.bits, new)) / max(1, sum(new))

    return fab


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
