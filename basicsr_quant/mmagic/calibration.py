"""Calibration in MMEngine: images from any data set config, ranges equal on all ranks, random states left alone."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from mmengine.dataset import pseudo_collate
from mmengine.logging import print_log
from mmengine.registry import DATASETS
from torch import Tensor, nn

from ..config import CalibrationConfig
from ..data.calibration import centre_crop, number_of_images
from ..errors import QuantError
from ..methods import calibrate as calibrate_network
from ..methods import needs_images
from ..network.ranks import same_on_all_ranks
from ..network.stages import Stages
from ..network.surgery import plan_in_force, quantizers
from ..random_state import preserved, seeded
from .generator import run_of


class CalibrationImages:
    """Network inputs (1, C, h, w), centre crops of at most ``patch_size`` pixels a side, one image at a time.

    The data set is read item by item: a loader of its own would be one more user of workers and seeds, and the
    training loader must not be touched (its sampler is one endless generator).

    Args:
        config: Number of images and crop.
        dataset: Data set config of MMEngine; a pipeline that draws at random draws the same on every pass and rank.
        to_input: Turns a collated batch into the network's input: the model's data preprocessor.
        seed: What such a pipeline draws from.

    Raises:
        QuantError: if the data set is empty or has fewer images than asked for.
    """

    def __init__(
        self, config: CalibrationConfig, dataset: Mapping[str, Any], to_input: Callable[[Any], Tensor], seed: int
    ) -> None:
        with preserved():
            self._dataset = DATASETS.build(dict(dataset))
        self._count = number_of_images(config, len(self._dataset), {'dataroot_lq': folder_of(dataset)})
        # The first ones by name: MMEngine lists a folder in the order of the file system.
        paths = [str(self._dataset.get_data_info(index).get('img_path', '')) for index in range(len(self._dataset))]
        self._order = sorted(range(len(paths)), key=paths.__getitem__)
        self._patch, self._to_input, self._seed = config.patch_size, to_input, seed

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        for index in range(self._count):
            with seeded(self._seed, index):
                image = self._to_input(pseudo_collate([self._dataset[self._order[index]]]))
            yield centre_crop(image, self._patch)


def folder_of(dataset: Mapping[str, Any]) -> str:
    """Where a data set config reads its inputs, for messages and comparisons."""
    prefix = dataset.get('data_prefix') or {}
    inner = prefix.get('img', '') if isinstance(prefix, Mapping) else prefix
    return '/'.join(part.rstrip('/') for part in (dataset.get('data_root') or '', inner) if part) or 'the data set'


def calibrate(
    net: nn.Module, dataset: Mapping[str, Any] | None, to_input: Callable[[Any], Tensor], seed: int
) -> None:
    """Set every range of ``net`` in place by its method; afterwards the ranges are rank 0's on all ranks.

    Of a network that has ranges, taken over from another method, only what that method's file does not hold is
    measured.

    Args:
        net: A network of :func:`QuantizedNetwork` with its FP32 weights loaded.
        dataset: Data set config; may be None for methods that need no images.
        to_input: See :class:`CalibrationImages`.
        seed: See there.
    """
    run = run_of(net)
    config = run.config.calibration or CalibrationConfig()
    follows = run.has_ranges
    looks = follows or needs_images(run.plan)
    if looks and dataset is None:
        raise QuantError(
            "the loaded checkpoint has no ranges and quant has no calibration data; add quant['calibration'] = "
            "dict(dataset=dict(type='BasicImageDataset', ...)), or load a quantized checkpoint"
        )
    start = time.time()
    same_on_all_ranks(net.state_dict())
    run.has_ranges = True  # methods try their ranges out before they are through
    images = CalibrationImages(config, dataset, to_input, seed) if looks and dataset is not None else ()
    stages = Stages()
    if follows:
        run.method.measure_start(net, images)
        same_on_all_ranks(net.state_dict())
        print_log('Measured on calibration images what the start does not hold.', logger='current')
        return
    seen = calibrate_network(net, run.plan, images, stages)
    run.seconds = stages.seconds
    device = next(net.parameters()).device
    scale = torch.tensor(seen.feature_scale, dtype=torch.float64, device=device)
    same_on_all_ranks({**net.state_dict(), 'feature scale': scale})
    run.calibration = {'feature_scale': float(scale), 'images': seen.images}
    if seen.choices:
        run.calibration['choices'] = seen.choices
    if run.method.chooses_bits:
        run.plan = plan_in_force(net, run.plan)
    source = f'on {seen.images} images of {folder_of(dataset)}' if images and dataset is not None else 'without images'
    print_log(
        f'Calibrated {len(quantizers(net))} quantizers (method {run.plan.method}) {source} in '
        f'{time.time() - start:.1f} s' + (f'; feature scale c = {float(scale):.4g}.' if looks else '.'),
        logger='current',
    )
    times = ', '.join(f'{name} {seconds:.1f} s' for name, seconds in run.seconds.items())
    print_log(f'Stages: {times or "none"}.', logger='current')
