"""IDN: information distillation network."""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional

from ._blocks import check_scale


class DistillationBlock(nn.Module):
    """Enhancement unit of six 3x3 convolutions and a 1x1 compression unit, leaky ReLU behind each 3x3.

    Of what the first three convolutions give, 1/``slice`` of the channels is kept aside with the block's input; the
    other channels go through three more, and the sum of both is compressed.

    Args:
        num_feat: Channels in and out (D3 = 64).
        step: Difference in channels between neighbouring convolutions (d = 16).
        slice: The kept part is 1/slice (s = 4).
        groups: Groups of the second convolution of each three (4).
    """

    def __init__(self, num_feat: int, step: int, slice: int, groups: int) -> None:
        super().__init__()
        self.kept = num_feat // slice
        rest = num_feat - self.kept
        upper = (num_feat, num_feat - step, num_feat - 2 * step, num_feat)
        lower = (rest, num_feat, num_feat - step, num_feat + self.kept)
        self.upper, self.lower = (
            nn.ModuleList(
                nn.Conv2d(sizes[i], sizes[i + 1], 3, padding=1, groups=groups if i == 1 else 1) for i in range(3)
            )
            for sizes in (upper, lower)
        )
        self.compression = nn.Conv2d(num_feat + self.kept, num_feat, 1)
        self.act = nn.LeakyReLU(0.05, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        features = x
        for conv in self.upper:
            features = self.act(conv(features))
        features, kept = torch.split(features, [features.shape[1] - self.kept, self.kept], dim=1)
        for conv in self.lower:
            features = self.act(conv(features))
        return self.compression(features + torch.cat((x, kept), dim=1))


@ARCH_REGISTRY.register()
class IDN(nn.Module):
    """IDN (Hui, Wang, Gao, "Fast and Accurate Single Image Super-Resolution via Information Distillation Network",
    CVPR 2018).

    Images (N, C, H, W) in 0..1; the output is a 17x17 transposed convolution's plus the bicubically enlarged input.
    The paper trains on the Y channel; the quantization papers (CADyQ) on RGB, which is the default here. The grouped
    convolutions are the second of each three, as in CADyQ's network.

    Args:
        num_in_ch: Channels of the image; the output has as many.
        num_feat: Channels between the blocks (64 in the paper).
        num_block: Distillation blocks (4 in the paper).
        upscale: 2, 3 or 4.
        step, slice, groups: Of each block, see :class:`DistillationBlock` (16, 4, 4 in the paper).
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_feat: int = 64,
        num_block: int = 4,
        upscale: int = 4,
        step: int = 16,
        slice: int = 4,
        groups: int = 4,
    ) -> None:
        super().__init__()
        check_scale(upscale)
        self.upscale = upscale
        self.conv_first = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        self.conv_second = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.act = nn.LeakyReLU(0.05, inplace=True)
        self.body = nn.Sequential(*(DistillationBlock(num_feat, step, slice, groups) for _ in range(num_block)))
        self.deconv_last = nn.ConvTranspose2d(
            num_feat, num_in_ch, 17, stride=upscale, padding=8, output_padding=upscale - 1
        )

    def forward(self, x: Tensor) -> Tensor:
        features = self.act(self.conv_second(self.act(self.conv_first(x))))
        wide = functional.interpolate(x, scale_factor=self.upscale, mode='bicubic', align_corners=False)
        return wide + self.deconv_last(self.body(features))
