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
    """``init: ema_minmax`` is the paper's: a moving average of max|x| (there with decay 0.9997 over an epoch).

    Args:
        unsigned: Give inputs behind a ReLU the range [0, alpha] with all 2^b levels, where the symmetric one wastes
            half of its codes. Not in the paper; CADyQ's code has it as an option that is off.
    """

    init: str = option('ema_minmax', choices=('ema_minmax', 'minmax', 'percentile', 'mse', 'dobi'))
    unsigned: bool = option(False)


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
    takes_products = True
    Options = PAMSOptions
    default_zero_point = 'integer'
    zero_points = ('integer',)

    def make_input(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        return SymmetricRange(layer.a_bits, unsigned=self.options.unsigned and layer.rectified)

    def make_weight(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        return MaxAbsWeight(layer.w_bits, self.per_channel)

    def make_observer(self, name, quantizer):  # type: ignore[no-untyped-def]
        return self._observer(quantizer, symmetric=not quantizer.unsigned)
