"""Up-scaling in tiles: memory bounded by the tile, no seams where the overlap covers what a pixel depends on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from ..errors import QuantError

Span = tuple[slice, slice]
"""Where a tile lies on a side of the image, and where its window does."""


@dataclass(frozen=True)
class Tiling:
    """How an image is cut.

    Args:
        tile: Largest side of a tile in input pixels, without its overlap.
        overlap: Pixels that a tile sees beyond its own edge, on each side. The result is that of the whole image where
            it is at least the network's receptive field to one side (EDSR with 16 blocks: 38 pixels); below that the
            difference is small, since far pixels count little.
        fixed: Height and width of the only input that a file takes, or None.
        batch: Tiles that the network is given at once, of one row.
    """

    tile: int = 256
    overlap: int = 16
    fixed: tuple[int, int] | None = None
    batch: int = 1

    def window(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of what the network is given for each tile."""
        return self._sides(0, height)[0], self._sides(1, width)[0]

    def work(self, height: int, width: int) -> int:
        """Pixels that the network is given for an image, overlaps included."""
        window = self.window(height, width)
        return window[0] * window[1] * sum(len(columns) for _, columns in self.rows(height, width))

    def rows(self, height: int, width: int) -> list[tuple[Span, list[Span]]]:
        """Rows of tiles, each with its columns: where a tile lies in the image, and where its window does.

        Windows are all of one size; at the edge of the image they are moved inwards, so that nothing but the image is
        seen.
        """
        rows, columns = (
            list(_spans(length, *self._sides(axis, length))) for axis, length in enumerate((height, width))
        )
        return [(row, columns) for row in rows]

    def _sides(self, axis: int, length: int) -> tuple[int, int]:
        """Sides of a window and of a tile, the tiles of an image as even as they go."""
        if self.fixed is not None:
            side = self.fixed[axis]
            return side, max(1, side - 2 * self.overlap) if side < length else length
        if length <= self.tile + 2 * self.overlap:
            return length, length
        step = -(-length // -(-length // self.tile))
        return step + 2 * self.overlap, step


def _spans(length: int, side: int, step: int) -> Iterator[Span]:
    """Tiles of ``step`` pixels within windows of ``side``."""
    for start in range(0, length, step):
        stop = min(start + step, length)
        first = max(0, min(start - (side - step) // 2, length - side))
        yield slice(start, stop), slice(first, min(first + side, length))


def upscale(
    run: Callable[[Tensor], Tensor],
    image: np.ndarray,
    scale: int,
    tiling: Tiling,
    done: Callable[[int], object] = lambda pixels: None,
) -> Iterator[np.ndarray]:
    """Up-scale an image tile by tile, from top to bottom.

    Args:
        run: The network, (N, C, h, w) float32 in 0-1 to (N, C, h scale, w scale), N up to ``tiling.batch``.
        image: (H, W, C), uint8 or uint16. It is held whole; of the result one row of tiles is, in floating point one
            batch.
        scale: Up-scaling factor.
        tiling: How it is cut.
        done: Called after each batch with the pixels that the network was given.

    Yields:
        Bands of the result, (h scale, W scale, C) of the image's type.

    Raises:
        QuantError: if the network's output is not ``scale`` times as large as its input.
    """
    height, width, channels = image.shape
    window = tiling.window(height, width)
    for (own_y, seen_y), columns in tiling.rows(height, width):
        band = np.empty(((own_y.stop - own_y.start) * scale, width * scale, channels), image.dtype)
        for start in range(0, len(columns), tiling.batch):
            part = columns[start : start + tiling.batch]
            output = run(_batch(image, [(seen_y, seen) for _, seen in part], window))
            if tuple(output.shape[-2:]) != (window[0] * scale, window[1] * scale):
                raise QuantError(
                    f'the network makes {output.shape[-1]}x{output.shape[-2]} of {window[1]}x{window[0]} pixels, not '
                    f'{scale} times as many each way'
                )
            rows = _within(own_y, seen_y, scale)
            for result, (own, seen) in zip(output, part):
                piece = _pixels(result[:, rows, _within(own, seen, scale)], image.dtype)
                band[:, own.start * scale : own.stop * scale] = piece
            done(len(part) * window[0] * window[1])
        yield band


def _batch(image: np.ndarray, windows: list[tuple[slice, slice]], size: tuple[int, int]) -> Tensor:
    """Windows of an image as the network's input; smaller ones than ``size`` (a file for one size) are padded."""
    levels = np.float32(np.iinfo(image.dtype).max)
    pieces = np.stack([image[window].transpose(2, 0, 1) for window in windows]).astype(np.float32) / levels
    given = torch.from_numpy(pieces)
    missing = [wanted - there for wanted, there in zip(size, given.shape[-2:])]
    return functional.pad(given, (0, missing[1], 0, missing[0]), mode='replicate') if any(missing) else given


def _within(own: slice, seen: slice, scale: int) -> slice:
    return slice((own.start - seen.start) * scale, (own.stop - seen.start) * scale)


def _pixels(output: Tensor, dtype: np.dtype) -> np.ndarray:
    levels = np.iinfo(dtype).max
    values = (output.float() * levels).clamp_(0, levels).round_()
    return values.permute(1, 2, 0).numpy().astype(dtype)
