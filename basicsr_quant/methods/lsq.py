"""LSQ: learned step size quantization (Esser et al., ICLR 2020)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..network.plan import LayerPlan
from ..quantizers import LearnedStep, MSEObserver, Observer, Quantizer
from ..schema import option
from .base import METHODS, Method, RangeOptions


@dataclass(frozen=True)
class LSQOptions(RangeOptions):
    """``init: lsq`` starts each step at 2 mean|x| / sqrt(Q_P), as the paper; the other choices as elsewhere.

    ``mse`` is the step with the least error on LSQ's own lopsided grid. ``mse_cover`` is a wider one: the grid reaches
    the symmetric range of least error on both sides. At two bits it is the better start for training.
    """

    init: str = option('lsq', choices=('lsq', 'mse', 'mse_cover', 'dobi', 'percentile', 'minmax'))


class _MeanMagnitude(Observer):
    """Mean of |x| over everything seen."""

    def __init__(self, per_channel: bool = False) -> None:
        super().__init__(per_channel)
        self._sum: Tensor | float = 0.0
        self._count = 0

    def update(self, x: Tensor) -> None:
        rows = self._rows(x)
        self._sum = self._sum + rows.abs().mean(dim=1)
        self._count += 1

    def range(self) -> tuple[Tensor, Tensor]:
        mean = self._sum / self._count
        return self._shaped(-mean, mean)  # type: ignore[operator, arg-type]


@METHODS.register('lsq')
class LSQ(Method):
    """Steps s of activations and weights learned with the network, see :class:`LearnedStep`.

    Inputs behind a ReLU take the unsigned grid 0 ... 2^b - 1, read from the network's structure; all other inputs and
    the weights the signed one.
    """

    name = 'lsq'
    takes_products = True
    Options = LSQOptions
    default_zero_point = 'integer'
    zero_points = ('integer',)

    def make_input(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        return LearnedStep(layer.a_bits, signed=not layer.rectified, batched=True)

    def make_weight(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        return LearnedStep(layer.w_bits, self.range_shape(module))

    def _observer(self, quantizer: Quantizer, symmetric: bool = False, per_channel: bool = False) -> Observer:
        if self.options.init == 'lsq':
            return _MeanMagnitude(per_channel)
        signed = isinstance(quantizer, LearnedStep) and quantizer.signed
        if self.options.init == 'mse_cover':
            return MSEObserver(per_channel, quantizer.num_bits, symmetric=signed)
        return super()._observer(quantizer, signed, per_channel)

    def start_input(self, quantizer: Any, observer: Observer) -> None:
        self._start(quantizer, observer)

    def start_weight(self, quantizer: Any, weight: Tensor) -> None:
        observer = self._observer(quantizer, symmetric=True, per_channel=self.per_channel)
        observer.update(weight)
        self._start(quantizer, observer)

    def _start(self, quantizer: LearnedStep, observer: Observer) -> None:
        lower, upper = observer.range()
        if self.options.init == 'lsq':
            quantizer.set_step(2 * upper / math.sqrt(quantizer.positive_steps))
        elif self.options.init in ('mse', 'dobi') and quantizer.signed:
            # The search aligned [-u, u] to LSQ's own lopsided grid: its step is the answer, not a step that covers u.
            quantizer.set_step((upper - lower) / (quantizer.negative_steps + quantizer.positive_steps))
        else:
            quantizer.set_range(lower, upper)
