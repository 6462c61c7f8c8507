"""The search behind ``auto``: the clock, what is tried, what comes of it."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import QuantError
from ..network.bit_allocation import allocate_bits
from ..network.calibration import Observations, evaluating, observe, output_error, set_tensor_ranges
from ..network.input_moments import columns_wanted, input_moments, moment_groups
from ..network.integer_tensors import TENSOR_BITS
from ..network.stages import Stages
from ..network.surgery import floating_point, quant_layers, tensor_quantizers
from ..network.trace import trace
from ..nn import stores_weight, weight_rows
from ..quantizers import LearnedRange, MSEObserver, Quantizer, SymmetricRange
from ..quantizers.compensated_rounding import InputMoments, compensate_input, round_compensated

if TYPE_CHECKING:
    from .auto import Auto

logger = logging.getLogger('basicsr')

_JUDGED = 8
_MOMENT_IMAGES = 32
_WEIGHED = 4
_LEAST_GAIN = 0.99

BITS = 'bits of each layer'
_WIDENINGS = {'ranges': 0.0, 'wider ranges': 0.5, 'widest ranges': 1.0}
_MANY_BITS = 6
_WIDER = 0.9
"""Ranges are widened only for a tenth less error: rounding makes up for part of what narrow ones clip."""


class InputObserver(MSEObserver):
    """Values for the search of ranges, and the extremes of all."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._bounds: tuple[Tensor, Tensor] | None = None

    def update(self, x: Tensor) -> None:
        super().update(x)
        lower, upper = self._extremes(x)
        if self._bounds is not None:
            lower, upper = torch.minimum(lower, self._bounds[0]), torch.maximum(upper, self._bounds[1])
        self._bounds = lower, upper

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Lower and upper, of the shape of :meth:`range`."""
        assert self._bounds is not None, 'extremes() before update()'
        return self._shaped(*self._bounds)


class Search:
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
        self.widening = 0.0
        self.kept: list[str] = []
        self.current = float('inf')
        self.found: dict[tuple[str, int], tuple[Tensor, Tensor]] = {}
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
        set_tensor_ranges(self.net, seen)
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
                self._start_weight(name, weight_rows(layer))
            if index == 0:
                projected = (time.perf_counter() - start) * len(self.names)
                self.every = max(1, round(projected / max(allowed, 1e-3)))
        fitting = int(self.left / (2 * self.forward_seconds + 1e-9))  # in FP32, and once quantized
        images = [image for image, _ in zip(self.images, range(min(_JUDGED, max(2, fitting))))]
        images = [image.to(next(self.net.parameters()).device) for image in images]
        with self.stages.stage('judging'), evaluating(self.net), floating_point(self.net):
            start = time.perf_counter()
            self.judged = [(image, self.net(image)) for image in images]
            self.forward_seconds = (time.perf_counter() - start) / max(1, len(images))
        self._widen(seen)

    def _widen(self, seen: Observations) -> None:
        """Choose how far all input ranges go from least squared error towards the extremes.

        What is tried first stays if there is no time to judge more: at many bits the extremes, which lose little
        there, while a search in a hurry sees too few of the large values.
        """
        inputs = {n: q for n in self.names if isinstance(q := self.layers[n].input_quantizer, LearnedRange)}
        fine = sum(q.num_bits >= _MANY_BITS for q in inputs.values()) * 2 > len(inputs)
        for tried, (title, widening) in enumerate(sorted(_WIDENINGS.items(), key=lambda w: w[1], reverse=fine)):
            if tried and self.left < 3 * len(self.judged) * self.forward_seconds:
                self.left_out[title] = f'{len(self.judged) * self.forward_seconds:.0f} s'
                continue
            self.widening = widening
            for name, quantizer in inputs.items():
                self._set_input(name, seen, quantizer.num_bits)
            with self.stages.stage('judging'):
                self.errors[title] = self._error()
        self.errors = {title: self.errors[title] for title in _WIDENINGS if title in self.errors}
        chosen, *wider = self.errors
        for title in wider:
            if self.errors[title] < _WIDER * self.errors[chosen]:
                chosen = title
        self.kept, self.current = [chosen], self.errors[chosen]
        self.widening = _WIDENINGS[chosen]
        for name, quantizer in inputs.items():
            self._set_input(name, seen, quantizer.num_bits)

    def _set_input(self, name: str, seen: Observations, bits: int) -> None:
        observer, quantizer = seen.observers[name], self.layers[name].input_quantizer
        assert isinstance(observer, InputObserver) and isinstance(quantizer, LearnedRange)
        if (name, bits) not in self.found:
            self.found[name, bits] = observer.search(bits, self.every)[:2]
        shape = quantizer.unit.shape
        bounds = [
            (found + self.widening * (extreme - found)).reshape(shape)
            for found, extreme in zip(self.found[name, bits], observer.extremes())
        ]
        quantizer.set_bits(bits)
        quantizer.set_range(*bounds)

    def _start_weight(self, name: str, weight: Tensor) -> None:
        quantizer = self.layers[name].weight_quantizer
        assert isinstance(quantizer, SymmetricRange)
        observer = MSEObserver(self.method.per_channel, quantizer.num_bits, True, quantizer.narrow_range)
        observer.update(weight)
        quantizer.set_range(*observer.range())

    def _error(self) -> float:
        """Mean squared error of the output over the judged images."""
        images, targets = zip(*self.judged)
        return output_error(self.net, images, targets)

    # -- stage 2 ---------------------------------------------------------------------------------------------------

    def choose_bits(self, seen: Observations) -> None:
        """Give each layer's input the bits that the output wants, under the mean that was asked for."""
        inputs = {n: q for n in self.names if isinstance(q := self.layers[n].input_quantizer, LearnedRange)}
        groups: dict[int, list[str]] = {}
        for name, quantizer in inputs.items():
            if 2 < quantizer.num_bits < 8:  # ends at 8 bits stay, and nothing is below 2
                groups.setdefault(quantizer.num_bits, []).append(name)
        if not groups:
            return
        trials = 3 * sum(map(len, groups.values())) * self.forward_seconds
        images = self.judged[: max(0, min(_WEIGHED, int(self.left / 4 / (trials + 1e-9))))]
        if not images:
            self.left_out['bits of each layer'] = f'{trials:.0f} s for one image'
            return
        macs = {layer.name: float(layer.macs) for layer in trace(self.net).layers}
        before = {name: copy.deepcopy(q.state_dict()) for name, q in inputs.items()}
        # A layer that reads a quantized tensor and comes to have as many bits would quantize twice in a row.
        most = TENSOR_BITS - 1 if tensor_quantizers(self.net) else 8
        for bits, names in groups.items():
            choices = tuple(b for b in (bits - 1, bits, bits + 1) if b <= most)
            errors = self._weigh(names, choices, images, seen)
            for name, chosen in allocate_bits(errors, bits, macs).items():
                self._set_input(name, seen, chosen)
        with self.stages.stage('judging'):
            self.errors[BITS] = self._error()
        if self.errors[BITS] <= self.current:
            self.kept.append(BITS)
            self.current = self.errors[BITS]
        else:
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
        with self.stages.stage('judging'):
            self.errors[title] = self._error()
        self.round_seconds, self.rounded = time.perf_counter() - start, names
        before_it, error = self.current, self.errors[title]
        if error < before_it:
            self.kept.append(title)
            self.current = error
            return error < before_it * _LEAST_GAIN
        for name, state in before.items():
            self.layers[name].load_state_dict(state)
        return False

    def _affordable(self) -> list[str]:
        """The layers whose rounding fits into half of what is left, those with the shortest columns first."""
        side = torch.ones(512, 512, device=next(self.net.parameters()).device)
        start = time.perf_counter()
        for _ in range(4):
            float((side @ side)[0, 0])  # waits for the device
        second = 4 * 2 * 512**3 / (time.perf_counter() - start + 1e-9)  # operations
        costs = {}
        for name in self.names:
            layer: Any = self.layers[name]
            roundable = isinstance(layer, (nn.Conv2d, nn.Linear)) and stores_weight(layer)
            if roundable and isinstance(layer.weight_quantizer, Quantizer):
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
        found = {'output_mse': dict(self.errors), 'kept': list(self.kept), 'left_out': dict(self.left_out)}
        return {**found, 'a_bits': bits}

    def report(self) -> None:
        lines = [
            f'  {stage:18}  {error:.4g}  {"kept" if stage in self.kept else "taken back"}'
            for stage, error in self.errors.items()
        ]
        lines += [f'  {what:18}  left out: {why}' for what, why in self.left_out.items()]
        bits: dict[int, int] = {}
        for value in self.choices()['a_bits'].values():
            bits[value] = bits.get(value, 0) + 1
        spread = ', '.join(f'{count} at {value}' for value, count in sorted(bits.items()))
        logger.info(
            'auto: output MSE against FP32 on %d images, after each stage:\n%s\n  bits of inputs: %s layers',
            len(self.judged), '\n'.join(lines), spread,
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
