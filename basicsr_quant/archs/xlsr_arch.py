"""XLSR (Ayazoglu; Mobile AI 2021, arXiv 2105.10288)."""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional


class GBlock(nn.Module):
    """A 3x3 convolution in groups and a 1x1 convolution that mixes them, a ReLU after each."""

    def __init__(self, num_in: int, num_out: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_in, num_out, 3, padding=1, groups=groups)
        self.conv2 = nn.Conv2d(num_out, num_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.conv2(functional.relu(self.conv1(x))))


@ARCH_REGISTRY.register()
class XLSR(nn.Module):
    """Group-convolution blocks beside one shallow 3x3 branch, and a clipped ReLU as the last layer.

    The clipped ReLU, min(max(x, 0), 1), is the paper's means to survive uint8 quantization. With the defaults and
    scale 3 the network has the paper's 22 K parameters. The paper's text gives the blocks and their widths; where
    exactly each ReLU stands is our reading.

    Args:
        num_in_ch: Channels of the image, in and out.
        num_feat: Channels of the blocks (paper: 32).
        num_skip: Channels of the shallow branch (paper: 16).
        num_block: Group-convolution blocks (paper: 3).
        groups: Groups of their 3x3 convolutions (paper: 4).
        upscale: Up-scaling factor (paper: 3).
        clip: End in the clipped ReLU, as the paper does.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_feat: int = 32,
        num_skip: int = 16,
        num_block: int = 3,
        groups: int = 4,
        upscale: int = 3,
        clip: bool = True,
    ) -> None:
        super().__init__()
        self.conv_first = nn.ModuleList(nn.Conv2d(num_in_ch, num_feat // groups, 3, padding=1) for _ in range(groups))
        self.mix_first = nn.Conv2d(num_feat, num_feat, 1)
        self.conv_skip = nn.Conv2d(num_in_ch, num_skip, 3, padding=1)
        self.body = nn.Sequential(*(GBlock(num_feat, num_feat, groups) for _ in range(num_block)))
        self.conv_fuse = nn.Conv2d(num_feat + num_skip, num_feat, 1)
        self.conv_last = nn.Conv2d(num_feat, num_in_ch * upscale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(upscale)
        self.clipped_relu = nn.Hardtanh(0.0, 1.0) if clip else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) in 0-1 to (N, C, scale H, scale W)."""
        out = functional.relu(torch.cat([conv(x) for conv in self.conv_first], 1))
        out = self.body(functional.relu(self.mix_first(out)))
        out = functional.relu(self.conv_fuse(torch.cat([out, functional.relu(self.conv_skip(x))], 1)))
        return self.clipped_relu(self.shuffle(self.conv_last(out)))
