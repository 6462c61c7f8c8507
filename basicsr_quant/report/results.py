"""What a test leaves behind: ``metrics.json``, ``metrics.csv`` and ``metrics.md``."""

from __future__ import annotations

import csv
import io
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..cost import Cost
from ..network.plan import Plan
from ..version import __version__
from . import results_text
from .files import write_text

_MEASURED = ('psnr', 'ssim', 'fab', 'fab_mac')


@dataclass(frozen=True)
class ImageResult:
    """One image: PSNR in dB and SSIM on Y, mean bits of activations, seconds. None is unknown."""

    psnr: float | None = None
    ssim: float | None = None
    fab: float | None = None
    fab_mac: float | None = None
    seconds: float | None = None
    extra: Mapping[str, float] = field(default_factory=dict)


@dataclass
class ResultWriter:
    """Collects what is measured, image by image, and writes the result files.

    Args:
        name: The experiment's name.
        method, w_bits, a_bits: As in the ``quant:`` block.
        checkpoint: Path of the weights that were tested.
        plan: The plan in force.
        cost: What the network costs; may be set later. Where an image is given without ``fab``, the plan's holds.
        calibration: ``images``, ``seconds`` by stage (None where an earlier run calibrated) and ``choices``; None for a
            network that was not calibrated.
    """

    name: str
    method: str
    w_bits: float | None = None
    a_bits: float | None = None
    checkpoint: str | None = None
    plan: Plan | None = None
    cost: Cost | None = None
    datasets: dict[str, dict[str, ImageResult]] = field(default_factory=dict)
    extra: dict[str, dict[str, float]] = field(default_factory=dict)
    calibration: Mapping[str, Any] | None = None

    def add_image(
        self,
        dataset: str,
        image: str,
        *,
        psnr: float | None = None,
        ssim: float | None = None,
        fab: float | None = None,
        fab_mac: float | None = None,
        seconds: float | None = None,
        extra: Mapping[str, float] | None = None,
    ) -> None:
        """Record one image; a name that the data set has already had gets a number behind it."""
        images = self.datasets.setdefault(dataset, {})
        unique, number = image, 1
        while unique in images:
            number += 1
            unique = f'{image} ({number})'
        images[unique] = ImageResult(psnr, ssim, fab, fab_mac, seconds, dict(extra or {}))

    def add_extra(self, dataset: str, metric: str, value: float) -> None:
        """Record a figure of a whole data set that was not measured here, e.g. one of the host's own metrics."""
        self.extra.setdefault(dataset, {})[metric] = value

    def to_plain(self) -> dict[str, Any]:
        """Return the content of ``metrics.json``. What is unknown, infinite or not a number is None."""
        datasets = self._measured()
        for result in datasets.values():
            result['images'] = {
                image: {key: value for key, value in vars(measured).items() if key != 'extra' or value}
                for image, measured in result['images'].items()
            }
        plain = {
            'name': self.name,
            'method': self.method,
            'w_bits': self.w_bits,
            'a_bits': self.a_bits,
            'checkpoint': None if self.checkpoint is None else os.fspath(self.checkpoint),
            'datasets': datasets,
            'calibration': self.calibration,
            'cost': None if self.cost is None else self.cost.to_plain(),
            'plan': [vars(layer) for layer in self.plan or ()],
            'tensors': [vars(tensor) for tensor in (self.plan.tensors if self.plan else ())],
            'sparsity': _sparsity(self.plan),
            'versions': versions(),
        }
        return _finite(plain)

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write the three files; each is complete or the one before it."""
        measured = self._measured()
        text = json.dumps(self.to_plain(), indent=1, allow_nan=False, ensure_ascii=False)
        write_text(Path(folder) / 'metrics.json', text + '\n')
        write_text(Path(folder) / 'metrics.csv', _csv(measured))
        write_text(Path(folder) / 'metrics.md', results_text.page(self, measured))

    def summary(self) -> str:
        """The table of data sets and the cost in a few lines, for the log."""
        return results_text.summary(self._measured(), self.cost)

    def _measured(self) -> dict[str, dict[str, Any]]:
        return {name: self._dataset(name) for name in dict.fromkeys([*self.datasets, *self.extra])}

    def _dataset(self, name: str) -> dict[str, Any]:
        """Means over the images of a data set, seconds in all; images with the plan's bits filled in.

        A mean is None where any image lacks the figure: the mean of the others would not be the data set's.
        """
        fab, fab_mac = (None, None) if self.cost is None else (self.cost.fab, self.cost.fab_mac)
        images = {
            image: ImageResult(
                found.psnr,
                found.ssim,
                fab if found.fab is None else found.fab,
                fab_mac if found.fab is None and found.fab_mac is None else found.fab_mac,
                found.seconds,
                found.extra,
            )
            for image, found in self.datasets.get(name, {}).items()
        }
        means = {key: _mean([getattr(found, key) for found in images.values()]) for key in _MEASURED}
        seconds = [found.seconds for found in images.values() if found.seconds is not None]
        metrics = dict.fromkeys(metric for found in images.values() for metric in found.extra)
        extra = {metric: _mean([found.extra.get(metric) for found in images.values()]) for metric in metrics}
        return {
            **means,
            'seconds': sum(seconds) if seconds else None,
            'images': images,
            'extra': {**extra, **self.extra.get(name, {})},
        }


def versions() -> dict[str, str | None]:
    """Versions of what a result depends on; None for what is not installed."""
    found: dict[str, str | None] = {'basicsr_quant': __version__}
    for package in ('basicsr', 'torch', 'torchvision', 'numpy'):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _sparsity(plan: Plan | None) -> dict[str, Any] | None:
    """The plan of masks with what it leaves: of all masked layers together (``share``) and of each (``density``)."""
    if plan is None or plan.sparsity is None:
        return None
    sparsity = plan.sparsity
    layers = [{**vars(layer), 'density': layer.density(sparsity.group)} for layer in sparsity.layers]
    return {**sparsity.to_plain(), 'layers': layers, 'share': sparsity.share()}


def _mean(values: Iterable[float | None]) -> float | None:
    known = list(values)
    return None if not known or None in known else sum(known) / len(known)  # type: ignore[arg-type]


def _finite(tree: Any) -> Any:
    """The same tree of plain data, with None for what JSON has no number for."""
    if isinstance(tree, Mapping):
        return {str(key): _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    if tree is None or isinstance(tree, (bool, int, str)):
        return tree
    number = float(tree)
    return number if math.isfinite(number) else None


def _csv(datasets: Mapping[str, dict[str, Any]]) -> str:
    """One row for each image."""
    images = [(name, image, found) for name, data in datasets.items() for image, found in data['images'].items()]
    metrics = list(dict.fromkeys(metric for *_, found in images for metric in found.extra))
    text = io.StringIO()
    table = csv.writer(text, lineterminator='\n')
    table.writerow(['dataset', 'image', *_MEASURED, 'seconds', *metrics])
    for name, image, found in images:
        row = [getattr(found, key) for key in (*_MEASURED, 'seconds')] + [found.extra.get(m) for m in metrics]
        table.writerow([name, image, *row])
    return text.getvalue()
