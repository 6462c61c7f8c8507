"""CADyQ: content-aware dynamic quantization (Hong et al., ECCV 2022)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QuantError
from ..network.calibration import Observations, evaluating, regularizer_weight
from ..network.plan import FLOAT_BITS, LayerPlan, Plan, TensorPlan
from ..network.stages import Stages
from ..network.surgery import quant_layers
from ..quantizers import (
    MaxAbsWeight,
    MSEObserver,
    NetworkMeasure,
    Observer,
    Quantizer,
    SelectedRange,
    SelectedWeight,
    SymmetricRange,
)
from ..schema import option
from .base import METHODS, Method, RangeOptions, Training
from .extra_loss import with_loss
from .progress import Progress

_BATCH = 16  # of the publication, whose bit loss is a sum over it
_EPOCH = 1000  # iterations


@dataclass(frozen=True)
class CADyQOptions(RangeOptions):
    """Options of CADyQ; the defaults are the published code's.

    Args:
        init: Where the bound that all candidates start from comes from, as in PAMS.
        bits: The candidates, rising; the highest is ``quant.a_bits``.
        bit_weight: Weight of the bit loss at the start, for a reconstruction loss in 0-255.
        bit_growth: What is added to it each 1000 iterations (the published option is called a decay).
        selector_lr: Learning rate of the selectors as a multiple of the network's (10 for CARN).
        normalize: Give selectors features less their mean over the calibration images, in units of their deviation
            (published: false). Features are positive, of the order of 10 to 100, and rise and fall together: what all
            images have in common then moves the choice faster than what tells them apart, which takes very long to
            learn. With it, and a selector's learning rate of about 1e-2, some hundred iterations do.
        candidate_init: Where the bounds of the lower candidates start: ``shared``, at that of the highest (published),
            or ``mse``, where each rounds its layer's inputs with the least squared error. A bound that suits 8 bits is
            far too wide for 4, and learns its way there slowly.
        select_weights: Give a layer's weight the bits chosen for its input, image by image; off in the publication.
    """

    init: str = option('ema_minmax', choices=('ema_minmax', 'minmax', 'percentile', 'mse', 'dobi'))
    bits: tuple = (4, 6, 8)  # type: ignore[type-arg]
    bit_weight: float = option(1e-4, low=0.0)
    bit_growth: float = option(1e-6, low=0.0)
    selector_lr: float = option(1.0, low=0.0)
    normalize: bool = option(False)
    candidate_init: str = option('shared', choices=('shared', 'mse'))
    select_weights: bool = option(False)


@METHODS.register('cadyq')
class CADyQ(Method):
    r"""Each layer chooses among candidate bits for each image, by its input's deviations and the image's gradients.

    Activations: :class:`SelectedRange`, one bound alpha for each candidate, learned. Weights: max \|W\| of the current
    weight. Layers with a rule in ``quant.layers`` and first and last layers keep their bits and have PAMS's range.

    Bit loss: w sum over layers of B / sg(E_p[B]), with B the bits chosen and E_p[B] the selector's expectation;
    gradient of log E_p[B]. w = (bit_weight + bit_growth floor(iterations / 1000)) / 255 for a host's loss in 0-1. Its
    attention losses are those of ``quant.distill``. A network quantized by PAMS is taken over as a start: its bound
    becomes that of every candidate.

    Deviations from the published code: the bit loss is 16 times a mean over the batch, where the code sums over it,
    16 images as published (``reference_compat: true``: the sum, so that another batch size shifts the balance); a
    deviation is measured in units of 0-255 features, whatever the network's (compat: as it is); gradients are
    multiplied by 1000 for every network (the code leaves that out for CARN); bounds stay positive and learn at a rate
    relative to their start; both convolutions of a block take the quantized input and the skip stays in floating point,
    as the paper's figure shows it. ``skip: quantized`` holds the tensors around residual additions at 8 bits with
    PAMS's learned bound, as the published code holds a block's output; there the skip also has the bits chosen for the
    first convolution, here it keeps 8.
    """

    name = 'cadyq'
    is_static = False
    takes_skip = True
    Options = CADyQOptions
    default_zero_point = 'integer'
    zero_points = ('integer',)
    has_reference_compat = True
    starts_from = ('pams',)

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__(settings)
        self.candidates = _candidates(self.options.bits)

    def check(self, plan: Plan) -> None:
        for layer in plan:
            if layer.a_bits < FLOAT_BITS and layer.has_base_bits:
                if layer.type.endswith('Linear'):
                    raise QuantError(
                        f"quant.method: 'cadyq' reads the channels of images, and layer '{layer.layer}' is a Linear; "
                        f"keep such layers in floating point or give them bits: quant.layers: {{'{layer.layer}': fp}}"
                    )
                if layer.a_bits != self.candidates[-1]:
                    raise QuantError(
                        f'quant.a_bits: {layer.a_bits} given, but the highest of quant.cadyq.bits is '
                        f'{self.candidates[-1]}; make them equal'
                    )
                if self.options.select_weights and layer.w_bits not in (self.candidates[-1], FLOAT_BITS):
                    raise QuantError(
                        f'quant.w_bits: {layer.w_bits} given, but quant.cadyq.select_weights gives weights the bits of '
                        f'quant.cadyq.bits, at most {self.candidates[-1]}; make them equal'
                    )

    @property
    def bit_limits(self) -> tuple[int, int]:
        return self.candidates[0], self.candidates[-1]

    # -- quantizers ------------------------------------------------------------------------------------------------

    def make_measures(self, plan: Plan) -> dict[str, NetworkMeasure]:
        return {'progress': Progress()}

    def make_input(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        channels: Any = getattr(module, 'in_channels', None)  # of a convolution of any kind
        if layer.has_base_bits and channels is not None:
            return SelectedRange(self.candidates, channels, layer.layer, tells=self.options.select_weights)
        return SymmetricRange(layer.a_bits, zero_point='integer')

    def make_weight(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        chosen = layer.has_base_bits and layer.a_bits < FLOAT_BITS
        if self.options.select_weights and chosen and isinstance(module, nn.Conv2d):
            return SelectedWeight(self.candidates, layer.layer, self.per_channel)
        return MaxAbsWeight(layer.w_bits, self.per_channel)

    def make_tensor(self, tensor: TensorPlan) -> Quantizer:
        # As in the network of PAMS that is taken over, where a tensor shares the quantizer of a layer that it feeds.
        if tensor.feeds and tensor.bits == self.candidates[-1]:
            return SymmetricRange(tensor.bits, zero_point='integer')
        return super().make_tensor(tensor)

    # -- start -----------------------------------------------------------------------------------------------------

    def make_observer(self, name: str, quantizer: Quantizer) -> Observer:
        return self._observer(quantizer, symmetric=True)

    def calibrate(self, net: nn.Module, batches: Iterable[Tensor], stages: Stages | None = None) -> Observations:
        seen = super().calibrate(net, batches, stages)
        for quantizer in _selected(net).values():
            quantizer.std_scale.fill_(self._std_scale(seen.feature_scale))
        if self.measures_start:
            self.measure_start(net, (stages or Stages()).over('measuring features', batches))
        return seen

    @property
    def measures_start(self) -> bool:
        return self.options.normalize or self.options.candidate_init == 'mse'

    @torch.no_grad()
    def measure_start(self, net: nn.Module, batches: Iterable[Tensor]) -> None:
        features: dict[str, list[Tensor]] = {name: [] for name in _selected(net)}
        observers = {name: MSEObserver(symmetric=True, narrow_range=True) for name in features}

        def look(name: str, quantizer: SelectedRange, x: Tensor) -> None:
            if self.options.normalize:
                features[name].append(quantizer.features(x))
            if self.options.candidate_init == 'mse':
                observers[name].update(x)

        handles = [
            q.register_forward_pre_hook(lambda q, inputs, name=name: look(name, q, inputs[0]))
            for name, q in _selected(net).items()
        ]
        reached: set[str] = set()
        try:
            with evaluating(net):
                for batch in batches:
                    net(batch.to(next(net.parameters()).device))
                    reached.update(net._quant_context.bits)  # type: ignore[arg-type, union-attr]
        finally:
            for handle in handles:
                handle.remove()
        for name, q in _selected(net).items():
            if name in reached and self.options.normalize:
                q.normalize(torch.cat(features[name]))
            if name in reached and self.options.candidate_init == 'mse':
                for index, bits in enumerate(self.candidates[:-1]):
                    observers[name].bits = bits
                    q.set_candidate(index, observers[name].range()[1])

    def _std_scale(self, feature_scale: float) -> float:
        return 1.0 if self.reference_compat else 1.0 / feature_scale

    def adopt(self, state: Mapping[str, Tensor], own: Mapping[str, Tensor], feature_scale: float) -> dict[str, Tensor]:
        adopted = {}
        for key, mine in own.items():
            if key in state:
                adopted[key] = state[key]
            elif key.endswith('.input_quantizer.alphas') and key[:-1] in state:
                adopted[key] = state[key[:-1]].reshape(-1).expand(len(mine)).clone()
            elif key.endswith('.input_quantizer.std_scale'):
                adopted[key] = torch.full_like(mine, self._std_scale(feature_scale))
            elif '.input_quantizer.' in key or key.startswith('quant_measures.'):  # selectors, and what they read
                adopted[key] = mine.clone()
        return adopted

    # -- training --------------------------------------------------------------------------------------------------

    def parameter_groups(self, net: nn.Module, params: Iterable[Any], lr: float) -> list[dict[str, Any]]:
        selectors = {id(p) for q in _selected(net).values() for p in q.selector.parameters()}
        groups = []
        for group in super().parameter_groups(net, params, lr):
            own = [p for p in group['params'] if id(p) in selectors]
            others = [p for p in group['params'] if id(p) not in selectors]
            if others:
                groups.append({**group, 'params': others})
            if own:
                groups.append({**group, 'params': own, 'lr': group.get('lr', lr) * self.options.selector_lr})
        return groups

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer, feature_scale: float) -> Training:
        return CADyQTraining(net, optimizer, self.options, summed=self.reference_compat)


class CADyQTraining(Training):
    """Adds the bit loss to the host's loss.

    Args:
        net: The bare quantized network.
        optimizer: Its optimizer; each step counts as an iteration.
        options: Weights of the loss.
        summed: Sum over the batch instead of 16 times its mean.
    """

    def __init__(
        self, net: nn.Module, optimizer: torch.optim.Optimizer, options: CADyQOptions, summed: bool = False
    ) -> None:
        super().__init__(net, optimizer)
        self.options, self.summed = options, summed
        self.progress: Any = net.get_submodule('quant_measures.progress')
        self._figures: dict[str, Tensor] = {}
        net.register_forward_hook(self._add_bit_loss)

    @property
    def weight(self) -> float:
        """w, for a loss in 0-1."""
        published = self.options.bit_weight + self.options.bit_growth * (int(self.progress.steps) // _EPOCH)
        return regularizer_weight(published, scale=1.0)

    def _add_bit_loss(self, net: Any, inputs: Any, output: Any) -> Any:
        if not (net.training and torch.is_grad_enabled()):
            return None
        bits, expected = net._quant_context.bits, net._quant_context.expected_bits
        names = [name for name, e in expected.items() if e.requires_grad]
        if not names:
            return None
        terms = [_log_bits(bits[name], expected[name]) for name in names]
        loss = torch.stack([t.sum() if self.summed else _BATCH * t.mean() for t in terms]).sum()
        loss = loss * self.weight
        self._figures = {'bits': torch.stack([bits[name].mean() for name in names]).mean(), 'l_bits': loss.detach()}
        return with_loss(output, loss)

    def _after_step(self, *_: object) -> None:
        super()._after_step()
        self.progress.steps += 1

    def log(self) -> dict[str, float]:
        """``bits``, the mean over layers and images of the last pass, and ``l_bits``, the weighted bit loss."""
        return {**super().log(), **{k: float(v) for k, v in self._figures.items()}}


def _log_bits(bits: Tensor, expected: Tensor) -> Tensor:
    """B / sg(E): the value of the bits chosen, the gradient of log E."""
    fixed = expected.detach()
    return (bits + (expected - fixed)) / fixed


def _selected(net: nn.Module) -> dict[str, SelectedRange]:
    """By layer."""
    found = {name: layer.input_quantizer for name, layer in quant_layers(net).items()}
    return {name: q for name, q in found.items() if isinstance(q, SelectedRange)}


def _candidates(given: Any) -> tuple[int, ...]:
    bits = tuple(int(b) if isinstance(b, (int, float)) and float(b).is_integer() else b for b in given)
    fits = all(isinstance(b, int) and not isinstance(b, bool) and 2 <= b <= 8 for b in bits)
    if not bits or not fits or list(bits) != sorted(set(bits)):
        raise QuantError(
            f'quant.cadyq.bits: {list(given)} given, a rising list of different whole numbers from 2 to 8 needed'
        )
    return bits
