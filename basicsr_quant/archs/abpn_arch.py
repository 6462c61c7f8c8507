"""ABPN, the anchor-based plain net (Du, Liu, Tang, Wu; Mobile AI 2021, arXiv 2105.09750)."""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional


@ARCH_REGISTRY.register()
class ABPN(nn.Module):
    """A plain chain of 3x3 convolutions that learns what is missing to the nearest-neighbour enlargement.

    ``clip(shuffle(f(x) + anchor(x)), 0, 1)``, where the anchor repeats each channel of x scale^2 times, so that the
    sum before the pixel shuffle is the network's residual over nearest-neighbour interpolation. The first convolution
    and the ``num_block`` after it have ``num_feat`` channels, then come two of 3 scale^2; all but the last are
    followed by a ReLU. With the defaults and scale 3 it has the paper's 42.5 K parameters. The paper works in 0-255,
    this in 0-1 as the host does.

    Args:
        num_in_ch: Channels of the image, in and out.
        num_feat: Channels of the features (paper: 28).
        num_block: Convolutions between the first and the last two (paper: 4).
        upscale: Up-scaling factor (paper: 3).
        clip: Clip the output to [0, 1], as the paper does.
    """

    def __init__(
        self, num_in_ch: int = 3, num_feat: int = 28, num_block: int = 4, upscale: int = 3, clip: bool = True
    ) -> None:
        super().__init__()
        self.upscale, self.clip = upscale, clip
        num_out = num_in_ch * upscale**2
        self.conv_first = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        self.body = nn.ModuleList(nn.Conv2d(num_feat, num_feat, 3, padding=1) for _ in range(num_block))
        self.conv_up = nn.Conv2d(num_feat, num_out, 3, padding=1)
        self.conv_last = nn.Conv2d(num_out, num_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in 0-1 to (N, C, scale H, scale W)."""
        anchor = x.repeat_interleave(self.upscale**2, dim=1)
        out = functional.relu(self.conv_first(x))
        for conv in self.body:
            out = functional.relu(conv(out))
        out = self.conv_last(functional.relu(self.conv_up(out)))
        out = functional.pixel_shuffle(out + anchor, self.upscale)
        return torch.clamp(out, 0.0, 1.0) if self.clip else out
