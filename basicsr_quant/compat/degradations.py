"""Mends of the degradations that RealESRNet and RealESRGAN synthesize."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch

from .patch import mark, marked


def filter_strided_images() -> bool:
    """Filter images of any memory layout: the host's ``filter2D`` views its input as contiguous, and on the CPU the
    resizing before it returns channels-last images."""
    from basicsr.utils import img_process_util

    host = img_process_util.filter2D
    if marked(host) or not _refuses_channels_last(host):
        return False

    @mark
    @functools.wraps(host)
    def filter2d(img: torch.Tensor, kernel: torch.Tensor) -> Any:
        return host(img.contiguous(), kernel)

    img_process_util.filter2D = filter2d
    for name in ('realesrnet_model', 'realesrgan_model'):
        importlib.import_module(f'basicsr.models.{name}').filter2D = filter2d  # type: ignore[attr-defined]
    return True


def _refuses_channels_last(filter2d: Any) -> bool:
    image = torch.zeros(2, 3, 6, 6).to(memory_format=torch.channels_last)
    try:
        filter2d(image, torch.zeros(1, 3, 3))
    except RuntimeError:
        return True
    return False


MENDS = (filter_strided_images,)
