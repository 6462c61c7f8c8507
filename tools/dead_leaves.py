"""Drawn training images: opaque shapes of all sizes covering each other, as leaves on the ground do.

Few photographs hold few kinds of edges; this model of natural images (occlusion, sizes after a power law) supplies
them without anybody's photograph. Colours and textures come from the photographs given.
"""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]

OVERSAMPLE = 3
"""Shapes are drawn this many times larger and averaged down: their edges are as soft as a camera's."""


def _radius(rng: np.random.Generator, smallest: float, largest: float) -> float:
    """Draw a size whose density falls with its cube, which makes the image look alike at every scale."""
    a, b = smallest**-2, largest**-2
    return float((a + rng.random() * (b - a)) ** -0.5)


def _mask(rng: np.random.Generator, side: int, radius: float) -> Image:
    """Draw one ellipse, polygon, stroke or letter somewhere in a ``side`` x ``side`` mask."""
    mask: Image = np.zeros((side, side), np.uint8)
    centre = rng.uniform(0, side, 2)
    kind = rng.integers(4)
    if kind == 0:
        axes = np.maximum(radius * rng.uniform(0.4, 1.2, 2), 1).astype(int)
        cv2.ellipse(mask, centre.astype(int).tolist(), axes.tolist(), rng.uniform(0, 180), 0, 360, 255, -1)
    elif kind == 1:
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.integers(3, 7)))
        corners = centre + radius * rng.uniform(0.6, 1.3) * np.stack([np.cos(angles), np.sin(angles)], 1)
        cv2.fillPoly(mask, [corners.astype(np.int32)], 255)
    elif kind == 2:
        angle, length = rng.uniform(0, np.pi), radius * rng.uniform(3, 20)
        reach = length * np.array([np.cos(angle), np.sin(angle)])
        ends = [(centre - reach).astype(int).tolist(), (centre + reach).astype(int).tolist()]
        cv2.line(mask, ends[0], ends[1], 255, max(1, int(radius * rng.uniform(0.2, 0.6))))
    else:
        letters = ''.join(chr(c) for c in rng.integers(48, 91, rng.integers(1, 5)))
        place = centre.astype(int).tolist()
        cv2.putText(mask, letters, place, int(rng.integers(8)), radius / 15, 255, max(1, int(radius / 8)))
    return mask


def _fill(rng: np.random.Generator, photographs: list[Image], side: int) -> Image:
    """Return a ``side`` x ``side`` picture: a piece of a photograph, or one of its colours with a gentle slope."""
    photograph = photographs[rng.integers(len(photographs))]
    height, width = photograph.shape[:2]
    if rng.random() < 0.4:
        crop = int(min(height, width) * rng.uniform(0.3, 1))
        top, left = rng.integers(height - crop + 1), rng.integers(width - crop + 1)
        piece = photograph[top : top + crop, left : left + crop]
        return np.asarray(cv2.resize(piece, (side, side), interpolation=cv2.INTER_AREA), np.uint8)
    colour = photograph[rng.integers(height), rng.integers(width)].astype(np.float64)
    slope = np.linspace(-1, 1, side)
    ramp = rng.normal(0, 12) * slope[:, None] + rng.normal(0, 12) * slope[None, :]
    return np.clip(colour + ramp[..., None], 0, 255).astype(np.uint8)


def dead_leaves(rng: np.random.Generator, photographs: list[Image], size: int, leaves: int = 400) -> Image:
    """Draw one image.

    Args:
        rng: Source of everything random.
        photographs: Where colours and textures come from, BGR uint8.
        size: Height and width of the image in pixels.
        leaves: Number of shapes.

    Returns:
        BGR uint8 of shape (size, size, 3).
    """
    side = size * OVERSAMPLE
    fills = [_fill(rng, photographs, side) for _ in range(24)]
    image = fills[0].copy()
    for _ in range(leaves):
        inside = _mask(rng, side, _radius(rng, 3 * OVERSAMPLE, size * OVERSAMPLE / 3)).astype(bool)
        fill = fills[rng.integers(len(fills))]
        textured = rng.random() < 0.3
        image[inside] = fill[inside] if textured else fill[rng.integers(side), rng.integers(side)]
    return np.asarray(cv2.resize(image, (size, size), interpolation=cv2.INTER_AREA), np.uint8)
