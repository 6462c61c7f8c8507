"""AdaBM's image-to-bit mapping: how much detail an image has, and one bit more or less for it."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .context import NetworkMeasure

_GRAY = (0.299, 0.587, 0.114)
_LEAST_GAP = 1e-3


def image_gradients(images: Tensor) -> Tensor:
    """1000 mean |Sobel_x| and 1000 mean |Sobel_y| of the gray image, means over its pixels.

    Our reading of what the publications leave open: gray = 0.299 R + 0.587 G + 0.114 B, Sobel kernels
    [1 2 1] x [-1 0 1] divided by 8 (so that a ramp gives its rise per pixel), borders repeated. Images of other than
    three channels are averaged over their channels.

    Args:
        images: (N, C, H, W) in 0-1, the network's input; clips (N, T, C, H, W) are averaged over their frames.

    Returns:
        (N, 2), along the width and along the height; without gradient.
    """
    frames = images.detach().flatten(0, -4).float()
    if frames.shape[1] == len(_GRAY):
        gray = (frames * frames.new_tensor(_GRAY).reshape(1, -1, 1, 1)).sum(1, keepdim=True)
    else:
        gray = frames.mean(1, keepdim=True)
    gray = functional.pad(gray, (1, 1, 1, 1), mode='replicate')
    wide, high = gray[..., 2:] - gray[..., :-2], gray[..., 2:, :] - gray[..., :-2, :]
    wide = wide[..., :-2, :] + 2 * wide[..., 1:-1, :] + wide[..., 2:, :]
    high = high[..., :-2] + 2 * high[..., 1:-1] + high[..., 2:]
    slopes = torch.stack([wide.abs().mean((1, 2, 3)), high.abs().mean((1, 2, 3))], dim=1) / 8
    return 1e3 * slopes.reshape(len(images), -1, 2).mean(1)


def complexity(images: Tensor) -> Tensor:
    """c(I) = 1000 mean(|Sobel_x|, |Sobel_y|) of the gray image (AdaBM): the mean of :func:`image_gradients`.

    Args:
        images: As there.

    Returns:
        (N,), 0 for a constant image; about 10 to 60 for photographs.

    >>> ramp = torch.arange(8.0).expand(1, 1, 8, 8) / 8  # rises by 1/8 a pixel, by half of that at its two borders
    >>> complexity(ramp)
    tensor([54.6875])
    """
    return image_gradients(images).mean(1)


class ImageBits(NetworkMeasure):
    r"""b_I of each image: -1 below the lower threshold l of :func:`complexity`, +1 above the upper one u, else 0.

    Backward, in place of the steps: tanh((c - (u + l) / 2) 2 / (u - l)), so that l and u learn.

    State: ``lower``, ``upper`` (0-dim), one pair for the whole network. They want no gradient unless a method asks.
    """

    def __init__(self) -> None:
        super().__init__()
        # Every image lies between them until calibration has seen some.
        self.lower = nn.Parameter(torch.tensor(0.0), requires_grad=False)
        self.upper = nn.Parameter(torch.tensor(1e3), requires_grad=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.from_complexity(complexity(images))

    def from_complexity(self, found: Tensor) -> Tensor:
        """b_I of images whose complexity (N,) is known."""
        hard = (found > self.upper).to(found.dtype) - (found < self.lower).to(found.dtype)
        if not (torch.is_grad_enabled() and (self.lower.requires_grad or self.upper.requires_grad)):
            return hard
        middle, half = (self.upper + self.lower) / 2, (self.upper - self.lower) / 2
        soft = torch.tanh((found - middle) / half)
        return soft + (hard - soft).detach()

    @torch.no_grad()
    def set_thresholds(self, lower: Tensor, upper: Tensor) -> None:
        self.lower.copy_(lower)
        self.upper.copy_(upper)
        self.keep_order()

    @torch.no_grad()
    def keep_order(self) -> None:
        """Keep u above l: thresholds that crossed would turn the mapping round."""
        self.upper.copy_(torch.maximum(self.upper, self.lower + _LEAST_GAP))
