"""Parts that several of the registered networks share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

SCALES = (2, 3, 4)


def check_scale(upscale: int) -> None:
    """Refuse a factor that the up-samplers do not have.

    Raises:
        ValueError: the host's builder reports it with the name of the network.
    """
    if upscale not in SCALES:
        raise ValueError(f'upscale: {upscale!r} given, allowed: {", ".join(map(str, SCALES))}')


def shuffle_steps(upscale: int) -> list[int]:
    """The factors of the pixel shuffles that make ``upscale`` (2, 3 or 4): 4 is two times 2."""
    check_scale(upscale)
    return [2, 2] if upscale == 4 else [upscale]


class PixelRange(nn.Module):
    """Between images of range 0..1 and the values that a network works on: (x - mean) * img_range and back.

    Args:
        img_range: 1 for networks that live in 0..1, 255 for those that live in 0..255.
        rgb_mean: Mean of each input channel in 0..1; taken off before and added back after.
    """

    mean: Tensor

    def __init__(self, img_range: float = 1.0, rgb_mean: Sequence[float] = (0.0, 0.0, 0.0)) -> None:
        super().__init__()
        self.img_range = img_range
        self.register_buffer('mean', torch.tensor(list(rgb_mean)).view(1, -1, 1, 1), persistent=False)

    def enter(self, x: Tensor) -> Tensor:
        """From 0..1 to the network's values."""
        return (x - self.mean) * self.img_range

    def leave(self, x: Tensor) -> Tensor:
        """From the network's values to 0..1."""
        return x / self.img_range + self.mean
