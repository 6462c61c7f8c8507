"""Patch-wise inference: any network on square patches of an image, the outputs put together again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import QuantError


def patch_starts(length: int, size: int, stride: int) -> list[int]:
    """Where patches of ``size`` begin on a side of ``length`` pixels: every ``stride``, the last one at the end.

    The last patch is shifted back rather than cut short or stretched, so that all patches of an image have one size.

    >>> patch_starts(250, 96, 96), patch_starts(80, 96, 96)
    ([0, 96, 154], [0])
    """
    if length <= size:
        return [0]
    return [*range(0, length - size, stride), length - size]


def spans(length: int, size: int, stride: int) -> list[tuple[int, int, int]]:
    """For each patch of a side: its start, and the part [from, to) of the side that its output fills.

    Neighbours share their overlap half and half.

    >>> spans(250, 96, 90)
    [(0, 0, 93), (90, 93, 170), (154, 170, 250)]
    """
    starts = patch_starts(length, size, stride)
    cuts = [0, *((a + size + b) // 2 for a, b in zip(starts, starts[1:])), length]
    return list(zip(starts, cuts, cuts[1:]))


def overlap_factor(width: int, height: int, size: int, stride: int) -> float:
    """Pixels of all patches of an image over its own: what patch-wise inference costs of one pass over it.

    >>> overlap_factor(96, 96, 96, 90), overlap_factor(186, 96, 96, 90)
    (1.0, 1.032258064516129)
    """
    rows, columns = (len(patch_starts(side, size, stride)) * min(size, side) for side in (height, width))
    return rows * columns / (height * width)


class Patchwise(nn.Module):
    """Runs a network patch by patch.

    The output is seamless where the overlap, ``size - stride``, is at least twice the network's receptive radius;
    without overlap (AdaBM's 96, 96) each patch is padded at its own border. Bits that depend on the image are chosen
    for each patch.

    Args:
        net: Maps (N, C, H, W) to (N, C', kH, kW) for a whole k, alike for every H and W.
        size: Side of a patch in input pixels. Images with a shorter side keep that side whole.
        stride: Distance of neighbours, at most ``size``.
    """

    def __init__(self, net: nn.Module, size: int, stride: int) -> None:
        super().__init__()
        self.net, self.size, self.stride = net, size, stride

    def forward(self, image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        rows, columns = (spans(side, self.size, self.stride) for side in (height, width))
        if len(rows) == len(columns) == 1:
            return self.net(image)  # type: ignore[no-any-return]
        whole: Tensor | None = None
        for top, first_row, end_row in rows:
            for left, first_column, end_column in columns:
                part = self.net(image[..., top : top + self.size, left : left + self.size])
                k = _enlargement(part, image, self.size)
                if whole is None:
                    whole = torch.empty(*part.shape[:-2], height * k, width * k, dtype=part.dtype, device=part.device)
                own = part[
                    ...,
                    (first_row - top) * k : (end_row - top) * k,
                    (first_column - left) * k : (end_column - left) * k,
                ]
                whole[..., first_row * k : end_row * k, first_column * k : end_column * k] = own
        assert whole is not None
        return whole


def _enlargement(part: Tensor, image: Tensor, size: int) -> int:
    sides = [min(size, side) for side in image.shape[-2:]]
    k = part.shape[-1] // sides[1] if part.dim() == image.dim() else 0
    if k < 1 or list(part.shape[-2:]) != [side * k for side in sides]:
        raise QuantError(
            f'quant.patch: a patch of {sides[1]}x{sides[0]} gave an output of shape {tuple(part.shape)}, which is no '
            'image enlarged by a whole number; leave quant.patch out for this network'
        )
    return k
