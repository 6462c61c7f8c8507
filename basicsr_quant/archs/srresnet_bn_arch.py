"""SRResNet with batch normalization, as its paper defines it."""

from __future__ import annotations

from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn

from ._blocks import shuffle_steps


class ResidualBlockBN(nn.Module):
    """x + BN(conv(PReLU(BN(conv(x))))), both convolutions 3x3; a bias before a normalization would be idle."""

    def __init__(self, num_feat: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(num_feat, num_feat, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(num_feat)
        self.prelu = nn.PReLU(num_feat)
        self.conv2 = nn.Conv2d(num_feat, num_feat, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(num_feat)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bn2(self.conv2(self.prelu(self.bn1(self.conv1(x)))))


@ARCH_REGISTRY.register()
class SRResNetBN(nn.Module):
    """SRResNet (Ledig et al., "Photo-Realistic Single Image Super-Resolution Using a GAN", CVPR 2017).

    9x9 convolution and PReLU, residual blocks with batch normalization, convolution and normalization with a skip,
    convolution + pixel shuffle + PReLU for each factor 2, 9x9 convolution. Images (N, C, H, W) in 0..1; as in the
    paper the last layer gives y in -1..1, and the output is (y + 1) / 2. BasicSR's ``MSRResNet`` is a modified SRResNet
    without normalization.

    Args:
        num_in_ch, num_out_ch: Channels of input and output images.
        num_feat: Channels between the blocks (64 in the paper).
        num_block: Residual blocks (16 in the paper).
        upscale: 2, 3 or 4; 4 in the paper.
    """

    def __init__(
        self, num_in_ch: int = 3, num_out_ch: int = 3, num_feat: int = 64, num_block: int = 16, upscale: int = 4
    ) -> None:
        super().__init__()
        self.conv_first = nn.Conv2d(num_in_ch, num_feat, 9, padding=4)
        self.prelu_first = nn.PReLU(num_feat)
        self.body = nn.Sequential(*(ResidualBlockBN(num_feat) for _ in range(num_block)))
        self.conv_after_body = nn.Conv2d(num_feat, num_feat, 3, padding=1, bias=False)
        self.bn_after_body = nn.BatchNorm2d(num_feat)
        steps: list[nn.Module] = []
        for factor in shuffle_steps(upscale):
            steps += [nn.Conv2d(num_feat, num_feat * factor**2, 3, padding=1), nn.PixelShuffle(factor)]
            steps += [nn.PReLU(num_feat)]
        self.upsample = nn.Sequential(*steps)
        self.conv_last = nn.Conv2d(num_feat, num_out_ch, 9, padding=4)

    def forward(self, x: Tensor) -> Tensor:
        first = self.prelu_first(self.conv_first(x))
        features = first + self.bn_after_body(self.conv_after_body(self.body(first)))
        return (self.conv_last(self.upsample(features)) + 1) / 2
