"""Options of AdaBM, and the schedules that they select."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Optional

from ..schema import option
from .adabm_tuning import GROUPS
from .base import RangeOptions


@dataclass(frozen=True)
class Schedule:
    """What a schedule says about the options that are not given, see :class:`AdaBMOptions`.

    ``cycle``: the groups that learn in turn, epoch by epoch.
    """

    init: str
    image_bits: bool
    sensitivity: str
    epochs: int
    images: Optional[int]  # noqa: UP045
    batch: int
    lr_w: float
    lr_a: float
    decay: float
    feature_weight: float
    cycle: tuple[tuple[str, ...], ...]


SCHEDULES = {
    'published': Schedule(
        init='ema_minmax',
        image_bits=True,
        sensitivity='std',
        epochs=10,
        images=None,
        batch=2,
        lr_w=0.01,
        lr_a=0.01,
        decay=0.9,
        feature_weight=10.0,
        cycle=tuple((name,) for name in GROUPS),
    ),
    'fast': Schedule(
        init='mse',
        image_bits=False,
        sensitivity='output',
        epochs=2,
        images=40,
        batch=2,
        lr_w=0.0067,
        lr_a=0.001,
        decay=0.5,
        feature_weight=0.0,
        cycle=(GROUPS[:2],),
    ),
}


@dataclass(frozen=True)
class AdaBMOptions(RangeOptions):
    """Options of AdaBM. Those that are None by default are given by the schedule.

    Args:
        schedule: ``published``: ten epochs of 50 steps, weight ranges, activation ranges and bit mappings in turn.
            ``fast``: ranges start at the least reconstruction error for each layer's own bits, a layer's bits follow
            from what they do to the output, and both kinds of ranges learn together for two epochs. It leaves out
            more than 40 images, eight epochs, the images' bits, the learning of the layers' bits, bit-aware clipping
            and the feature loss.
        images: The number of calibration images at most, evenly spread where there are more; by default all.
        init: Where activation ranges start: ``ema_minmax`` (AdaBM: extremes of batches of 16, moving average 0.9),
            ``minmax``, ``percentile`` or ``mse``. All but ``mse`` are clipped to the layer's bits afterwards. With
            ``mse`` weights too start at the least error; else at the best of AdaBM's 50 candidates.
        image_bits: Whether bits depend on the image too, or on the layer alone. They follow the detail of the image;
            at the same mean PSNR is higher without them, since the smooth images that lose a bit lose more decibels
            than the others gain.
        sensitivity: What a layer's bits follow: ``std``, the deviation of its input (AdaBM); ``output``, the error
            that a bit less or more makes in the network's output, at a mean of no more than the base bits, plain and
            weighted by MACs.
        epochs: Passes of fine-tuning over the images; 0 leaves calibration alone.
        batch: Images a step of fine-tuning (AdaBM: 2).
        lr_w, lr_a: Learning rates of weight and activation ranges, in units of each range's calibrated width. AdaBM's
            0.01 is absolute: about 1e-4 of an activation range of an EDSR whose features live in 0-255, one percent
            of those of EDSR-b8f64_x2, and 0.07 of a weight range at four bits; ``reference_compat: true`` takes it so.
        lr_image, lr_layer: Learning rates of the thresholds of complexity and of the layer factors.
        decay: What a group's rates are multiplied by after an epoch of its own.
        feature_weight, bit_weight: Weights of the feature loss and of the bit loss, beside an L1 loss in 0-255.
        image_percentile: p: images below the p-th percentile of complexity get a bit less, above the (100 - p)-th
            one more.
        layer_percentile: The same for layers by the deviation of their inputs.
        clip_blend: Share of the clipped range in the mean with the unclipped one.
        range_lr: As in :class:`RangeOptions`, for ``basicsr train``.
    """

    schedule: str = option('published', choices=tuple(SCHEDULES))
    init: Optional[str] = option(None, choices=('ema_minmax', 'minmax', 'percentile', 'mse'))  # type: ignore[assignment]  # noqa: UP045 (read at run time, 3.9)
    image_bits: Optional[bool] = option(None)  # noqa: UP045
    sensitivity: Optional[str] = option(None, choices=('std', 'output'))  # noqa: UP045
    images: Optional[int] = option(None, low=1)  # noqa: UP045
    epochs: Optional[int] = option(None, low=0)  # noqa: UP045
    batch: Optional[int] = option(None, low=1)  # noqa: UP045
    lr_w: Optional[float] = option(None, low=0.0)  # noqa: UP045
    lr_a: Optional[float] = option(None, low=0.0)  # noqa: UP045
    lr_image: float = option(0.1, low=0.0)
    lr_layer: float = option(0.01, low=0.0)
    decay: Optional[float] = option(None, low=0.0, high=1.0)  # noqa: UP045
    feature_weight: Optional[float] = option(None, low=0.0)  # noqa: UP045
    bit_weight: float = option(50.0, low=0.0)
    image_percentile: float = option(10.0, low=0.0, high=50.0)
    layer_percentile: float = option(30.0, low=0.0, high=50.0)
    clip_blend: float = option(0.5, low=0.0, high=1.0)

    def resolved(self) -> Schedule:
        """The schedule with the options that were given in place of its own."""
        schedule = SCHEDULES[self.schedule]
        given: dict[str, Any] = {k: v for k, v in asdict(self).items() if v is not None}
        return replace(schedule, **{f.name: given[f.name] for f in fields(schedule) if f.name in given})
