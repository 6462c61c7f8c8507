"""Ranges from observers alone: min-max, percentile, MSE. For calibration, and as baselines of training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Optional

from torch import Tensor, nn

from ..network.plan import LayerPlan
from ..quantizers import LearnedRange, Quantizer, SymmetricRange
from ..schema import option
from .base import METHODS, Method, RangeOptions

_OBSERVERS = ('minmax', 'percentile', 'mse', 'dobi')


@dataclass(frozen=True)
class ObservedOptions(RangeOptions):
    """Options of all three.

    Args:
        percentile: p of the (100 - p)-th and p-th percentile; left out,
            :func:`~basicsr_quant.quantizers.percentile_of` the bits: 99 up to 4 bits (ODM, AdaBM, which are about
            those), 99.9 at 6, 99.99 at 8, where clipping 1 % costs a decibel and more.
        w_init: Another observer for the weights, for example ``mse`` (OMSE) beside min-max activations; left out, they
            are observed as the activations are.
        learn: Train the ranges too (``basicsr train``); by default they stay as calibrated and only the network's
            weights adapt to them.
    """

    percentile: Optional[float] = option(None, low=50.0, high=100.0)  # type: ignore[assignment]  # noqa: UP045 (3.9)
    w_init: Optional[str] = option(None, choices=_OBSERVERS)  # noqa: UP045 (read at run time, Python 3.9)
    learn: bool = option(False)


@dataclass(frozen=True)
class MinMaxOptions(ObservedOptions):
    """``ema_minmax``: a moving average of the batches' extremes (decay 0.9, AdaBM) instead of the extremes of all."""

    init: str = option('minmax', choices=('minmax', 'ema_minmax'))


@dataclass(frozen=True)
class PercentileOptions(ObservedOptions):
    """The (100 - p)-th and p-th percentile, averaged over batches."""

    init: str = option('percentile', choices=('percentile',))


@dataclass(frozen=True)
class MSEOptions(ObservedOptions):
    """The range with the least squared reconstruction error; ``init: dobi`` finds it as 2DQuant does."""

    init: str = option('mse', choices=('mse', 'dobi'))


class ObservedRanges(Method):
    """Asymmetric activation ranges [l, u] and symmetric weight ranges [-u, u] from an observer.

    Default grid: integer zero point for activations, 2^b - 1 levels with zero for weights: what integer engines
    compute. With ``zero_point: float`` activations use the papers' grid [l, u] and weights 2^b levels.
    """

    default_zero_point = 'integer'
    takes_products = True

    def make_input(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        return LearnedRange(layer.a_bits, learn=self.options.learn, zero_point=self.zero_point)

    def make_weight(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        # With two bits a narrow range has three levels only; the papers' mid-rise grid keeps all four.
        narrow = self.zero_point == 'integer'
        return SymmetricRange(layer.w_bits, self.range_shape(module), learn=self.options.learn, narrow_range=narrow)

    def start_weight(self, quantizer: Any, weight: Tensor) -> None:
        init = self.options.w_init or self.options.init
        observer = self._observer_of(init, quantizer, symmetric=True, per_channel=self.per_channel)
        observer.update(weight)
        quantizer.set_range(*observer.range())


@METHODS.register('minmax')
class MinMax(ObservedRanges):
    """The extremes that calibration saw."""

    name = 'minmax'
    Options = MinMaxOptions


@METHODS.register('percentile')
class Percentile(ObservedRanges):
    """Percentiles that calibration saw."""

    name = 'percentile'
    Options = PercentileOptions


@METHODS.register('mse')
class MSE(ObservedRanges):
    """Least squared reconstruction error (OMSE)."""

    name = 'mse'
    Options = MSEOptions
