"""Calibration images: from any BasicSR data set, in its own loader, the random states left as they were."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from ..config import CalibrationConfig
from ..errors import QuantError
from ..random_state import preserved, seeded
from .png_header import png_header

logger = logging.getLogger('basicsr')

_IMAGES = 100
_WHOLE_IMAGES = ('PairedImageDataset', 'SingleImageDataset')
_MULTIPLE = 8
"""Crops are cut to a multiple of this many pixels, so that networks with windows take them."""


def dataset_options(config: CalibrationConfig, train: Mapping[str, Any] | None, scale: int) -> dict[str, Any]:
    """The options of the data set that calibration reads.

    Args:
        config: The ``quant.calibration`` block.
        train: Options of the training set, which stands in where the block names no data set; None outside training.
        scale: Up-scaling factor of the network.

    Raises:
        QuantError: if there is no data set.
    """
    given = config.dataset if config.dataset is not None else train
    if given is None:
        raise QuantError(
            'quant.calibration.dataset is missing; name LQ images there, for example '
            '{type: SingleImageDataset, dataroot_lq: FOLDER, io_backend: {type: disk}}'
        )
    options = copy.deepcopy(dict(given))
    options.setdefault('type', 'PairedImageDataset' if 'dataroot_gt' in options else 'SingleImageDataset')
    if options['type'] in _WHOLE_IMAGES:
        if options['type'] == 'PairedImageDataset' and options.get('dataroot_gt') is None:
            options['type'] = 'SingleImageDataset'
        options['phase'] = 'val'
    else:
        options.setdefault('phase', 'train')
    options.setdefault('name', 'calibration')
    options.setdefault('io_backend', {'type': 'disk'})
    options.update(scale=scale, prefetch_mode=None)
    if options['phase'] == 'train':
        options.update(batch_size_per_gpu=1, num_worker_per_gpu=0)
    return options


class CalibrationImages:
    """LQ images (1, C, h, w) in the network's pixel range, centre crops of at most ``patch_size`` pixels a side.

    Its length is the number of images; each pass over it reads the same ones again, and holds one at a time. Images
    are read as the host reads every image: 16-bit files at their upper 8 bits, grayscale as three equal channels. An
    image smaller than ``patch_size`` is taken whole. The log says once where that was so.

    Args:
        config: Number of images and crop.
        options: From :func:`dataset_options`.
        to_lq: Turns a loader's batch into the network's input; a host model's ``feed_data`` may synthesize it.
        seed: What data sets that draw at random draw from.

    Raises:
        QuantError: if the data set is empty or has fewer images than asked for; later, if an image cannot be read.
    """

    def __init__(
        self, config: CalibrationConfig, options: dict[str, Any], to_lq: Callable[[Any], Tensor], seed: int
    ) -> None:
        from basicsr.data import build_dataset  # here, so that the rest of this file serves both hosts

        with preserved():
            self._dataset = build_dataset(options)
        self._count = number_of_images(config, len(self._dataset), options)
        self._patch, self._options, self._to_lq, self._seed = config.patch_size, options, to_lq, seed
        self._paths: list[Any] = list(getattr(self._dataset, 'paths', ()))
        self._told = False

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        from basicsr.data import build_dataloader

        with preserved():
            loader = build_dataloader(
                self._dataset, self._options, num_gpu=0, dist=False, sampler=None, seed=self._seed
            )
        batches, smaller = iter(()), 0
        for index in range(self._count):
            with seeded(self._seed, index):
                if index == 0:
                    batches = iter(loader)
                lq = self._to_lq(self._read(batches, index))
            smaller += min(lq.shape[-2:]) < self._patch
            yield centre_crop(lq, self._patch)
        if not self._told:
            self._tell(smaller)

    def _read(self, batches: Iterator[Any], index: int) -> Any:
        try:
            return next(batches)
        except (AttributeError, OSError, ValueError) as error:  # the host gives what it could not decode on as None
            path = self._path(index)
            raise QuantError(
                f'quant.calibration.dataset: image {path or index + 1} cannot be read ({type(error).__name__}); it is '
                'damaged or no image'
            ) from error

    def _path(self, index: int) -> str | None:
        if self._options['phase'] == 'train' or index >= len(self._paths):  # in random order
            return None
        path = self._paths[index]
        return str(path['lq_path'] if isinstance(path, Mapping) else path)

    def _tell(self, smaller: int) -> None:
        self._told = True
        headers = [png_header(path) for path in map(self._path, range(self._count)) if path is not None]
        deep = sum(header is not None and header.bits == 16 for header in headers)
        gray = sum(header is not None and header.is_gray for header in headers)
        for count, words in (
            (smaller, f'are smaller than quant.calibration.patch_size {self._patch} and were taken whole'),
            (deep, 'are 16-bit PNG and were read at their upper 8 bits, as BasicSR reads every image'),
            (gray, 'are grayscale and were read as three equal channels, as BasicSR reads every image'),
        ):
            if count:
                logger.info('Calibration: %d of %d images %s.', count, self._count, words)


def number_of_images(config: CalibrationConfig, there: int, options: Mapping[str, Any]) -> int:
    """How many of the ``there`` images of a data set calibration takes.

    Raises:
        QuantError: if it has fewer than ``quant.calibration.num_images`` asks for, or none.
    """
    if there < (config.num_images or 1):
        where = options.get('dataroot_lq', options.get('dataroot_gt'))
        asked = f'{config.num_images} given' if config.num_images else 'at least 1 needed'
        raise QuantError(f'quant.calibration.num_images: {asked}, but {where} holds {there} images')
    return config.num_images or min(there, _IMAGES)


def centre_crop(image: Tensor, size: int) -> Tensor:
    """The centre of (N, C, H, W): at most ``size`` pixels a side, whole windows of 8 where there is room; 0: all."""

    def span(length: int) -> slice:
        side = min(length, size or length)
        side -= side % _MULTIPLE if side >= _MULTIPLE else 0
        start = (length - side) // 2
        return slice(start, start + side)

    return image[..., span(image.shape[-2]), span(image.shape[-1])].contiguous()
