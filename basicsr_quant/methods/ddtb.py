"""DDTB: dynamic dual trainable bounds (Zhong et al., ECCV 2022)."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..network.calibration import Observations, regularizer_weight
from ..network.plan import LayerPlan, Plan
from ..network.stages import Stages
from ..network.surgery import quant_layers
from ..quantizers import GatedRange, LearnedRange, NetworkMeasure, Observer, PercentileBounds, Quantizer
from ..schema import option
from .base import METHODS, Method, RangeOptions, Training
from .extra_loss import with_loss
from .progress import WarmUp

logger = logging.getLogger('basicsr')


@dataclass(frozen=True)
class DDTBOptions(RangeOptions):
    """Options of DDTB; the defaults are the published code's.

    Args:
        percentile: Of the start of activation ranges, and of the current weight.
        range_lr: 5: the published 1e-2 beside 1e-4 for the network, over the width 20 of its initial bounds +-10.
        dynamic_ratio: Share of the layers that get a gate, rounded down: 0.3 for EDSR, 0.5 for RDN, 0.1 for SRResNet.
            0 leaves learned bounds alone, which are the same for every image and export.
        warm_up: Optimizer steps before gates come into force (four epochs of 1000).
        gate_weight: Weight of the loss that draws the logits of gates to 0 meanwhile, for a reconstruction loss in
            0-255.
    """

    range_lr: float = option(5.0, low=0.0)
    dynamic_ratio: float = option(0.3, low=0.0, high=1.0)
    warm_up: int = option(4000, low=0)
    gate_weight: float = option(1.0, low=0.0)


@METHODS.register('ddtb')
class DDTB(Method):
    r"""Learned bounds [l, u] of activations, in the layers that vary most times a gate's factors for each image.

    Activations: :class:`GatedRange`; l and u start from the mean 1st and 99th percentile. Weights: between the 1st and
    the 99th percentile of the current weight, :class:`PercentileBounds`. Both with an integer zero point. Gates go to
    the floor(``dynamic_ratio`` L) layers with the largest var(max x) + var(min x) over the calibration images; layers
    with a rule in ``quant.layers``, first and last layers and matrix products get none. In the first ``warm_up`` steps
    gates are not in force and the loss gains w / 255 times the mean over gates of mean(logits^2). Validation in between
    and files saved in between follow the same count of steps. The attention loss is that of ``quant.distill``.

    Deviations from the published code: bounds start from calibration at any number of bits (there at 2 bits only, 3
    and 4 bits keep +-10); statistics come from a calibration pass in place of the first epoch; gates learn whole and
    see one image at a time, see :class:`BoundGate`; ranges that do not hold zero are widened to hold it; bounds stay
    apart, and learn at a rate relative to their start; both convolutions of a block take a quantized input (the
    published EDSR leaves the first in floating point); the skip and the block's output stay in floating point, or have
    8 bits without gates with ``skip: quantized``, where that EDSR quantizes them as its layers.
    """

    name = 'ddtb'
    takes_products = True
    takes_skip = True
    is_static = False
    static_with = 'ddtb: {dynamic_ratio: 0}'
    Options = DDTBOptions
    default_zero_point = 'integer'
    zero_points = ('integer',)

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.is_static = self.options.dynamic_ratio == 0

    # -- quantizers ------------------------------------------------------------------------------------------------

    def make_measures(self, plan: Plan) -> dict[str, NetworkMeasure]:
        return {} if self.is_static else {'warm_up': WarmUp(self.options.warm_up)}

    def make_input(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        if not self.is_static and layer.has_base_bits and isinstance(module, (nn.Conv2d, nn.Linear)):
            last = isinstance(module, nn.Linear)
            channels = module.in_features if isinstance(module, nn.Linear) else module.in_channels
            return GatedRange(layer.a_bits, channels, layer.layer, last, zero_point='integer')
        return LearnedRange(layer.a_bits, zero_point='integer')

    def make_weight(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        return PercentileBounds(layer.w_bits, self.per_channel, self.options.percentile)

    # -- start -----------------------------------------------------------------------------------------------------

    def make_observer(self, name: str, quantizer: Quantizer) -> Observer:
        return ExtremesObserver(super().make_observer(name, quantizer))

    def calibrate(self, net: nn.Module, batches: Iterable[Tensor], stages: Stages | None = None) -> Observations:
        seen = super().calibrate(net, batches, stages)
        layers = {name: q for name, q in _gated(net).items() if name in seen.stds}
        spreads = {name: seen.observers[name].spread for name in layers}  # type: ignore[attr-defined]
        chosen = sorted(spreads, key=lambda name: -spreads[name])[: int(self.options.dynamic_ratio * len(spreads))]
        for name, quantizer in layers.items():
            quantizer.select(name in chosen)
        if chosen:
            seen.choices['gates'] = [name for name in layers if name in chosen]
            logger.info('DDTB: gates on %d of %d layers: %s.', len(chosen), len(layers), seen.choices['gates'])
            if seen.images < 2:
                logger.warning('DDTB: one image says nothing of how bounds vary; the first layers have the gates.')
        return seen

    # -- training --------------------------------------------------------------------------------------------------

    @property
    def leaves_parameters_unused(self) -> bool:
        return not self.is_static  # the gates of layers that were not selected

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer, feature_scale: float) -> Training:
        if self.is_static:
            return Training(net, optimizer)
        for quantizer in _gated(net).values():
            quantizer.apply_selection()  # the flags may have come from another rank
        return DDTBTraining(net, optimizer, self.options.gate_weight)


class ExtremesObserver(Observer):
    """Another observer's range, and how far the extremes vary from batch to batch.

    Args:
        inner: Gives the range.
    """

    def __init__(self, inner: Observer) -> None:
        super().__init__()
        self.inner = inner
        self._count = 0
        self._mean = self._squares = (0.0, 0.0)

    def update(self, x: Tensor) -> None:
        self.inner.update(x)
        self._count += 1
        extremes = tuple(float(bound) for bound in x.detach().aminmax())
        away = [e - m for e, m in zip(extremes, self._mean)]
        self._mean = tuple(m + d / self._count for m, d in zip(self._mean, away))  # type: ignore[assignment]
        squares = (s + d * (e - m) for s, d, e, m in zip(self._squares, away, extremes, self._mean))
        self._squares = tuple(squares)  # type: ignore[assignment]

    def range(self) -> tuple[Tensor, Tensor]:
        return self.inner.range()

    @property
    def spread(self) -> float:
        """var(max) + var(min) over the batches, DDTB's dynamic intensity."""
        return math.fsum(self._squares) / self._count


