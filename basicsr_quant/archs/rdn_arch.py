"""RDN: residual dense network."""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from ._blocks import PixelRange, shuffle_steps


class ResidualDenseBlock(nn.Module):
    """x + a 1x1 fusion of densely connected 3x3 convolutions with ReLU: each sees the outputs of all before it.

    Args:
        num_feat: Channels in and out (G0).
        growth: Channels that each convolution adds (G).
        num_layer: Convolutions (C).
    """

    def __init__(self, num_feat: int, growth: int, num_layer: int) -> None:
        super().__init__()
        sizes = [num_feat + i * growth for i in range(num_layer + 1)]
        self.convs = nn.ModuleList(nn.Conv2d(size, growth, 3, padding=1) for size in sizes[:-1])
        self.relu = nn.ReLU(inplace=True)
        self.fusion = nn.Conv2d(sizes[-1], num_feat, 1)

    def forward(self, x: Tensor) -> Tensor:
        collected = x
        for conv in self.convs:
            collected = torch.cat((collected, self.relu(conv(collected))), dim=1)
        return x + self.fusion(collected)


@ARCH_REGISTRY.register()
class RDN(nn.Module):
    """RDN (Zhang, Tian, Kong, Zhong, Fu, "Residual Dense Network for Image Super-Resolution", CVPR 2018).

    Images (N, C, H, W) in 0..1. Two shallow convolutions, residual dense blocks, a 1x1 and a 3x3 convolution over the
    outputs of all blocks with a skip from the first convolution, convolution and pixel shuffle for each factor, last
    convolution. Between up-sampler and last convolution there are ``growth`` channels, as in the authors' network.

    Args:
        num_in_ch, num_out_ch: Channels of input and output images.
        num_feat: Channels between the blocks (G0, 64).
        num_block: Residual dense blocks (D, 16 in the paper's final network).
        num_layer: Convolutions in a block (C, 8).
        growth: Channels that each convolution adds (G, 64).
        upscale: 2, 3 or 4.
        img_range: Pixel range inside the network; files of EDSR-PyTorch need 255, those of MMagic 1.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        num_block: int = 16,
        num_layer: int = 8,
        growth: int = 64,
        upscale: int = 4,
        img_range: float = 1.0,
    ) -> None:
        super().__init__()
        self.pixels = PixelRange(img_range, (0.0,))
        self.conv_first = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        self.conv_second = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.body = nn.ModuleList(ResidualDenseBlock(num_feat, growth, num_layer) for _ in range(num_block))
        self.fusion = nn.Conv2d(num_block * num_feat, num_feat, 1)
        self.conv_after_body = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        steps: list[nn.Module] = []
        size = num_feat
        for factor in shuffle_steps(upscale):
            steps += [nn.Conv2d(size, growth * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
            size = growth
        self.upsample = nn.Sequential(*steps)
        self.conv_last = nn.Conv2d(growth, num_out_ch, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.conv_first(self.pixels.enter(x))
        features, outputs = self.conv_second(first), []
        for block in self.body:
            features = block(features)
            outputs.append(features)
        features = self.conv_after_body(self.fusion(torch.cat(outputs, dim=1))) + first
        return self.pixels.leave(self.conv_last(self.upsample(features)))
