"""IMDN: information multi-distillation network."""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from ._distillation import SLOPE, DistillationNetwork


class ContrastAttention(nn.Module):
    """x * sigmoid(W2 ReLU(W1 (std + mean))): channel attention from each channel's contrast and mean.

    Args:
        num_feat: Channels.
        squeeze: Factor between them and the inner channels (16 in the paper).
    """

    def __init__(self, num_feat: int, squeeze: int = 16) -> None:
        super().__init__()
        self.conv_du = nn.Sequential(
            nn.Conv2d(num_feat, num_feat // squeeze, 1),
            nn.ReLU(inplace=True),
            nn.Conv2d(num_feat // squeeze, num_feat, 1),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        contrast = (x - mean).square().mean((2, 3), keepdim=True).sqrt()
        return x * self.conv_du(contrast + mean)


class IMDB(nn.Module):
    """Information multi-distillation block: three times a quarter of the channels is kept, the rest refined."""

    def __init__(self, num_feat: int) -> None:
        super().__init__()
        self.kept = num_feat // 4
        self.rest = num_feat - self.kept
        self.c1 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.c2 = nn.Conv2d(self.rest, num_feat, 3, padding=1)
        self.c3 = nn.Conv2d(self.rest, num_feat, 3, padding=1)
        self.c4 = nn.Conv2d(self.rest, self.kept, 3, padding=1)
        self.act = nn.LeakyReLU(SLOPE, inplace=True)
        self.cca = ContrastAttention(4 * self.kept)
        self.c5 = nn.Conv2d(4 * self.kept, num_feat, 1)

    def forward(self, x: Tensor) -> Tensor:
        kept, rest = [], x
        for conv in (self.c1, self.c2, self.c3):
            part, rest = torch.split(self.act(conv(rest)), [self.kept, self.rest], dim=1)
            kept.append(part)
        kept.append(self.c4(rest))
        return x + self.c5(self.cca(torch.cat(kept, dim=1)))


@ARCH_REGISTRY.register()
class IMDN(DistillationNetwork):
    """IMDN (Hui, Gao, Yang, Wang, "Lightweight Image Super-Resolution with Information Multi-distillation Network",
    ACM MM 2019).

    Images (N, C, H, W) in 0..1.

    Args:
        num_in_ch, num_out_ch: Channels of input and output images.
        num_feat: Channels between the blocks, a multiple of 16 (64 in the paper).
        num_block: Blocks (6 in the paper).
        upscale: 2, 3 or 4.
    """

    def __init__(
        self, num_in_ch: int = 3, num_out_ch: int = 3, num_feat: int = 64, num_block: int = 6, upscale: int = 4
    ) -> None:
        if num_feat % 16:
            raise ValueError(f'num_feat: {num_feat!r} given, a multiple of 16 needed')
        blocks = (IMDB(num_feat) for _ in range(num_block))
        super().__init__(num_in_ch, num_out_ch, num_feat, blocks, upscale)
