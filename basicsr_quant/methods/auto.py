"""``auto``: the best static quantization that fits into a number of seconds, from what this package has."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..network.calibration import Observations
from ..network.plan import LayerPlan
from ..network.stages import Stages
from ..quantizers import LearnedRange, Observer, Quantizer, SymmetricRange
from ..schema import option
from .auto_search import InputObserver, Search
from .base import METHODS, Method

_SAMPLES = 1 << 17


@dataclass(frozen=True)
class AutoOptions:
    """Options of ``auto``.

    Args:
        budget: Seconds that calibration may take, by the wall clock. What does not fit is left out, and said.
        a_granularity: ``channel``: each input channel of a layer has a range of its own, fixed after calibration;
            ``tensor``: one range, which every integer engine takes.
        mixed_bits: Choose the bits of each layer's input, their mean weighted by MACs at most ``a_bits``.
        compensate: Round weights so that the layers' outputs stay close, not the weights.
        rounds: How often at most; each starts from the FP32 weights and the network that the one before left.
        range_lr: As in every method with learned ranges, for ``basicsr train``.
    """

    budget: float = option(60.0, low=1.0)
    a_granularity: str = option('channel', choices=('channel', 'tensor'))
    mixed_bits: bool = option(True)
    compensate: bool = option(True)
    rounds: int = option(2, low=1)
    range_lr: float = option(10.0, low=0.0)


@METHODS.register('auto')
class Auto(Method):
    """Static quantization by closed forms, each stage kept only if the network's output comes nearer to FP32.

    1. Ranges of activations and weights by least squared error, for each input and output channel; those of
       activations half or all the way to the extremes where that serves the output better (at 8 bits).
    2. Bits of each layer's input, one fewer or one more, by what they do to the output's error where nothing else is
       quantized (quantization noise is small and adds up), then
       :func:`~basicsr_quant.network.bit_allocation.allocate_bits`. Weights keep ``w_bits``.
    3. Weights by least squares on the inputs that the layer sees in the quantized network
       (:func:`~basicsr_quant.quantizers.compensated_rounding.compensate_input`, its bias takes up the means), then
       onto the grid by error-compensated rounding (GPTQ, Frantar et al., ICLR 2023).

    Every stage is judged by the squared error of the output against the FP32 network's on up to 8 images that stage 3
    does not see; what makes it worse is taken back. The choices and errors go into the log and the checkpoint. Where
    the budget is long enough for all of it, the result is a function of the images and the seed; a shorter budget ties
    it to the speed of the machine.

    The checkpoint's weights lie on their grids; it is an ordinary file of fixed ranges. ``basicsr train`` goes on from
    it with learned ranges. Left out are AdaBM's bits for each image, which make a network dynamic, and training of
    ranges and biases through the network, which lowered PSNR on EDSR (README).
    """

    name = 'auto'
    Options = AutoOptions
    default_zero_point = 'integer'
    default_w_granularity = 'channel'
    chooses_bits = True
    changes_weights = True

    @property
    def shares_tensors(self) -> bool:
        return self.options.a_granularity == 'tensor'  # no layer gets the tensors' 8 bits, or loses them

    def make_input(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        return LearnedRange(layer.a_bits, self._input_shape(module), zero_point=self.zero_point)

    def make_weight(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        narrow = self.zero_point == 'integer' and layer.w_bits > 2  # three levels are too few
        return SymmetricRange(layer.w_bits, self.range_shape(module), narrow_range=narrow)

    def _input_shape(self, module: Any) -> tuple[int, ...]:
        if self.options.a_granularity == 'tensor':
            return ()
        if isinstance(module, nn.Linear):
            return (module.in_features,)
        return (1, module.in_channels) + (1,) * (module.weight.dim() - 2)

    # -- calibration -----------------------------------------------------------------------------------------------

    def make_observer(self, name: str, quantizer: Quantizer) -> Observer:
        per_channel = self.options.a_granularity == 'channel'
        shape = getattr(quantizer, 'unit').shape  # noqa: B009 (a buffer)
        samples = max(256, _SAMPLES // shape.numel()) if per_channel else _SAMPLES
        observer = InputObserver(per_channel, quantizer.num_bits, zero_point=self.zero_point, samples=samples)
        if per_channel:
            observer.channel_dim = -1 if len(shape) == 1 else 1
        return observer

    @torch.no_grad()
    def calibrate(self, net: nn.Module, batches: Iterable[Tensor], stages: Stages | None = None) -> Observations:
        search = Search(self, net, batches, stages or Stages())
        seen = search.observe()
        search.set_ranges(seen)
        if self.options.mixed_bits:
            search.choose_bits(seen)
        if self.options.compensate:
            for index in range(self.options.rounds):
                if not search.round_weights(index + 1):
                    break
        seen.choices.update(search.choices())
        search.report()
        return seen
