"""What export and bench need of BasicSR: a quantized network from an option file, images, and its PSNR."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from basicsr.data import build_dataset
from basicsr.metrics.psnr_ssim import calculate_psnr
from basicsr.utils import tensor2img
from torch import Tensor, nn

from ..config import CalibrationConfig, read_config
from ..data.calibration import CalibrationImages, dataset_options
from ..deploy.parity import ParityImage
from ..errors import QuantError
from ..methods import quantize
from ..network.plan import Plan
from ..network.trace import trace
from ..seam import import_components
from ..sparsity import read_sparsity
from . import checkpoint
from .preparation import build_float, choose_checkpoint

_SYNTHETIC = 3


def load_quantized(raw: Mapping[str, Any], asked: str | None, root: str) -> tuple[nn.Module, Plan, str]:
    """Build the network of an option file with its quantized checkpoint.

    Args:
        raw: The option file.
        asked: ``--checkpoint``; None takes what ``basicsr test`` takes.
        root: The working directory, root of ``experiments/``.

    Returns:
        The network in eval mode on the CPU, its plan, and the path of the checkpoint.

    Raises:
        QuantError: if there is no checkpoint, it has no ranges, or its plan is not the option file's.
    """
    for needed in ('name', 'network_g', 'quant'):
        if needed not in raw:
            raise QuantError(f'{needed} is missing in the option file; a quantized checkpoint is exported by it')
    import_components(raw.get('imports'))
    config = read_config(raw['quant'])
    net = build_float(raw['network_g'])
    plan = config.plan(net, trace(net), sparsity=read_sparsity(raw.get('sparsity')))
    experiment = os.path.join(root, 'experiments', raw['name'])
    options = {'path': {}, **raw}
    path, key, _ = choose_checkpoint(options, 'test', experiment, plan, False, asked)
    assert path is not None
    file = checkpoint.read_network_file(path)
    if file.plan is None:
        raise QuantError(f'{path} is an FP32 file and has no ranges; run `basicsr calibrate` or `basicsr train` first')
    checkpoint.compare_plans(file, plan)
    quantize(net, plan)
    checkpoint.load_state(net, file, key)
    return net.eval(), plan, path


def parity_images(
    raw: Mapping[str, Any], shape: tuple[int, ...], count: int, fixed: bool = False
) -> tuple[list[ParityImage], str]:
    """Up to ``count`` images: of the option file's test sets (with ground truth), or else of its calibration set, or
    else made up.

    Args:
        raw: The option file.
        shape: Input shape of the network; ``fixed``: images are cropped to just that.

    Returns:
        The images and a word on where they come from.
    """
    found: list[ParityImage] = []
    source = ''
    for key, options in (raw.get('datasets') or {}).items():
        if key.split('_')[0] in ('test', 'val') and not found:
            found, source = _of_set({**options, 'phase': 'val', 'scale': raw.get('scale', 1)}, count), options['name']
    if not found and isinstance(raw.get('quant'), Mapping) and raw['quant'].get('calibration'):
        images = calibration_images(raw)
        found = [ParityImage(f'calibration {i}', image) for i, image in enumerate(islice(images, count))]
        source = 'calibration images' if found else ''
    if not found:
        found, source = _made_up(shape), 'made-up images, no data set is named'
    if fixed:
        found = [ParityImage(item.name, _fit(item.image, shape), _truth(item, shape)) for item in found]
    return found, source


def calibration_images(raw: Mapping[str, Any]) -> Iterable[Tensor]:
    """The images (1, C, h, w) of ``quant.calibration``, or of its default on the training set; none without either."""
    config = read_config(raw['quant']).calibration or CalibrationConfig()
    train = (raw.get('datasets') or {}).get('train')
    if config.dataset is None and train is None:
        return ()
    options = dataset_options(config, train, raw.get('scale', 1))
    return CalibrationImages(config, options, lambda data: data['lq'], raw.get('manual_seed') or 0)


def test_sets(raw: Mapping[str, Any]) -> dict[str, list[ParityImage]]:
    """The images of every test set of an option file, by the set's name."""
    found = {}
    for key, options in (raw.get('datasets') or {}).items():
        if key.split('_')[0] in ('test', 'val'):
            found[options['name']] = _of_set({**options, 'phase': 'val', 'scale': raw.get('scale', 1)}, None)
    return found


def _of_set(options: dict[str, Any], count: int | None) -> list[ParityImage]:
    options.setdefault('type', 'PairedImageDataset')
    dataset = build_dataset(options)
    found = []
    for index in range(len(dataset) if count is None else min(count, len(dataset))):
        data = dataset[index]
        truth = tensor2img([data['gt']]) if 'gt' in data else None
        found.append(ParityImage(f'{options["name"]} {index}', data['lq'][None], truth))
    return found


def _made_up(shape: tuple[int, ...]) -> list[ParityImage]:
    """Smooth noise: neighbouring pixels of photographs are alike."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for index in range(_SYNTHETIC):
        coarse = torch.rand(1, shape[1], 12, 12, generator=generator)
        side = (max(shape[2], 64), max(shape[3], 64))
        image = nn.functional.interpolate(coarse, side, mode='bicubic', align_corners=False).clamp(0, 1)
        found.append(ParityImage(f'made-up {index}', (image * 255).round() / 255))
    return found


def _fit(image: Tensor, shape: tuple[int, ...]) -> Tensor:
    missing = [max(0, wanted - there) for wanted, there in zip(shape[2:], image.shape[2:])]
    image = nn.functional.pad(image, (0, missing[1], 0, missing[0]), mode='replicate')
    return image[..., : shape[2], : shape[3]].contiguous()


def _truth(item: ParityImage, shape: tuple[int, ...]) -> Any:
    """The ground truth, which :func:`psnr_of` crops as the output is; None for an image that :func:`_fit` pads."""
    return item.truth if all(there >= wanted for wanted, there in zip(shape[2:], item.image.shape[2:])) else None


def psnr_of(scale: int) -> Callable[[Tensor, Any], float]:
    """The PSNR of ``basicsr test``: Y channel, a border of ``scale`` pixels left out, output rounded to uint8."""

    def psnr(output: Tensor, truth: Any) -> float:
        image = tensor2img([output])
        truth = truth[: image.shape[0], : image.shape[1]]
        return float(calculate_psnr(image, truth, crop_border=scale, test_y_channel=image.ndim == 3))

    return psnr
