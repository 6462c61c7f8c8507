"""ODM: overcoming distribution mismatch (Hong and Lee; ECCV 2024, and its first version of 2023)."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..network.calibration import Observations, observe, regularizer_weight
from ..network.plan import LayerPlan
from ..network.stages import Stages
from ..network.surgery import quant_layers
from ..quantizers import LearnedRange, MSEObserver, OffsetRange, PercentileWeight, Quantizer, SymmetricRange
from ..schema import option
from .base import METHODS, Method, RangeOptions, Training
from .cooperative import CooperativeTraining, deviation, mismatch

logger = logging.getLogger('basicsr')


@dataclass(frozen=True)
class ODMOptions(RangeOptions):
    """Options of ODM; every mix is legal.

    Args:
        regularizer: ``mismatch`` (2024), ``variance`` (2023), ``none``: plain learned ranges.
        gate: ``cosine`` (2024), ``sign`` (2023), ``none``: the naive sum of both losses.
        granularity: What the cosine is taken over: ``element``, ``tensor``, ``global``. The paper leaves it open.
        weight_clipping: The weight-clipping correction, gamma times a percentile of the current weight; false learns
            the weight bound itself.
        offsets: Per-channel shift and scale on the layers with the most mismatch (2023).
        offsets_ratio: Share of the layers that get a shift, and that get a scale.
        mismatch_weight: lambda as published, for features and losses in 0-255; converted to the network at hand,
            see :func:`regularizer_weight`. 1e-5 in the paper, 1e-6 for RDN.
        detach_target: See :func:`mismatch`.
    """

    regularizer: str = option('mismatch', choices=('mismatch', 'variance', 'none'))
    gate: str = option('cosine', choices=('cosine', 'sign', 'none'))
    granularity: str = option('tensor', choices=('element', 'tensor', 'global'))
    weight_clipping: bool = option(True)
    offsets: bool = option(False)
    offsets_ratio: float = option(0.3, low=0.0, high=1.0)
    mismatch_weight: float = option(1e-5, low=0.0)
    detach_target: bool = option(True)
    init: str = option('percentile', choices=('percentile', 'mse', 'dobi', 'minmax'))


@dataclass(frozen=True)
class ODMv1Options(ODMOptions):
    """ODM with the parts of its first version: variance, sign gate, offsets, no weight-clipping correction."""

    regularizer: str = option('variance', choices=('mismatch', 'variance', 'none'))
    gate: str = option('sign', choices=('cosine', 'sign', 'none'))
    weight_clipping: bool = option(False)
    offsets: bool = option(True)


@METHODS.register('odm')
class ODM(Method):
    r"""Learned asymmetric activation ranges, symmetric weight ranges, and a gated regularizer.

    Activations: [l, u] per layer, from the mean 1st and 99th percentile, learned. Weights: [-u, u], u = gamma f(W)
    with f the 99th percentile of \|W\| (weight-clipping correction). Update, for parameters theta of the network:
    theta <- theta - beta (g_R + lambda sim(g_R, g_M) g_M), sim = (cos + 1) / 2, L_M the sum over layers of
    ||x - q(x)||_2; ranges and gamma learn from L_R alone, at 10 times the network's learning rate.

    Readings where the sources are silent: cos per parameter tensor (``granularity``); q(x) a constant target
    (``detach_target``); gamma in the group of the ranges. Deviation: learning rates of ranges are relative to each
    layer's calibrated width, where the paper's 1e-3 is absolute in 0-255 features; lambda is converted likewise.

    The variance form (2023) is known to us from its abstract and reviews alone. Our reading: L_V is the sum over
    layers of the standard deviation of the input; its gradient counts where its sign agrees with g_R's; a
    ``offsets_ratio`` of the layers with the largest spread of channel means get a learned per-channel shift, those
    with the largest spread of channel deviations a per-channel scale. The offsets stay in floating point here (the
    paper quantizes them).
    """

    name = 'odm'
    takes_products = True
    Options: ClassVar[type] = ODMOptions

    def make_input(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        if self.options.offsets and isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            return OffsetRange(layer.a_bits, module.in_channels, zero_point=self.zero_point)
        return LearnedRange(layer.a_bits, zero_point=self.zero_point)

    def make_weight(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        shape = self.range_shape(module)
        narrow = self.zero_point == 'integer'
        if self.options.weight_clipping:
            percent = self.options.percentile
            return PercentileWeight(layer.w_bits, shape, percent=percent, narrow_range=narrow)
        return SymmetricRange(layer.w_bits, shape, narrow_range=narrow)

    def calibrate(self, net: nn.Module, batches: Iterable[Tensor], stages: Stages | None = None) -> Observations:
        if not self.options.offsets:
            return super().calibrate(net, batches, stages)
        stages = stages or Stages()
        spreads = channel_spreads(net, stages.over('measuring channels', batches))
        seen = super().calibrate(net, batches, stages)
        count = round(self.options.offsets_ratio * len(spreads))
        layers = quant_layers(net)
        chosen = [sorted(spreads, key=lambda n, i=i: -spreads[n][i])[:count] for i in (0, 1)]  # type: ignore[misc]
        for name in spreads:
            quantizer = layers[name].input_quantizer
            if isinstance(quantizer, OffsetRange):
                quantizer.select(shift=name in chosen[0], scale=name in chosen[1])
        return seen

    @property
    def leaves_parameters_unused(self) -> bool:
        return bool(self.options.offsets)  # those of layers that were not selected

    def start_weight(self, quantizer: Any, weight: Tensor) -> None:
        if not isinstance(quantizer, PercentileWeight):
            super().start_weight(quantizer, weight)
        elif self.options.init in ('mse', 'dobi'):
            observer = self._observer(quantizer, symmetric=True, per_channel=self.per_channel)
            observer.update(weight)
            quantizer.fit(weight, observer.range()[1])
        else:
            quantizer.set_range(-weight.abs().max(), weight.abs().max())

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer, feature_scale: float) -> Training:
        options = self.options
        if options.regularizer == 'none':
            return Training(net, optimizer)
        weight = regularizer_weight(options.mismatch_weight, feature_scale)
        logger.info(
            'ODM: feature scale c = %.4g, %s weight %.4g / (255 c) = %.4g',
            feature_scale, options.regularizer, options.mismatch_weight, weight,
        )  # fmt: skip

        def term(x: Tensor, q: Tensor) -> Tensor:
            return mismatch(x, q, options.detach_target) if options.regularizer == 'mismatch' else deviation(x)

        return CooperativeTraining(net, optimizer, term, weight, options.granularity, options.gate)


@METHODS.register('odm_v1')
class ODMv1(ODM):
    """The preset of :class:`ODM` that its first version describes."""

    name = 'odm_v1'
    Options = ODMv1Options


def channel_spreads(net: nn.Module, batches: Iterable[Tensor]) -> dict[str, tuple[float, float]]:
    """Spread of each layer's input over channels, relative to the whole: of the means, and of the deviations.

    Returns:
        By layer name: std over channels of the channel means, and of the channel deviations, each over the standard
        deviation of all values; means over batches.
    """
    found: dict[str, list[Tensor]] = {}

    def look(name: str, x: Tensor) -> None:
        if x.dim() == 4:
            values = x.float().transpose(0, 1).flatten(1)
            whole = values.std(unbiased=False).clamp(min=torch.finfo(torch.float32).tiny)
            channels = torch.stack([values.mean(dim=1), values.std(dim=1, unbiased=False)])
            found.setdefault(name, []).append(channels.std(dim=1, unbiased=False) / whole)

    observe(net, batches, lambda name, quantizer: MSEObserver(), also=look)
    means = {name: torch.stack(values).mean(dim=0) for name, values in found.items()}
    return {name: (float(m[0]), float(m[1])) for name, m in means.items()}
