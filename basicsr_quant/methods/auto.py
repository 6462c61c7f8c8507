"""``auto``: the best static quantization that fits into a number of seconds, from what this package has."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QuantError
from ..network.bit_allocation import allocate_bits
from ..network.calibration import Observations, evaluating, observe
from ..network.input_moments import columns_wanted, input_moments, moment_groups
from ..network.plan import LayerPlan
from ..network.stages import Stages
from ..network.surgery import floating_point, quant_layers
from ..network.trace import trace
from ..quantizers import LearnedRange, MSEObserver, Observer, Quantizer, SymmetricRange
from ..quantizers.compensated_rounding import InputMoments, compensate_input, round_compensated
from ..schema import option
from .base import METHODS, Method

logger = logging.getLogger('basicsr')

_SAMPLES = 1 << 17
_JUDGED = 8
_MOMENT_IMAGES = 32
_WEIGHED = 4
_LEAST_GAIN = 0.99

RANGES, BITS = 'ranges', 'bits of each layer'


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

    1. Ranges of activations and weights by least squared error, for each input and output channel.
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
        return (1, module.weight.shape[1] * module.groups) + (1,) * (module.weight.dim() - 2)

    # -- calibration -----------------------------------------------------------------------------------------------

    def make_observer(self, name: str, quantizer: Quantizer) -> Observer:
        per_channel = self.options.a_granularity == 'channel'
        shape = getattr(quantizer, 'unit').shape  # noqa: B009 (a buffer)
        samples = max(256, _SAMPLES // shape.numel()) if per_channel else _SAMPLES
        observer = MSEObserver(per_channel, quantizer.num_bits, zero_point=self.zero_point, samples=samples)
        if per_channel:
            observer.channel_dim = -1 if len(shape) == 1 else 1
        return observer

    @torch.no_grad()
    def calibrate(self, net: nn.Module, batches: Iterable[Tensor], stages: Stages | None = None) -> Observations:
        search = _Search(self, net, batches, stages or Stages())
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


class _Search:
    """One calibration by :class:`Auto`: the clock, what was tried and what came of it."""

    def __init__(self, method: Auto, net: nn.Module, images: Iterable[Tensor], stages: Stages) -> None:
        self.method, self.net, self.images, self.stages = method, net, images, stages
        self.end = time.perf_counter() + method.options.budget
        self.errors: dict[str, float] = {}
        self.left_out: dict[str, str] = {}
        self.judged: list[tuple[Tensor, Tensor]] = []
        self.forward_seconds = 0.0
        self.round_seconds = 0.0
        self.rounded: list[str] = []
        self.layers = quant_layers(net)
        self.names: list[str] = []
        self.original = {
            name: copy.deepcopy({k: v for k, v in layer.state_dict().items() if k in ('weight', 'bias')})
            for name, layer in self.layers.items()
        }

    @property
    def left(self) -> float:
        return self.end - time.perf_counter()

    # -- stage 1 ---------------------------------------------------------------------------------------------------

    def observe(self) -> Observations:
        """Look at the FP32 network; at most a third of the budget, at least four images."""
        seen = observe(self.net, self._within(self.images, self.left / 3), self.method.make_observer)
        if not seen.images and self.layers:
            raise QuantError('quant.calibration: the data set gave no image')
        self.names = [name for name in self.layers if name in seen.stds]
        idle = [name for name in self.layers if name not in seen.stds and name in seen.observers]
        if idle:
            logger.warning('Calibration never reached %d layers, which keep an unset range: %s.', len(idle), idle)
        return seen

    def _within(self, images: Iterable[Tensor], seconds: float) -> Iterator[Tensor]:
        start = time.perf_counter()
        for count, image in enumerate(self.stages.over('observing activations', images), 1):
            yield image
            self.forward_seconds = (time.perf_counter() - start) / count
            if time.perf_counter() - start > seconds and count >= 4:
                self.left_out['images'] = f'all but the first {count}'
                return

    def set_ranges(self, seen: Observations) -> None:
        """Ranges of least squared error, then the first error of the output."""
        self.every = 1
        allowed = self.left / 4
        for index, name in enumerate(self.stages.over('setting ranges', self.names)):
            start = time.perf_counter()
            layer = self.layers[name]
            if isinstance(layer.input_quantizer, Quantizer):
                self._set_input(name, seen, layer.input_quantizer.num_bits)
            if isinstance(layer.weight_quantizer, Quantizer):
                self._start_weight(name, layer.weight)  # type: ignore[arg-type]
            if index == 0:
                projected = (time.perf_counter() - start) * len(self.names)
                self.every = max(1, round(projected / max(allowed, 1e-3)))
        images = [image for image, _ in zip(self.images, range(_JUDGED))]
        images = [image.to(next(self.net.parameters()).device) for image in images]
        with self.stages.stage('judging'), evaluating(self.net), floating_point(self.net):
            start = time.perf_counter()
            self.judged = [(image, self.net(image)) for image in images]
            self.forward_seconds = (time.perf_counter() - start) / max(1, len(images))
        self.errors[RANGES] = self._error()

    def _set_input(self, name: str, seen: Observations, bits: int) -> float:
        observer, quantizer = seen.observers[name], self.layers[name].input_quantizer
        assert isinstance(observer, MSEObserver) and isinstance(quantizer, LearnedRange)
        lower, upper, error = observer.search(bits, self.every)
        quantizer.set_bits(bits)
        quantizer.set_range(lower.reshape(quantizer.unit.shape), upper.reshape(quantizer.unit.shape))
        return error

    def _start_weight(self, name: str, weight: Tensor) -> None:
        quantizer = self.layers[name].weight_quantizer
        assert isinstance(quantizer, SymmetricRange)
        observer = MSEObserver(self.method.per_channel, quantizer.num_bits, True, quantizer.narrow_range)
        observer.update(weight)
        quantizer.set_range(*observer.range())

    def _error(self) -> float:
        """Mean squared error of the output over the judged images."""
        total = count = 0.0
        with self.stages.stage('judging'), evaluating(self.net):
            for image, target in self.judged:
                total += float((self.net(image) - target).double().square().sum())
                count += target.numel()
        return total / count

    # -- stage 2 ---------------------------------------------------------------------------------------------------

    def choose_bits(self, seen: Observations) -> None:
        """Give each layer's input the bits that the output wants, under the mean that was asked for."""
        inputs = {n: q for n in self.names if isinstance(q := self.layers[n].input_quantizer, LearnedRange)}
        groups: dict[int, list[str]] = {}
        for name, quantizer in inputs.items():
            if 2 < quantizer.num_bits < 8:  # ends at 8 bits stay, and nothing is below 2
                groups.setdefault(quantizer.num_bits, []).append(name)
        trials = 3 * sum(map(len, groups.values())) * self.forward_seconds
        images = self.judged[: max(0, min(_WEIGHED, int(self.left / 2 / (trials + 1e-9))))]
        if not images:
            self.left_out['bits of each layer'] = f'{trials:.0f} s for one image'
            return
        macs = {layer.name: float(layer.macs) for layer in trace(self.net).layers}
        before = {name: copy.deepcopy(q.state_dict()) for name, q in inputs.items()}
        for bits, names in groups.items():
            errors = self._weigh(names, (bits - 1, bits, bits + 1), images, seen)
            for name, chosen in allocate_bits(errors, {n: macs[n] for n in names}, bits).items():
                self._set_input(name, seen, chosen)
        self.errors[BITS] = self._error()
        if self.errors[BITS] > self.errors[RANGES]:
            for name, state in before.items():
                inputs[name].load_state_dict(state)

    def _weigh(
        self, names: list[str], choices: tuple[int, ...], images: list[tuple[Tensor, Tensor]], seen: Observations
    ) -> dict[str, dict[int, float]]:
        """The output's error with the input of one layer at so many bits, and nothing else quantized."""
        judged, self.judged = self.judged, images
        errors: dict[str, dict[int, float]] = {}
        try:
            with floating_point(self.net):
                for name in self.stages.over('weighing layers', names):
                    quantizer = self.layers[name].input_quantizer
                    quantizer.enabled = True  # type: ignore[union-attr,assignment]
                    errors[name] = {}
                    for bits in choices:
                        self._set_input(name, seen, bits)
                        errors[name][bits] = self._error()
                    quantizer.enabled = False  # type: ignore[union-attr,assignment]
        finally:
            self.judged = judged
        return errors

    # -- stage 3 ---------------------------------------------------------------------------------------------------

    def round_weights(self, index: int) -> bool:
        """Compensate and round every weight once; whether it is worth another round."""
        title = f'rounding {index}'
        if self.left < self.round_seconds:
            self.left_out[title] = f'{self.round_seconds:.0f} s'
            return False
        start = time.perf_counter()
        names = self._affordable() if index == 1 else self.rounded
        groups = moment_groups(self.net, names)
        one = 4 * self.forward_seconds * len(groups)  # both inputs are quantized, and columns are gathered
        count = min(_MOMENT_IMAGES, int(self.left * 0.4 / (one + 1e-9)))
        if count < 4 or not names:
            self.left_out[title] = f'{4 * one:.0f} s' if names else 'no time for any layer'
            return False
        images = _Others(self.images, len(self.judged), count)
        before = {name: copy.deepcopy(self.layers[name].state_dict()) for name in names}
        for group in groups:
            moments = input_moments(self.net, group, self.stages.over('measuring inputs', images), len(images))
            for name in self.stages.over('rounding weights', group):
                self._round(name, moments.pop(name))
        best = min(self.errors.values())
        self.errors[title] = self._error()
        self.round_seconds, self.rounded = time.perf_counter() - start, names
        if self.errors[title] < best:
            return self.errors[title] < best * _LEAST_GAIN
        for name, state in before.items():
            self.layers[name].load_state_dict(state)
        return False

    def _affordable(self) -> list[str]:
        """The layers whose rounding fits into half of what is left, those with the shortest columns first."""
        side = torch.ones(512, 512)
        start = time.perf_counter()
        for _ in range(4):
            side @ side
        second = 4 * 2 * 512**3 / (time.perf_counter() - start + 1e-9)  # operations
        costs = {}
        for name in self.names:
            layer: Any = self.layers[name]
            if isinstance(layer.weight_quantizer, Quantizer) and isinstance(layer, (nn.Conv2d, nn.Linear)):
                k = layer.weight[0].numel()
                # Two products of (K, P) columns in float32; solving and inverting (K, K) in float64, at half its speed.
                costs[name] = getattr(layer, 'groups', 1) * (4 * k**2 * columns_wanted(k) + 2 * 6 * k**3) / second
        left = self.left / 2
        chosen = set()
        for name in sorted(costs, key=lambda name: costs[name]):
            if costs[name] > left:
                break
            left -= costs[name]
            chosen.add(name)
        missing = [name for name in costs if name not in chosen]
        if missing:
            self.left_out['rounding of ' + ', '.join(missing)] = f'{sum(costs[n] for n in missing):.0f} s'
        return [name for name in self.names if name in chosen]

    def _round(self, name: str, moments: InputMoments) -> None:
        layer: Any = self.layers[name]
        original = self.original[name]
        bias = original.get('bias')
        xq, qq = moments.covariances(centred=bias is not None)
        groups = len(qq)
        weight = original['weight'].double().reshape(groups, -1, qq.shape[-1])
        target = compensate_input(weight, xq, qq)
        shape = layer.weight.shape
        self._start_weight(name, target.reshape(shape).float())
        quantizer = layer.weight_quantizer

        def quantize(column: Tensor) -> Tensor:
            flat = column.reshape(-1, *(1,) * (len(shape) - 1)).float()
            return quantizer(flat).to(column).reshape(column.shape)  # type: ignore[no-any-return]

        rounded = round_compensated(target, qq, quantize)
        layer.weight.copy_(rounded.reshape(shape))
        if bias is not None:
            x, q = moments.means()
            shift = (weight @ x[:, :, None] - rounded @ q[:, :, None]).reshape(-1)
            layer.bias.copy_(bias + shift.to(bias))

    # -- what came of it -------------------------------------------------------------------------------------------

    def choices(self) -> dict[str, Any]:
        bits = {name: getattr(self.layers[name].input_quantizer, 'num_bits', 32) for name in self.names}
        return {'output_mse': dict(self.errors), 'left_out': dict(self.left_out), 'a_bits': bits}

    def report(self) -> None:
        kept = min(self.errors, key=lambda stage: self.errors[stage])
        lines = []
        best = float('inf')
        for stage, error in self.errors.items():
            lines.append(f'  {stage:18}  {error:.4g}  {"kept" if error < best else "taken back"}')
            best = min(best, error)
        lines += [f'  {what:18}  left out: {why}' for what, why in self.left_out.items()]
        bits: dict[int, int] = {}
        for value in self.choices()['a_bits'].values():
            bits[value] = bits.get(value, 0) + 1
        spread = ', '.join(f'{count} at {value}' for value, count in sorted(bits.items()))
        logger.info(
            'auto: output MSE against FP32 on %d images, after each stage (best: %s):\n%s\n  bits of inputs: %s layers',
            len(self.judged), kept, '\n'.join(lines), spread,
        )  # fmt: skip


class _Others:
    """``count`` of the images behind the first ``skip``, the first ones too where there are no others."""

    def __init__(self, images: Iterable[Tensor], skip: int, count: int) -> None:
        self.images, self.skip, self.count = images, skip, count
        total = len(images) if hasattr(images, '__len__') else skip + count  # type: ignore[arg-type]
        if total < skip + min(count, 4):
            self.skip = 0
        self.count = min(count, total - self.skip)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        for index, image in enumerate(self.images):
            if index >= self.skip + self.count:
                return
            if index >= self.skip:
                yield image
