"""Grids that follow the standard deviation of the current tensor: the activations and weights of DAQ."""

from __future__ import annotations

import torch
from torch import Tensor

from .quantizer import Quantizer
from .standardized import allocate_bits, channel_statistics, quantize_standardized, quantize_statistics
from .step_tables import MAX_BITS, step_table


class StandardizedQuantizer(Quantizer):
    """A grid whose step is ``steps[b - 1]`` times a standard deviation of the current tensor.

    State: ``steps`` (8,), the step in units of the deviation for 1 to 8 bits.

    Args:
        bits: Bits of the grid.
    """

    steps: Tensor

    def __init__(self, bits: int) -> None:
        super().__init__(bits)
        self.register_buffer('steps', torch.tensor(step_table('gaussian')))

    @torch.no_grad()
    def set_steps(self, steps: Tensor | tuple[float, ...]) -> None:
        """Take over steps for 1 to 8 bits, in units of the deviation."""
        self.steps.copy_(torch.as_tensor(steps))
        self.calibrated.fill_(True)

    @property
    def step(self) -> Tensor:
        """The step for this quantizer's own bits, in units of the deviation."""
        return self.steps[self.num_bits - 1]

    def grid(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """Mean (None: the grid starts at zero) and step for the values of ``x``."""
        raise NotImplementedError

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mean, step = self.grid(x)
        if mean is None:
            return torch.zeros_like(step), (2.0**self.num_bits - 1) * step
        half = (2.0 ** (self.num_bits - 1) - 0.5) * step
        return mean - half, mean + half

    def set_range(self, lower: Tensor, upper: Tensor) -> None:
        """Nothing to take over: the range is a function of the tensor. :meth:`set_steps` sets its width."""


class DistributionRange(StandardizedQuantizer):
    r"""DAQ's activations: every channel of every sample on a grid of its own mean and deviation.

    Signed inputs: 2^b levels mu + (k - 1/2) c sigma, k = 1 - L ... L, L = 2^(b-1), the grid of
    :func:`fake_quantize` between mu -+ (L - 1/2) c sigma. Rectified inputs: k c sigma, k = 0 ... 2^b - 1, sigma over
    the positive entries. See :func:`channel_statistics` and :func:`quantize_standardized` (identity gradient).
    The values are per image: the output depends on how an image is cut into patches.

    Args:
        bits: Bits of the grid.
        rectified: The input follows a ReLU (:attr:`LayerPlan.rectified`).
        stat_bits: Bits of mu and sigma themselves, see :func:`quantize_statistics`; 32 leaves them in floating point.
        mixed: Bits of each channel from its relative sensitivity, see :func:`allocate_bits`.
        published: The published code: no clamp above for rectified inputs, mu not quantized.
        name: Under which the mean bits of each sample stand in ``context.bits`` where ``mixed``.
    """

    def __init__(
        self,
        bits: int,
        rectified: bool = False,
        stat_bits: int = 32,
        mixed: bool = False,
        published: bool = False,
        name: str = '',
    ) -> None:
        super().__init__(bits)
        self.rectified, self.stat_bits, self.mixed, self.published, self.name = (
            rectified, stat_bits, mixed, published, name,
        )  # fmt: skip

    def statistics(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        """mu and sigma (N, C, 1, 1), quantized to ``stat_bits``."""
        mean, deviation = channel_statistics(x, self.rectified)
        if self.stat_bits <= MAX_BITS:
            # The published code's table, one bit early, for statistics too.
            steps = step_table('gaussian', reference=self.published)[self.stat_bits - 1]
            deviation = quantize_statistics(deviation, steps, self.stat_bits, self.published)
            if mean is not None and not self.published:
                mean = quantize_statistics(mean, steps, self.stat_bits)
        return mean, deviation

    def grid(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        mean, deviation = self.statistics(x)
        return mean, self.step * deviation

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        if not self.mixed:
            return quantize_standardized(x, *self.grid(x), self.num_bits, clamp=not self.published)
        mean, deviation = self.statistics(x)
        bits = allocate_bits(deviation, self.num_bits)
        if self.context is not None and self.name:
            self.context.bits[self.name] = bits.flatten(1).mean(dim=1)
        step = self.steps[bits.long() - 1] * deviation
        return quantize_standardized(x, mean, step, bits)

    def extra_repr(self) -> str:
        parts = [super().extra_repr(), 'rectified' if self.rectified else 'signed']
        parts += [f'stat_bits={self.stat_bits}'] if self.stat_bits <= MAX_BITS else []
        return ', '.join(parts + (['mixed'] if self.mixed else []))


class DistributionWeight(StandardizedQuantizer):
    """DAQ's weights: 2^b levels (k - 1/2) c std(W) around zero, clipped at the outermost, identity gradient.

    Zero is not a level. The deviation follows the current weight.

    Args:
        bits: Bits of the grid.
        per_channel: A deviation for each output channel. The published code has one for the layer.
    """

    def __init__(self, bits: int, per_channel: bool = False) -> None:
        super().__init__(bits)
        self.per_channel = per_channel

    def grid(self, x: Tensor) -> tuple[Tensor | None, Tensor]:
        weight = x.detach().to(torch.promote_types(x.dtype, torch.float32))
        rows = weight.flatten(1) if self.per_channel else weight.reshape(1, -1)
        deviation = rows.std(dim=1, correction=min(1, rows.shape[1] - 1))
        deviation = deviation.reshape(-1, *[1] * (weight.dim() - 1))
        return torch.zeros_like(deviation), self.step * deviation

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        return quantize_standardized(x, *self.grid(x), self.num_bits)
