"""What IMDN and RFDN have in common: everything but their blocks."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ._blocks import check_scale

SLOPE = 0.05
"""Of every leaky ReLU in these networks."""


class DistillationNetwork(nn.Module):
    """Blocks whose outputs are all concatenated, fused by a 1x1 convolution, refined and added to the first features;
    the last convolution is followed by one pixel shuffle.

    Args:
        num_in_ch, num_out_ch: Channels of input and output images.
        num_feat: Channels between the blocks.
        blocks: The blocks.
        upscale: 2, 3 or 4.
    """

    def __init__(
        self, num_in_ch: int, num_out_ch: int, num_feat: int, blocks: Iterable[nn.Module], upscale: int
    ) -> None:
        super().__init__()
        check_scale(upscale)
        self.conv_first = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        self.body = nn.ModuleList(blocks)
        self.fusion = nn.Conv2d(num_feat * len(self.body), num_feat, 1)
        self.act = nn.LeakyReLU(SLOPE, inplace=True)
        self.conv_after_body = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.conv_last = nn.Conv2d(num_feat, num_out_ch * upscale**2, 3, padding=1)
        self.pixel_shuffle = nn.PixelShuffle(upscale)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv_first(x)
        features, outputs = first, []
        for block in self.body:
            features = block(features)
            outputs.append(features)
        fused = self.act(self.fusion(torch.cat(outputs, dim=1)))
        return self.pixel_shuffle(self.conv_last(self.conv_after_body(fused) + first))  # type: ignore[no-any-return]