class DDTBTraining(Training):
    """Counts steps and, during the warm-up, draws the logits of gates to 0.

    Args:
        net: The bare quantized network.
        optimizer: Its optimizer; each step counts.
        weight: Of the loss, for a reconstruction loss in 0-255.
    """

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, weight: float) -> None:
        super().__init__(net, optimizer)
        self.weight = regularizer_weight(weight, scale=1.0)
        self.warm_up: Any = net.get_submodule('quant_measures.warm_up')
        self._figures: dict[str, Tensor] = {}
        net.register_forward_hook(self._add_gate_loss)

    def _add_gate_loss(self, net: Any, inputs: Any, output: Any) -> Any:
        context = net._quant_context
        if not (net.training and torch.is_grad_enabled() and context.gates):
            return None
        squares = torch.stack([logits.square().mean() for logits in context.gates.values()]).mean()
        loss = self.weight * (1 - context.read('warm_up')) * squares
        self._figures = {'l_gate': loss.detach(), 'gate': squares.detach().sqrt()}
        return with_loss(output, loss)

    def _after_step(self, *_: object) -> None:
        super()._after_step()
        self.warm_up.steps += 1

    def log(self) -> dict[str, float]:
        """``l_gate``, the weighted loss of the last pass, and ``gate``, the root mean square of its logits."""
        return {**super().log(), **{k: float(v) for k, v in self._figures.items()}}


def _gated(net: nn.Module) -> dict[str, GatedRange]:
    """By layer, selected or not."""
    found = {name: layer.input_quantizer for name, layer in quant_layers(net).items()}
    return {name: q for name, q in found.items() if isinstance(q, GatedRange)}
