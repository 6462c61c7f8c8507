"""RFDN: residual feature distillation network."""

from __future__ import annotations

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional

from ._blocks import PixelRange
from ._distillation import SLOPE, DistillationNetwork


class ESA(nn.Module):
    """Enhanced spatial attention: x * sigmoid of features seen at about a sixth of the size.

    Args:
        num_feat: Channels of the input; a quarter of them is used inside.
    """

    def __init__(self, num_feat: int) -> None:
        super().__init__()
        inner = num_feat // 4
        self.conv1 = nn.Conv2d(num_feat, inner, 1)
        self.conv_f = nn.Conv2d(inner, inner, 1)
        self.conv2 = nn.Conv2d(inner, inner, 3, stride=2)
        self.conv_max = nn.Conv2d(inner, inner, 3, padding=1)
        self.conv3 = nn.Conv2d(inner, inner, 3, padding=1)
        self.conv3_ = nn.Conv2d(inner, inner, 3, padding=1)
        self.conv4 = nn.Conv2d(inner, num_feat, 1)
        self.pool = nn.MaxPool2d(7, stride=3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        reduced = self.conv1(x)
        small = self.relu(self.conv_max(self.pool(self.conv2(reduced))))
        small = self.conv3_(self.relu(self.conv3(small)))
        wide = functional.interpolate(small, x.shape[2:], mode='bilinear', align_corners=False)
        return x * torch.sigmoid(self.conv4(wide + self.conv_f(reduced)))


class RFDB(nn.Module):
    """Residual feature distillation block: three times, half of the channels is distilled by a 1x1 convolution and
    all are refined by a 3x3 convolution with a skip; then a last 3x3, fusion and spatial attention."""

    def __init__(self, num_feat: int) -> None:
        super().__init__()
        distilled = num_feat // 2
        self.c1_d = nn.Conv2d(num_feat, distilled, 1)
        self.c1_r = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.c2_d = nn.Conv2d(num_feat, distilled, 1)
        self.c2_r = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.c3_d = nn.Conv2d(num_feat, distilled, 1)
        self.c3_r = nn.Conv2d(num_feat, num_feat, 3, padding=1)
        self.c4 = nn.Conv2d(num_feat, distilled, 3, padding=1)
        self.act = nn.LeakyReLU(SLOPE, inplace=True)
        self.c5 = nn.Conv2d(4 * distilled, num_feat, 1)
        self.esa = ESA(num_feat)

    def forward(self, x: Tensor) -> Tensor:
        distilled = []
        for distill, refine in ((self.c1_d, self.c1_r), (self.c2_d, self.c2_r), (self.c3_d, self.c3_r)):
            distilled.append(self.act(distill(x)))
            x = self.act(refine(x) + x)
        distilled.append(self.act(self.c4(x)))
        return self.esa(self.c5(torch.cat(distilled, dim=1)))


@ARCH_REGISTRY.register()
class RFDN(DistillationNetwork):
    """RFDN (Liu, Tang, Wu, "Residual Feature Distillation Network for Lightweight Image Super-Resolution",
    ECCV workshops 2020), winner of the AIM 2020 challenge on efficient super-resolution and a baseline of NTIRE's.

    Images (N, C, H, W) in 0..1, of at least 15 pixels a side (spatial attention pools windows of 7 at half the size).

    Args:
        num_in_ch, num_out_ch: Channels of input and output images.
        num_feat: Channels between the blocks (50 in the challenge's network).
        num_block: Blocks (4 in the challenge's network).
        upscale: 2, 3 or 4.
        img_range: Pixel range inside the network; the challenge's files need 255.
    """

    def __init__(
        self,
        num_in_ch: int = 3,
        num_out_ch: int = 3,
        num_feat: int = 50,
        num_block: int = 4,
        upscale: int = 4,
        img_range: float = 255.0,
    ) -> None:
        blocks = (RFDB(num_feat) for _ in range(num_block))
        super().__init__(num_in_ch, num_out_ch, num_feat, blocks, upscale)
        self.pixels = PixelRange(img_range, (0.0,))

    def forward(self, x: Tensor) -> Tensor:
        return self.pixels.leave(super().forward(self.pixels.enter(x)))  # type: ignore[no-any-return]
