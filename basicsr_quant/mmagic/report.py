"""The result files of a test: the same ``metrics.json`` as under BasicSR."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from mmagic.evaluation.metrics.psnr import psnr
from mmagic.evaluation.metrics.ssim import ssim
from mmengine.dist import all_gather_object, is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor

from ..cost import BitMeter, MeasuredBits, SizedTrace, cost_of, in_patches, trace_at
from ..network.masking import masks_in_force
from ..report.results import ResultWriter
from .generator import QuantRun, run_of, the_quantized_network


@dataclass(frozen=True)
class _Measured:
    dataset: str
    image: str
    psnr: float | None
    ssim: float | None
    seconds: float
    bits: MeasuredBits | None = None


@HOOKS.register_module()
class QuantizationReportHook(Hook):
    """Writes ``metrics.json``, ``.csv`` and ``.md`` into ``work_dir`` at the end of a test.

    PSNR and SSIM are those of the Y channel of the output rounded to uint8, with a border of ``scale`` pixels left
    out, by MMagic's functions, whatever the evaluators hold; their figures go under ``extra``. Bits are those that the
    passes used, for a batch of several images their mean. In a distributed test rank 0 gathers the images.

    Args:
        output_size: Width and height that the cost is given for.
    """

    def __init__(self, output_size: Sequence[int] = (1280, 720)) -> None:
        self.output_size = (int(output_size[0]), int(output_size[1]))
        self._found: list[_Measured] = []
        self._start = 0.0
        self._sized: SizedTrace | None = None
        self._meter: BitMeter | None = None

    def before_test_epoch(self, runner: Any) -> None:
        self._found = []
        _, net = the_quantized_network(runner.model)
        run = run_of(net)
        self._sized = trace_at(net, scale=run.scale, output_size=self.output_size)
        self._meter = BitMeter(net, run.plan, self._sized)

    def before_test_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        self._start = time.time()

    def after_test_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: Sequence[Any] | None = None
    ) -> None:
        seconds = (time.time() - self._start) / max(len(outputs or ()), 1)
        name = dataset_name(runner.test_loop, batch_idx)
        bits = self._meter.image() if self._meter is not None else None
        self._found += [_measure(name, sample, seconds, bits) for sample in outputs or ()]

    def after_test_epoch(self, runner: Any, metrics: Mapping[str, float] | None = None) -> None:
        if self._meter is not None:
            self._meter.close()
        gathered = [found for rank in all_gather_object(self._found) for found in rank]
        if not is_main_process():
            return
        _, net = the_quantized_network(runner.model)
        run = run_of(net)
        run.plan = masks_in_force(net, run.plan)
        writer = ResultWriter(
            name=runner.cfg.get('experiment_name') or runner.experiment_name,
            method=run.plan.method,
            w_bits=run.config.w_bits,
            a_bits=run.config.a_bits,
            checkpoint=runner._load_from if isinstance(runner._load_from, str) else None,
            plan=run.plan,
            calibration=_calibration(run),
        )
        # A sampler that gives all ranks as many images repeats some.
        images = list({(found.dataset, found.image): found for found in gathered}.values())
        for found in images:
            writer.add_image(
                found.dataset, found.image, psnr=found.psnr, ssim=found.ssim, seconds=found.seconds,
                fab=None if found.bits is None else found.bits.fab,
                fab_mac=None if found.bits is None else found.bits.fab_mac,
            )  # fmt: skip
        for key, value in (metrics or {}).items():
            prefix, _, metric = key.rpartition('/')
            writer.add_extra(prefix or next(iter(writer.datasets), 'test'), metric, float(value))
        assert self._sized is not None
        writer.cost = cost_of(self._sized, run.plan, _mean_bits(run, images))
        patch = run.config.patch
        if patch is not None:
            writer.cost = in_patches(writer.cost, self._sized, patch.size, patch.stride)
        writer.write(runner.work_dir)
        path = os.path.join(runner.work_dir, 'metrics.json')
        runner.logger.info(f'Results, also in {path}:\n{writer.summary()}')


def _calibration(run: QuantRun) -> dict[str, Any] | None:
    if not run.calibration:
        return None
    known = {key: run.calibration.get(key) for key in ('images', 'feature_scale', 'choices')}
    return {**known, 'seconds': run.seconds or None}


def _mean_bits(run: QuantRun, images: Sequence[_Measured]) -> dict[str, tuple[float, float]]:
    """Layer -> (w_bits, a_bits), the latter the mean over the images, where bits were chosen."""
    plan = {layer.layer: layer for layer in run.plan}
    found: dict[str, list[float]] = {}
    for image in images:
        for name, bits in (image.bits.layers if image.bits is not None else {}).items():
            found.setdefault(name, []).append(bits)
    return {name: (float(plan[name].w_bits), sum(bits) / len(bits)) for name, bits in found.items()}


def dataset_name(loop: Any, batch_idx: int) -> str:
    """The evaluator's prefix (``Set5``), or what the data set calls itself, of the loader that gave a batch."""
    loaders = getattr(loop, 'dataloaders', None) or [loop.dataloader]
    evaluators = getattr(loop, 'evaluators', None) or [loop.evaluator]
    for loader, evaluator in zip(loaders, evaluators):  # MMagic counts batches through all of its loaders
        if batch_idx < len(loader):
            prefixes = [metric.prefix for metric in evaluator.metrics if metric.prefix]
            return str(prefixes[0] if prefixes else loader.dataset.metainfo.get('dataset_type', 'test'))
        batch_idx -= len(loader)
    return 'test'


def image_name(sample: Any) -> str:
    """What an image is called: its ground truth's file, or its own where there is none."""
    path = sample.get('gt_path') or sample.get('img_path') or ''
    path = path[0] if isinstance(path, (list, tuple)) else path
    return os.path.splitext(os.path.basename(str(path)))[0]


def _measure(dataset: str, sample: Any, seconds: float, bits: MeasuredBits | None) -> _Measured:
    output, given, truth = sample.output.get('pred_img'), sample.get('input'), sample.get('gt_img')
    scale = output.shape[-1] // given.shape[-1] if given is not None else 1
    found: dict[str, float | None] = {'psnr': None, 'ssim': None}
    if truth is not None and truth.shape == output.shape:
        pair = [to_uint8(truth), to_uint8(output)]
        options = {'crop_border': scale, 'input_order': 'CHW', 'channel_order': 'BGR'}
        options['convert_to'] = 'Y' if output.shape[0] == 3 else None
        found = {'psnr': float(psnr(*pair, **options)), 'ssim': float(ssim(*pair, **options))}
    return _Measured(dataset, image_name(sample), found['psnr'], found['ssim'], seconds, bits)


def to_uint8(image: Tensor) -> np.ndarray:
    """An image in 0-255 as MMagic's data samples have it, rounded."""
    return image.detach().float().cpu().clamp(0, 255).round().byte().numpy()
