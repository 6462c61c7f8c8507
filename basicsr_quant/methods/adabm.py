"""AdaBM: on-the-fly adaptive bit mapping (Hong, Lee; CVPR 2024). Calibration and fine-tuning of ranges, no training."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import closing
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QuantError
from ..network.bit_allocation import allocate_bits
from ..network.calibration import Observations, evaluating, observe
from ..network.plan import FLOAT_BITS, LayerPlan, Plan
from ..network.sensitivity import OFFSETS, output_errors
from ..network.stages import Stages
from ..network.surgery import quant_layers
from ..network.teacher import Teacher, batches_of, spread
from ..quantizers import (
    OBSERVERS,
    AdaptiveRange,
    ImageBits,
    LearnedRange,
    MSEObserver,
    NetworkMeasure,
    Observer,
    PercentileObserver,
    Quantizer,
    RelativeRange,
    SymmetricRange,
    clip_to_bits,
    complexity,
    percentile,
    search_omse_bound,
)
from .adabm_options import AdaBMOptions
from .adabm_tuning import Tuner, Tuning
from .base import METHODS, Method

logger = logging.getLogger('basicsr')

_CALIBRATION_BATCH = 16
_DECAY = 0.9
_SEARCHED = 1 << 14
_SENSITIVITY_IMAGES = 4


@METHODS.register('adabm')
class AdaBM(Method):
    r"""Bits of each activation by image and layer, ranges and mappings tuned on images alone; weights stay as they are.

    Quantizers: :class:`AdaptiveRange` for activations (b = base + b_I(image) + b_L(layer)), symmetric ranges with 2^b
    levels at fixed bits for weights. First and last layers under ``scope: all`` and layers with a rule in
    ``quant.layers`` keep their bits.

    Calibration on the FP32 network: extremes of batches of 16 with a moving average, weights by OMSE, thresholds of
    complexity at its 10th and 90th percentile, a bit less for the 30 % of layers whose input deviates least and one
    more for the 30 % that deviate most, then bit-aware clipping. Fine-tuning: weight ranges, activation ranges and bit
    mappings in turn, loss = 255 |Q(I) - P(I)| + 10 feature distance + (in the mappings' turn) 50 max(mean bits - base,
    0), see :class:`~basicsr_quant.methods.adabm_tuning.Tuner`. The defaults are the published code's.

    Deviations from the published code, undone by ``reference_compat: true`` where a number is given: weights search
    from max \|W\| and not from max W (1); clipping looks at 16 images and not at the first two (2), in a pass of its
    own and not inside the first training step; the feature loss is a mean over blocks and images, not divided by the
    batch once more (3); learning rates of ranges are relative to each layer's calibrated width and not absolute (4);
    bits stay in 2 to 8 (5). Ranges and thresholds never cross. The FP32 network's outputs are computed once. In
    ``basicsr train`` ranges learn and the mappings stay as calibrated. ``skip: quantized`` (not in the paper) holds the
    tensors around residual additions at 8 bits, their extremes in calibration, and does not adapt them.
    """

    name = 'adabm'
    is_static = False
    takes_skip = True
    Options = AdaBMOptions
    has_reference_compat = True

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.schedule = self.options.resolved()

    # -- quantizers ------------------------------------------------------------------------------------------------

    def make_measures(self, plan: Plan) -> dict[str, NetworkMeasure]:
        return {'image_bits': ImageBits()} if self.schedule.image_bits and any(map(_is_adaptive, plan)) else {}

    def make_input(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        if not _is_adaptive(layer):
            return LearnedRange(layer.a_bits, zero_point=self.zero_point)
        limited = not self.reference_compat
        return AdaptiveRange(layer.a_bits, layer.layer, limited=limited, zero_point=self.zero_point)

    def make_weight(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        narrow = self.zero_point == 'integer'
        return SymmetricRange(layer.w_bits, self.range_shape(module), narrow_range=narrow)

    # -- calibration -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, net: nn.Module, batches: Iterable[Tensor], stages: Stages | None = None) -> Observations:
        stages = stages or Stages()
        schedule = self.schedule
        with closing(Teacher(net, features=schedule.feature_weight > 0 and schedule.epochs > 0)) as teacher:
            with teacher.recording():
                seen, found = self._observe(net, batches, stages)
            if not seen.images:
                if quant_layers(net):
                    raise QuantError('quant.calibration: the data set gave no image')
                return seen
            self.start_ranges(net, seen, stages)
            adaptive = {n: q for n, q in _inputs(net).items() if isinstance(q, AdaptiveRange) and n in seen.stds}
            for mapping in (m for m in net.modules() if isinstance(m, ImageBits)):
                mapping.set_thresholds(*self._thresholds(found['complexity']))
            if adaptive:
                self._set_layer_bits(net, adaptive, seen, found, teacher, stages)
            if schedule.init != 'mse':
                self._clip(net, teacher, stages)
            if schedule.epochs:
                Tuner(net, teacher, self._tuning()).run(stages)
            seen.choices.update(self._report(net, adaptive, found['complexity']))
        return seen

    def _observe(
        self, net: nn.Module, batches: Iterable[Tensor], stages: Stages
    ) -> tuple[Observations, dict[str, list[float]]]:
        """The pass through the FP32 network: ranges, deviations of each layer's input, complexity of each image."""
        found: dict[str, list[float]] = {'complexity': []}

        def images() -> Iterable[Tensor]:
            chosen = spread(batches, self.schedule.images)
            for batch in batches_of(stages.over('observing activations', chosen), _CALIBRATION_BATCH):
                found['complexity'] += complexity(batch).tolist()
                yield batch

        def deviation(name: str, x: Tensor) -> None:
            found.setdefault(name, []).extend(float(row.float().std()) for row in x)  # row by row: std(dim) is slow

        return observe(net, images(), self.make_observer, deviation), found

    def _observer(self, quantizer: Quantizer, symmetric: bool = False, per_channel: bool = False) -> Observer:
        init = self.schedule.init
        if init == 'mse':
            kwargs: dict[str, Any] = {'bits': quantizer.num_bits, 'symmetric': symmetric, 'per_channel': per_channel}
            kwargs.update(narrow_range=quantizer.narrow_range, zero_point=quantizer.zero_point)
            return MSEObserver(**kwargs, samples=_SEARCHED)
        if init == 'percentile':
            return PercentileObserver(per_channel, self.options.percentile)
        return OBSERVERS[init](per_channel)

    def start_weight(self, quantizer: Any, weight: Tensor) -> None:
        if self.schedule.init == 'mse':
            return super().start_weight(quantizer, weight)
        rows = weight.detach().reshape(weight.shape[0] if self.per_channel else 1, -1).float()
        start = rows.amax(dim=1) if self.reference_compat else None
        bound = search_omse_bound(rows, quantizer.num_bits, start, quantizer.narrow_range)
        quantizer.set_range(-bound.reshape(quantizer.unit.shape), bound.reshape(quantizer.unit.shape))
        return None

    def _thresholds(self, found: list[float]) -> tuple[Tensor, Tensor]:
        """Percentiles of complexity in each 16 images, averaged with decay 0.9."""
        bounds: Tensor | None = None
        for batch in torch.tensor(found).split(_CALIBRATION_BATCH):
            p = self.options.image_percentile
            new = torch.cat([percentile(batch[None], p), percentile(batch[None], 100 - p)])
            bounds = new if bounds is None else _DECAY * bounds + (1 - _DECAY) * new
        assert bounds is not None
        return bounds[0], bounds[1]

    def _set_layer_bits(
        self, net: nn.Module, adaptive: dict[str, AdaptiveRange], seen: Observations, found: dict[str, list[float]],
        teacher: Teacher, stages: Stages,
    ) -> None:  # fmt: skip
        if self.schedule.sensitivity == 'std':
            s = torch.tensor([sum(found[name]) / len(found[name]) for name in adaptive])
            p = self.options.layer_percentile
            low, high = (percentile(s[None], q) for q in (p, 100 - p))
            chosen = ((s > high).int() - (s < low).int()).tolist()
        else:
            ranges = {}
            for name, quantizer in stages.over('ranges of each width', list(adaptive.items())):
                for offset in OFFSETS:
                    ranges[name, offset] = self._range_at(seen.observers[name], quantizer, offset)
            images = [teacher.images[i] for i in range(min(len(teacher), _SENSITIVITY_IMAGES))]
            errors, macs = output_errors(net, stages.over('measuring sensitivity', images), adaptive, ranges)
            offsets = allocate_bits(errors, 0, macs, dict.fromkeys(macs, 1.0))  # the mean by MACs and the plain one
            chosen = [offsets[name] for name in adaptive]
        for (name, quantizer), offset in zip(adaptive.items(), chosen):
            quantizer.layer_factor.fill_(float(offset))
            if self.schedule.init == 'mse' and offset:
                quantizer.set_range(*self._range_at(seen.observers[name], quantizer, offset))

    @staticmethod
    def _range_at(observer: Observer, quantizer: Quantizer, offset: int) -> tuple[Tensor, Tensor]:
        if isinstance(observer, MSEObserver):
            observer.bits = quantizer.num_bits + offset
        return observer.range()

    def _clip(self, net: nn.Module, teacher: Teacher, stages: Stages) -> None:
        """Bit-aware clipping in one pass: each layer clips its range on what reaches it, then quantizes with it."""
        first = [i for i in range(len(teacher)) if teacher.shapes[i] == teacher.shapes[0]]
        images, _, _ = teacher.batch(first[: self.schedule.batch if self.reference_compat else _CALIBRATION_BATCH])
        inputs = _inputs(net)
        blend = self.options.clip_blend
        handles = []
        with stages.stage('bit-aware clipping', len(inputs)) as step:

            def clip(quantizer: Any, args: tuple[Tensor, ...]) -> None:
                x = args[0].reshape(-1)
                lower, upper = quantizer.bounds(x)
                bits = float(quantizer.num_bits)
                if isinstance(quantizer, AdaptiveRange):
                    bits += float(quantizer.layer_bits)
                if not self.reference_compat and len(x) > _SEARCHED * 8:
                    index = torch.randint(len(x), (_SEARCHED * 8,), generator=torch.Generator().manual_seed(0))
                    x = x[index.to(x.device)]
                found = clip_to_bits(x, lower, upper, bits, quantizer.zero_point)
                quantizer.set_range(*(blend * new + (1 - blend) * old for new, old in zip(found, (lower, upper))))
                step()

            for quantizer in inputs.values():
                handles.append(quantizer.register_forward_pre_hook(clip))
            try:
                with evaluating(net):
                    net(images)
            finally:
                for handle in handles:
                    handle.remove()

    def _tuning(self) -> Tuning:
        schedule, options = self.schedule, self.options
        return Tuning(
            cycle=schedule.cycle,
            epochs=schedule.epochs,
            batch=schedule.batch,
            rates=(schedule.lr_w, schedule.lr_a, options.lr_image, options.lr_layer),
            decay=schedule.decay,
            feature_weight=schedule.feature_weight,
            bit_weight=options.bit_weight,
            absolute=self.reference_compat,
            per_batch=self.reference_compat,
        )

    def _report(self, net: nn.Module, adaptive: dict[str, AdaptiveRange], found: list[float]) -> dict[str, Any]:
        """What was chosen, as plain data."""
        if not adaptive:
            return {}
        layers = {name: int(q.layer_bits) for name, q in adaptive.items()}
        base = sum(q.num_bits for q in adaptive.values()) / len(adaptive)
        choices = {'schedule': self.options.schedule, 'layer_bits': layers}
        choices['mean_bits'] = base + sum(layers.values()) / len(layers)
        for mapping in (m for m in net.modules() if isinstance(m, ImageBits)):
            choices['image_thresholds'] = [float(mapping.lower), float(mapping.upper)]
            choices['mean_bits'] += float(mapping.from_complexity(torch.tensor(found)).mean())
        return choices


def _is_adaptive(layer: LayerPlan) -> bool:
    """Ends at eight bits and layers with a rule of their own keep their bits."""
    return layer.a_bits < FLOAT_BITS and layer.has_base_bits


def _inputs(net: nn.Module) -> dict[str, RelativeRange]:
    layers = quant_layers(net)
    return {name: q.input_quantizer for name, q in layers.items() if isinstance(q.input_quantizer, RelativeRange)}
