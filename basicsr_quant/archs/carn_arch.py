"""CARN and CARN-M: cascading residual networks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from ._blocks import PixelRange, shuffle_steps


class ResidualBlock(nn.Module):
    """ReLU(x + conv(ReLU(conv(x))))."""

    def __init__(self, num_feat: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.conv2 = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.conv2(self.relu(self.conv1(x))))


class EfficientResidualBlock(nn.Module):
    """CARN-M's block: two grouped 3x3 convolutions and a 1x1 convolution that mixes the groups."""

    def __init__(self, num_feat: int, groups: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_feat, num_feat, 3, padding=1, groups=groups)
        self.conv2 = nn.Conv2d(num_feat, num_feat, 3, padding=1, groups=groups)
        self.conv3 = nn.Conv2d(num_feat, num_feat, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.conv3(self.relu(self.conv2(self.relu(self.conv1(x))))))


class Fusion(nn.Module):
    """A 1x1 convolution with ReLU over everything that the cascade has made so far."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(num_in, num_out, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(x))


class Cascade(nn.Module):
    """Three blocks; behind each, its output joins all earlier ones and a 1x1 convolution fuses them.

    Used twice: of residual blocks inside a cascading block, and of cascading blocks in the network.

    Args:
        num_feat: Channels.
        blocks: Three blocks, or one that is run three times (CARN-M shares parameters so).
    """

    steps = 3

    def __init__(self, num_feat: int, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.fusions = nn.ModuleList(Fusion(num_feat * (i + 2), num_feat) for i in range(self.steps))

    def forward(self, x: Tensor) -> Tensor:
        collected = x
        for step, fusion in enumerate(self.fusions):
            block = self.blocks[step % len(self.blocks)]
            collected = torch.cat((collected, block(x)), dim=1)
            x = fusion(collected)
        return x


class _Cascading(nn.Module):
    """What CARN and CARN-M have in common."""

    def __init__(
        self,
        num_in_ch: int,
        num_out_ch: int,
        num_feat: int,
        upscale: int,
        rgb_mean: Sequence[float],
        cascades: Sequence[nn.Module],
        groups: int,
    ) -> None:
        super().__init__()
        self.upscale = upscale
        self.pixels = PixelRange(1.0, rgb_mean)
        self.conv_first = nn.Conv2d(num_in_ch, num_feat, 3, padding=1)
        self.body = Cascade(num_feat, cascades)
        steps: list[nn.Module] = []
        for factor in shuffle_steps(upscale):
            steps += [nn.Conv2d(num_feat, num_feat * factor**2, 3, padding=1, groups=groups)]
            steps += [nn.ReLU(inplace=True), nn.PixelShuffle(factor)]
        self.upsample = nn.Sequential(*steps)
        self.conv_last = nn.Conv2d(num_feat, num_out_ch, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        features = self.body(self.conv_first(self.pixels.enter(x)))
        return self.pixels.leave(self.conv_last(self.upsample(features)))


@ARCH_REGISTRY.register()
class CARN(_Cascading):
    """CARN (Ahn, Kang, Sohn, "Fast, Accurate, and Lightweight Super-Resolution with Cascading Residual Network",
    ECCV 2018), for one scale.

    Images (N, C, H, W) in 0..1. The authors train one network for all scales that differs in its up-sampler only;
    from such a file the branch of ``upscale`` is loaded.

    Args:
        num_in_ch, num_out_ch: Channels of input and output images.
        num_feat: Channels (64 in the paper).
        upscale: 2, 3 or 4.
        rgb_mean: Mean of the training images, taken off the input and added to the output (DIV2K's).
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        upscale: int = 4,
        rgb_mean: Sequence[float] = (0.4488, 0.4371, 0.4040),
    ) -> None:
        cascades = [Cascade(num_feat, [ResidualBlock(num_feat) for _ in range(Cascade.steps)]) for _ in range(3)]
        super().__init__(num_in_ch, num_out_ch, num_feat, upscale, rgb_mean, cascades, groups=1)


@ARCH_REGISTRY.register()
class CARNM(_Cascading):
    """CARN-M, the mobile CARN of the same paper: grouped convolutions, and one residual block in each cascading block
    that is run three times with the same parameters.

    Args:
        num_in_ch, num_out_ch, num_feat, upscale, rgb_mean: As in :class:`CARN`.
        groups: Groups of the 3x3 convolutions of blocks and up-sampler (4 in the paper).
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 64,
        upscale: int = 4,
        groups: int = 4,
        rgb_mean: Sequence[float] = (0.4488, 0.4371, 0.4040),
    ) -> None:
        cascades = [Cascade(num_feat, [EfficientResidualBlock(num_feat, groups)]) for _ in range(3)]
        super().__init__(num_in_ch, num_out_ch, num_feat, upscale, rgb_mean, cascades, groups)
