"""Up-scaling in tiles: memory bounded by the tile, no seams where the overlap covers what a pixel depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import QuantError

Window = tuple[slice, slice]


@dataclass(frozen=True)
class Tiling:
    """How an image is cut.

    Args:
        tile: Side of a tile in input pixels, without its overlap.
        overlap: Pixels that a tile sees beyond its own edge, on each side. The result is that of the whole image where
            it is at least the network's receptive field to one side (EDSR with 16 blocks: 38 pixels); below that the
            difference is small, since far pixels count little.
        fixed: Height and width of the only input that a file takes, or None.
    """

    tile: int = 256
    overlap: int = 16
    fixed: tuple[int, int] | None = None

    def window(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what the network is given for each tile."""
        if self.fixed is not None:
            return self.fixed
        side = self.tile + 2 * self.overlap
        return min(side, height), min(side, width)


def count(height: int, width: int, tiling: Tiling) -> int:
    """Number of tiles of an image."""
    return sum(1 for _ in _windows(height, width, tiling))


def _windows(height: int, width: int, tiling: Tiling) -> Iterator[tuple[Window, Window]]:
    """For each tile: where it lies in the image, and where its window does. Windows are all of one size; at the edge
    of the image they are moved inwards, so that nothing but the image is seen."""
    window = tiling.window(height, width)
    spans = []
    for length, side in zip((height, width), window):
        step = max(1, side - 2 * tiling.overlap) if side < length else length
        spans.append(list(_spans(length, side, step)))
    for own_y, seen_y in spans[0]:
        for own_x, seen_x in spans[1]:
            yield (own_y, own_x), (seen_y, seen_x)


def _spans(length: int, side: int, step: int) -> Iterator[tuple[slice, slice]]:
    for start in range(0, length, step):
        stop = min(start + step, length)
        first = max(0, min(start - (side - step) // 2, length - side))
        yield slice(start, stop), slice(first, min(first + side, length))


def upscale(
    run: Callable[[Tensor], Tensor],
    image: np.ndarray,
    scale: int,
    tiling: Tiling,
    done: Callable[[], object] = lambda: None,
) -> np.ndarray:
    """Up-scale an image tile by tile.

    Args:
        run: The network, (1, C, h, w) float32 in 0-1 to (1, C, h scale, w scale).
        image: (H, W, C), uint8 or uint16. It and the result are held whole; floating point is held for one tile.
        scale: Up-scaling factor.
        tiling: How it is cut.
        done: Called after each tile.

    Returns:
        (H scale, W scale, C) of the same type.

    Raises:
        QuantError: if the network's output is not ``scale`` times as large as its input.
    """
    height, width, channels = image.shape
    levels = np.iinfo(image.dtype).max
    result = np.empty((height * scale, width * scale, channels), image.dtype)
    side_y, side_x = tiling.window(height, width)
    for own, seen in _windows(height, width, tiling):
        piece = np.ascontiguousarray(image[seen].transpose(2, 0, 1)).astype(np.float32) / np.float32(levels)
        given = torch.from_numpy(piece)[None]
        there = given.shape[-2:]
        if there != (side_y, side_x):  # a file for one size, and an image that is smaller
            given = functional.pad(given, (0, side_x - there[1], 0, side_y - there[0]), mode='replicate')
        output = run(given)
        if tuple(output.shape[-2:]) != (side_y * scale, side_x * scale):
            raise QuantError(
                f'the network makes {output.shape[-1]}x{output.shape[-2]} of {side_x}x{side_y} pixels, not '
                f'{scale} times as many each way'
            )
        core = [slice((o.start - s.start) * scale, (o.stop - s.start) * scale) for o, s in zip(own, seen)]
        values = (output[0, :, core[0], core[1]].float() * levels).clamp_(0, levels).round_()
        target = tuple(slice(o.start * scale, o.stop * scale) for o in own)
        result[target] = values.permute(1, 2, 0).numpy().astype(image.dtype)
        done()
    return result
