"""Choosing and augmenting the images that set ranges, by the FP32 network's outputs alone (CFQP)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

Range = tuple[float, float]


@dataclass(frozen=True)
class OutputStatistics:
    """What an output without clip looks like.

    Args:
        low, high: Its extremes.
        outside: Share of its values outside the image range.
        spread: Its standard deviation.
    """

    low: float
    high: float
    outside: float
    spread: float

    @classmethod
    def of(cls, output: Tensor, image_range: Range) -> OutputStatistics:
        """Measure an output (N, C, H, W)."""
        low, high = output.aminmax()
        outside = ((output < image_range[0]) | (output > image_range[1])).float().mean()
        return cls(float(low), float(high), float(outside), float(output.std(unbiased=False)))

    def overshoot(self, image_range: Range) -> float:
        """How far the output leaves the image range, 0 if it does not."""
        return max(image_range[0] - self.low, self.high - image_range[1], 0.0)

    def misses(self, image_range: Range) -> float:
        """The greater of the distances from its extremes to the ends of the image range."""
        return max(abs(self.low - image_range[0]), abs(self.high - image_range[1]))


@dataclass(frozen=True)
class Augmentation:
    """``gain * (a + (b - a) ((x - a) / (b - a))^gamma) + offset`` for x in [a, b], cut to [a, b], mirrored if ``flip``.

    Cut, because a network is fed images: what leaves their range is no input that it will ever see.
    """

    gain: float = 1.0
    offset: float = 0.0
    gamma: float = 1.0
    flip: bool = False

    def __call__(self, image: Tensor, image_range: Range) -> Tensor:
        low, high = image_range
        if self.gamma != 1.0:
            image = ((image - low) / (high - low)).clamp(0.0, 1.0) ** self.gamma * (high - low) + low
        if (self.gain, self.offset) != (1.0, 0.0):
            image = (self.gain * image + self.offset).clamp(low, high)
        return image.flip(-1) if self.flip else image

    def fitted(self, output: OutputStatistics, target: Range) -> Augmentation:
        """The same with intensities scaled so that an output between m and M would span [l, h] instead.

        Super-resolution networks follow affine changes of intensity nearly, f(g x + o) = g f(x) + o, so in closed form
        g = (h - l) / (M - m) and o = l - g m: a scaling about the value (l - g m) / (1 - g) that stays where it is.
        """
        gain = (target[1] - target[0]) / max(output.high - output.low, 1e-12)
        offset = target[0] - gain * output.low
        return Augmentation(gain * self.gain, gain * self.offset + offset, self.gamma, self.flip)


@dataclass(frozen=True)
class Representative:
    """An image as calibration could use it: which, how changed, and what the FP32 network makes of it."""

    image: int
    augmentation: Augmentation
    output: OutputStatistics

    def to_plain(self) -> dict[str, Any]:
        """Numbers and truth values only."""
        return {'image': self.image, **asdict(self.augmentation), 'low': self.output.low, 'high': self.output.high}


def candidates(
    index: int,
    image: Tensor,
    network: Callable[[Tensor], Tensor],
    image_range: Range,
    tolerance: float,
    *,
    starts: Sequence[Augmentation] = (Augmentation(),),
    steps: int = 8,
    max_gain: float = 2.0,
) -> list[Representative]:
    """What one image offers: itself, and itself scaled until the output's extremes meet the image range.

    The closed form of :meth:`Augmentation.fitted` is repeated on what the network then gives, up to ``steps`` times,
    because the network follows it only nearly.

    Args:
        index: Number of the image.
        image: Of shape (N, C, H, W).
        network: The FP32 network without clip.
        image_range: Of the image and of the output.
        tolerance: How far an output may leave the image range; a tenth of it from both ends is good enough a fit.
        starts: Augmentations that are fitted, beside the image as it is.
        steps: Most fits of each; 0 takes every start as it is.
        max_gain: No intensity is scaled by more than this, nor by less than its inverse.
    """
    found = []
    for start in starts:
        current = Representative(
            index, start, OutputStatistics.of(network(start(image, image_range)), image_range)
        )
        best = current
        found.append(current)
        for _ in range(steps):
            if current.output.misses(image_range) <= tolerance / 10:
                break
            augmentation = current.augmentation.fitted(current.output, image_range)
            if not 1.0 / max_gain <= augmentation.gain <= max_gain:
                break
            output = OutputStatistics.of(network(augmentation(image, image_range)), image_range)
            current = Representative(index, augmentation, output)
            if _rank(current, image_range, tolerance) < _rank(best, image_range, tolerance):
                best = current
        if best is not found[-1]:
            found.append(best)
    return found


def _rank(candidate: Representative, image_range: Range, tolerance: float) -> tuple[bool, float]:
    output = candidate.output
    return output.overshoot(image_range) > tolerance, output.misses(image_range)


def choose(found: Sequence[Representative], count: int, image_range: Range, tolerance: float) -> list[Representative]:
    """Pick at most ``count`` candidates whose outputs stay in the image range and together reach both of its ends.

    First the one whose extremes are nearest to both ends, then, where an end is still missed by more than
    ``tolerance``, the one nearest to it, then those with the widest spread, each image once while there are others.
    Where every candidate leaves the image range by more than ``tolerance``, the one that does so least is all.
    """
    fits = [c for c in found if c.output.overshoot(image_range) <= tolerance]
    if not fits:
        return [min(found, key=lambda c: c.output.overshoot(image_range))]
    picked = [min(fits, key=lambda c: c.output.misses(image_range))]
    for reach in (lambda c: c.output.low - image_range[0], lambda c: image_range[1] - c.output.high):
        nearest = min(fits, key=reach)
        if min(map(reach, picked)) > tolerance and nearest not in picked:
            picked.append(nearest)
    rest = sorted((c for c in fits if c not in picked), key=lambda c: -c.output.spread)
    while len(picked) < count and rest:
        times = [sum(p.image == c.image for p in picked) for c in rest]
        picked.append(rest.pop(times.index(min(times))))
    return picked[:count]


class RepresentativeImages(Sized, Iterable[Tensor]):
    """The chosen images, augmented, one at a time; can be gone through again."""

    def __init__(self, images: Iterable[Tensor], chosen: Sequence[Representative], image_range: Range) -> None:
        self._images, self._chosen, self._range = images, chosen, image_range

    def __len__(self) -> int:
        return len(self._chosen)

    def __iter__(self) -> Iterator[Tensor]:
        for index, image in enumerate(self._images):
            for candidate in self._chosen:
                if candidate.image == index:
                    yield candidate.augmentation(image, self._range)


def psnr(error: float, image_range: Range) -> float:
    """dB of a mean squared error against the width of the image range; infinite without error."""
    width = image_range[1] - image_range[0]
    return float(10 * torch.log10(torch.tensor(width**2 / error, dtype=torch.float64))) if error else float('inf')
