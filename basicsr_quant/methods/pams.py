"""PAMS: parameterized max scale (Li et al., ECCV 2020)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..network.plan import LayerPlan
from ..quantizers import MaxAbsWeight, Quantizer, SymmetricRange
from ..schema import option
from .base import METHODS, Method, RangeOptions


@dataclass(frozen=True)
class PAMSOptions(RangeOptions):
    """``init: ema_minmax`` is the paper's: a moving average of max|x| (there with decay 0.9997 over an epoch)."""

    init: str = option('ema_minmax', choices=('ema_minmax', 'minmax', 'percentile', 'mse'))


@METHODS.register('pams')
class PAMS(Method):
    """Symmetric activations [-alpha, alpha] with alpha learned, weights by max|W| of the current weight.

    2^(b-1) - 1 levels a side, zero exact, for both; the gradient of alpha is the published code's, see
    :class:`SymmetricRange`.

    Deviations: alpha starts from a calibration pass instead of a first epoch without clipping; both convolutions of a
    block take a quantized input (the published EDSR leaves the first in floating point); the student starts from the
    network it is given. The distillation loss is a service of its own and off here.
    """

    name = 'pams'
    Options = PAMSOptions
    default_zero_point = 'integer'
    zero_points = ('integer',)

    def make_input(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        return SymmetricRange(layer.a_bits)

    def make_weight(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        return MaxAbsWeight(layer.w_bits, self.per_channel)

    def make_observer(self, name, quantizer):  # type: ignore[no-untyped-def]
        return self._observer(quantizer, symmetric=True)
