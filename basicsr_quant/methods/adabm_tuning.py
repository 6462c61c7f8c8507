"""AdaBM's fine-tuning: weight ranges, activation ranges and bit mappings in turn, against the FP32 network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..network.calibration import evaluating
from ..network.stages import Stages
from ..network.surgery import quant_layers
from ..network.teacher import Teacher, collect, feature_distance
from ..quantizers import AdaptiveRange, ImageBits, RelativeRange

GROUPS = ('weight ranges', 'activation ranges', 'bit mappings')

@dataclass(frozen=True)
class Tuning:
    """How ranges and mappings are tuned.

    Args:
        cycle: Which groups learn in an epoch; epoch e takes entry e modulo the length.
        epochs: Passes over the images.
        batch: Images a step.
        rates: Learning rates of Adam: of weight ranges and activation ranges, in units of each range's calibrated
            width, of the thresholds of complexity, of the layer factors.
        decay: What a group's rate is multiplied by after an epoch of its own.
        feature_weight, bit_weight: Weights of the feature loss and of the bit loss, for an L1 loss in 0-255.
        absolute: Rates of ranges are in the units of the features and weights themselves (the published code).
        per_batch: Divide the feature loss by the batch once more (the published code).
    """

    cycle: tuple[tuple[str, ...], ...] = tuple((name,) for name in GROUPS)
    epochs: int = 10
    batch: int = 2
    rates: tuple[float, float, float, float] = (0.01, 0.01, 0.1, 0.01)
    decay: float = 0.9
    feature_weight: float = 10.0
    bit_weight: float = 50.0
    absolute: bool = False
    per_batch: bool = False


class Tuner:
    """Tunes a calibrated network.

    Args:
        net: The quantized network.
        teacher: Images and the FP32 network's answers.
        tuning: How.
    """

    def __init__(self, net: nn.Module, teacher: Teacher, tuning: Tuning) -> None:
        self.net, self.teacher, self.tuning = net, teacher, tuning
        layers = quant_layers(net).values()
        inputs = [q.input_quantizer for q in layers if isinstance(q.input_quantizer, RelativeRange)]
        weights = [q.weight_quantizer for q in layers if isinstance(q.weight_quantizer, RelativeRange)]
        self.ranges = [*weights, *inputs]
        self.adaptive = [q for q in inputs if isinstance(q, AdaptiveRange)]
        self.mappings = [m for m in net.modules() if isinstance(m, ImageBits)]
        rate_w, rate_a, rate_image, rate_layer = tuning.rates
        thresholds = [p for m in self.mappings for p in m.parameters()]
        factors = [q.layer_factor for q in self.adaptive]
        mapping_groups = [{'params': factors, 'lr': rate_layer}]
        mapping_groups += [{'params': thresholds, 'lr': rate_image}] if thresholds else []
        self.groups = {
            'weight ranges': self._range_groups(weights, rate_w),
            'activation ranges': self._range_groups(inputs, rate_a),
            'bit mappings': mapping_groups if factors else [],
        }
        self.optimizers = {name: torch.optim.Adam(groups) for name, groups in self.groups.items() if groups}

    def _range_groups(self, quantizers: Iterable[RelativeRange], rate: float) -> list[dict[str, object]]:
        groups: list[dict[str, object]] = []
        for quantizer in quantizers:
            width = float(quantizer.unit.mean()) if self.tuning.absolute else 1.0
            groups.append({'params': quantizer.range_parameters(), 'lr': rate / width})
        return groups

    def run(self, stages: Stages) -> None:
        """Go through all epochs, one stage of ``stages`` for each kind of epoch."""
        draw = torch.Generator().manual_seed(0)
        for epoch in range(self.tuning.epochs):
            names = [name for name in self.tuning.cycle[epoch % len(self.tuning.cycle)] if name in self.optimizers]
            if not names:
                continue
            with self.learning(names) as step:
                for indices in stages.over(f'tuning {" and ".join(names)}', self.teacher.draw(self.tuning.batch, draw)):
                    step(indices)
            for name in names:
                for group in self.optimizers[name].param_groups:
                    group['lr'] *= self.tuning.decay

    @contextmanager
    def learning(self, names: Sequence[str]) -> Iterator[Callable[[list[int]], Tensor]]:
        """Within it the groups ``names`` learn, by calls of the function it gives, and everything else rests."""
        own = [p for name in names for group in self.groups[name] for p in group['params']]  # type: ignore[attr-defined]
        blocks = self.teacher.blocks
        with torch.enable_grad(), evaluating(self.net), _only(own, self.net), collect(self.net, blocks) as seen:
            yield lambda indices: self.step(indices, names, seen)

    def step(self, indices: list[int], learning: Sequence[str], seen: list[Tensor]) -> Tensor:
        """One step of the groups that are learning, on the images ``indices``; returns its loss."""
        images, wanted, features = self.teacher.batch(indices)
        seen.clear()
        output = self.net(images)
        loss = 255.0 * (output - wanted).abs().mean()
        if features and self.tuning.feature_weight:
            weight = self.tuning.feature_weight / (len(images) if self.tuning.per_batch else 1)
            loss = loss + weight * feature_distance(seen, features)
        if 'bit mappings' in learning:
            loss = loss + self.tuning.bit_weight * self.excess_bits()
        for name in learning:
            self.optimizers[name].zero_grad()
        loss.backward()
        for name in learning:
            self.optimizers[name].step()
        for quantizer in self.ranges:
            quantizer.clamp_range()
        for mapping in self.mappings:
            mapping.keep_order()
        return loss.detach()

    def excess_bits(self) -> Tensor:
        """max(mean bits - base bits, 0) of the last pass, over layers and images."""
        bits = torch.stack([q.context.bits[q.name].mean() for q in self.adaptive if q.context is not None])
        base = sum(q.num_bits for q in self.adaptive) / len(self.adaptive)
        return (bits.mean() - base).clamp(min=0.0)


@contextmanager
def _only(own: Iterable[nn.Parameter], net: nn.Module) -> Iterator[None]:
    """Within it the parameters ``own`` of ``net`` want a gradient and no others do."""
    before = {p: p.requires_grad for p in net.parameters()}
    for parameter in before:
        parameter.requires_grad_(False)
    for parameter in own:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, wanted in before.items():
            parameter.requires_grad_(wanted)
        for parameter in own:
            parameter.grad = None
