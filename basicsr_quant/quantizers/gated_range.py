"""DDTB's activations: learned bounds that a small gate widens or narrows for each image."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adaptive_range import per_sample
from .context import floating_bytes
from .fake_quantize import fake_quantize
from .learned_range import LearnedRange

_HIDDEN = 32
_GATE_BITS = 2
_EPS, _MOMENTUM = 1e-5, 0.1


class BoundGate(nn.Module):
    """Maps the channel means of a layer's input to two logits an image: 2-bit linear layer, BatchNorm, ReLU, 2-bit
    linear layer, without biases (the published 1x1 convolutions on one pixel).

    Weights: grid {-m, 0, m}, m = max |W| of the current weight. Inputs: 2 bits between the extremes of each image's
    own values, zero among the levels; gradients are straight-through.

    Deviations from the published code: it detaches the quantized inputs, so that its first layer and BatchNorm never
    learn, and takes the extremes over the batch, so that an image's bounds depend on its neighbours. A batch of one
    image trains with the running statistics, where the published BatchNorm fails. In distributed training each rank
    has the statistics of its own batches, as with any BatchNorm, and the first one's are saved.

    Args:
        channels: Channels C of the layer's input.
        seed: Starts a random state of its own; weights are uniform in +-1/sqrt(inputs), as published.

    State: ``first`` (32, C), ``second`` (2, 32), and BatchNorm's ``weight``, ``bias``, ``mean``, ``variance`` (32,).
    """

    mean: Tensor
    variance: Tensor

    def __init__(self, channels: int, seed: int = 0) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)

        def uniform(outputs: int, inputs: int) -> nn.Parameter:
            return nn.Parameter((2 * torch.rand(outputs, inputs, generator=draw) - 1) / math.sqrt(inputs))

        self.first, self.second = uniform(_HIDDEN, channels), uniform(2, _HIDDEN)
        self.weight, self.bias = nn.Parameter(torch.ones(_HIDDEN)), nn.Parameter(torch.zeros(_HIDDEN))
        self.register_buffer('mean', torch.zeros(_HIDDEN))
        self.register_buffer('variance', torch.ones(_HIDDEN))

    def forward(self, means: Tensor) -> Tensor:
        """Channel means (N, C) -> logits (N, 2): of the upper bound, of the lower one."""
        hidden = functional.linear(_rounded_rows(means), _ternary(self.first))
        batched = self.training and len(hidden) > 1
        hidden = functional.batch_norm(
            hidden, self.mean, self.variance, self.weight, self.bias, batched, _MOMENTUM, _EPS
        )
        return functional.linear(_rounded_rows(hidden.relu()), _ternary(self.second))

    @property
    def macs(self) -> int:
        """Multiply-accumulates for one image."""
        return self.first.numel() + self.second.numel()

    @property
    def stored_bytes(self) -> int:
        """Weights at two bits, BatchNorm as it is."""
        weights = sum(math.ceil(w.numel() * _GATE_BITS / 8) for w in (self.first, self.second))
        return weights + sum(t.numel() * t.element_size() for t in (self.weight, self.bias, self.mean, self.variance))


def _rounded_rows(x: Tensor) -> Tensor:
    lower, upper = x.detach().aminmax(dim=1, keepdim=True)
    return fake_quantize(x, lower, upper, _GATE_BITS, zero_point='integer')


def _ternary(weight: Tensor) -> Tensor:
    bound = weight.detach().abs().amax()
    return fake_quantize(weight, -bound, bound, _GATE_BITS, zero_point='integer', narrow_range=True)


class GatedRange(LearnedRange):
    r"""Range [s_l l, s_u u], l and u learned, s = 2 sigmoid(:class:`BoundGate`\ (channel means)) for each image (DDTB).

    Only a layer that was selected has its gate in use; any other one computes what :class:`LearnedRange` does. While
    the network's ``warm_up`` measure is 0 every s is 1, and from then on as the gate says. The gate reads its input as
    a constant. Its logits of a pass, (N, 2), stand in ``context.gates``.

    Args:
        bits: Bits of the grid.
        channels: Channels of the input.
        name: The layer.
        last: Whether channels are the last dimension (linear layers), not the second one.

    State beside the range: ``gate``, and ``gated`` (bool, 0-dim), whether the layer was selected.
    """

    gated: Tensor

    def __init__(self, bits: int, channels: int, name: str = '', last: bool = False, **kwargs: Any) -> None:
        super().__init__(bits, **kwargs)
        self.name, self.last = name, last
        self.gate = BoundGate(channels, seed=zlib.crc32(name.encode()))
        self.register_buffer('gated', torch.tensor(False))

    use_gate = False

    def select(self, gated: bool) -> None:
        """Take the gate of this layer into use, or out of it."""
        self.gated.fill_(gated)
        self.apply_selection()

    def apply_selection(self) -> None:
        """Read the saved flag: ``forward`` must not read a tensor to decide."""
        self.use_gate = bool(self.gated)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.gated.is_meta:
            self.apply_selection()

    def logits(self, x: Tensor) -> Tensor:
        """The gate's logits (N, 2) for a layer's input of N images, which lie one after another in dimension 0."""
        if self.context is None or self.context.input is None:
            raise RuntimeError('a gate of bounds reads one image at a time, so it works inside its network only')
        pixels = range(1, x.dim() - 1) if self.last else range(2, x.dim())
        rows = x.detach().to(self.unit.dtype)
        rows = rows.mean(dim=tuple(pixels)) if pixels else rows
        images = len(self.context.input)
        return self.gate(rows.reshape(images, -1, rows.shape[1]).mean(1))  # type: ignore[no-any-return]

    def factors(self, x: Tensor) -> Tensor:
        """s_u and s_l of each image, (N, 2); leaves the logits in the context."""
        logits = self.logits(x).to(self.unit.dtype)
        assert self.context is not None
        self.context.gates[self.name] = logits
        return 1 + self.context.read('warm_up') * (2 * logits.sigmoid() - 1)

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled or not self.use_gate:
            return super().forward(x)
        factors = self.factors(x)
        lower, upper = self.bounds(x)
        lower, upper = per_sample(factors[:, 1] * lower, x), per_sample(factors[:, 0] * upper, x)
        bits = torch.full_like(lower, self.num_bits, requires_grad=False)  # a tensor: sample by sample is faster
        return fake_quantize(x, lower, upper, bits, zero_point=self.zero_point)

    @property
    def stored_bytes(self) -> int:
        ranges = super().stored_bytes - floating_bytes(self.gate)
        return ranges + (self.gate.stored_bytes if self.use_gate else 0)

    @property
    def macs(self) -> int:
        return self.gate.macs if self.use_gate else 0
