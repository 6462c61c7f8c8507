"""The integer grids of a quantized network: what an engine is given as scale, zero point and codes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..errors import QuantError
from ..quantizers import OffsetRange, Quantizer, align_zero_point, num_steps

_EXACT = 1e-3
"""Codes that lie closer than this to whole numbers are whole: float32 bounds do not give them better."""


@dataclass(frozen=True)
class Grid:
    """An activation's grid: value = scale (code - zero_point), low <= code <= high.

    Args:
        scale: A float32 value.
        zero_point, low, high: Codes of the container, uint8 or int8 (``signed``).
        shift: How far the grid lies from the checkpoint's own, in steps of that: 0 where it is the same grid.
    """

    scale: float
    zero_point: int
    low: int
    high: int
    signed: bool = False
    shift: float = 0.0

    @property
    def clips(self) -> bool:
        """Whether codes end before the container does, so that an integer Clip has to stand behind the quantizer."""
        return (self.low, self.high) != ((-128, 127) if self.signed else (0, 255))

    def arguments(self) -> tuple[float, int, int, int, bool]:
        """The arguments of the operator ``basicsr_quant::activation`` behind its input."""
        return self.scale, self.zero_point, self.low, self.high, self.signed


def activation_grid(name: str, quantizer: Quantizer, engine: str) -> Grid:
    """The grid of a calibrated activation quantizer.

    A grid with a float zero point is aligned to an integer one, see :func:`align_zero_point`. TensorRT has zero point
    0 only: a grid whose codes fit int8 around zero stays as it is, any other one becomes int8 over its larger side.

    Raises:
        QuantError: if the range is not calibrated, follows the image, or is one for each channel.
    """
    lower, upper = _static_bounds(name, quantizer)
    n = int(num_steps(quantizer.num_bits, quantizer.narrow_range))
    step = (upper - lower) / n
    aligned_lower, aligned_upper = align_zero_point(lower, upper, quantizer.num_bits, quantizer.narrow_range)
    scale = float(((aligned_upper - aligned_lower) / n).float())
    if not (math.isfinite(scale) and scale > 0):
        raise QuantError(f"the input range of '{name}' is [{float(lower):g}, {float(upper):g}] and has no width")
    zero_point = min(max(round(float(-aligned_lower) / scale), 0), n)
    shift = float((aligned_lower - lower).abs() / step) if quantizer.zero_point == 'float' else 0.0
    shift = shift if shift > _EXACT else 0.0
    if engine != 'tensorrt':
        return Grid(scale, zero_point, 0, n, shift=shift)
    if n - zero_point <= 127 and zero_point <= 128:
        return Grid(scale, 0, -zero_point, n - zero_point, True, shift)
    side = max(zero_point, n - zero_point) * scale
    return Grid(float(np.float32(side / 127)), 0, -128, 127, True, max(shift, 0.5))


def _static_bounds(name: str, quantizer: Quantizer) -> tuple[Tensor, Tensor]:
    if not bool(quantizer.calibrated):
        raise QuantError(f"'{name}' has no range: this checkpoint was never calibrated, or never ran that layer")
    kind = type(quantizer)
    if kind is OffsetRange and (quantizer.use_shift or quantizer.use_scale):
        raise QuantError(
            f"'{name}' has a learned shift or scale for each channel (odm offsets), which no integer engine computes; "
            'train with odm: {offsets: false}'
        )
    probes = [torch.linspace(-1, 1, 64).reshape(1, 4, 4, 4) * size for size in (1.0, 100.0)]
    with torch.no_grad():
        first, second = (tuple(b.double() for b in quantizer.bounds(probe)) for probe in probes)
    own_forward = kind.forward not in (Quantizer.forward, OffsetRange.forward)
    if own_forward or any(not torch.equal(a, b) for a, b in zip(first, second)):
        raise QuantError(f"the range of '{name}' follows each image ({kind.__name__}); only static ranges export")
    if any(bound.numel() != 1 for bound in first):
        raise QuantError(f"'{name}' has one range for each channel of its input; engines take one for the tensor")
    return first[0].reshape(()), first[1].reshape(())


@dataclass(frozen=True)
class WeightCodes:
    """A weight as an engine stores it: value = scale code, zero point 0.

    Args:
        codes: int8, the weight's shape.
        scale: float32, 0-dim, or (C,) for one scale an output channel.
        bits: Bits that the grid was trained with.
        halved: The codes are odd numbers at half the step: a grid of 2^b levels without zero.
        error: Largest difference from the fake-quantized weight in steps; 0 where the codes are exact.
    """

    codes: Tensor
    scale: Tensor
    bits: int
    halved: bool = False
    error: float = 0.0


@torch.no_grad()
def weight_codes(name: str, weight: Tensor, quantizer: Quantizer) -> WeightCodes:
    """Integer codes of a fake-quantized weight.

    Grids with zero among their levels are whole multiples of the step. Those without (2^b levels on [-u, u]) are odd
    multiples of half of it, which fit int8 below 8 bits. What fits neither (8 bits without zero, any other offset): the
    weight itself is rounded to 255 levels over the same range, with the error stated. Rounding what is rounded already
    would move every half step towards zero, which at 8 bits costs more than the bits do.

    Raises:
        QuantError: if the weight's range is not calibrated, or a channel has no range of its own.
    """
    if not bool(quantizer.calibrated):
        raise QuantError(f"the weight of '{name}' has no range: this checkpoint was never calibrated")
    lower, upper = (bound.double() for bound in quantizer.bounds(weight))
    if quantizer.zero_point == 'integer':
        lower, upper = align_zero_point(lower, upper, quantizer.num_bits, quantizer.narrow_range)
    if lower.numel() not in (1, weight.shape[0]):
        raise QuantError(f"the weight of '{name}' has {lower.numel()} ranges; engines take one, or one a channel")
    step = (upper - lower) / num_steps(quantizer.num_bits, quantizer.narrow_range)
    quantized = quantizer(weight).double()
    for halved, unit in ((False, step), (True, step / 2)):
        codes = quantized / unit
        error = (codes - codes.round()).abs().max()
        if error < _EXACT and codes.abs().max() < 128.5:
            return WeightCodes(codes.round().to(torch.int8), _vector(unit), quantizer.num_bits, halved)
    unit = torch.maximum(lower.abs(), upper.abs()) / 127
    codes = (weight.double() / unit).round().clamp(-127, 127)
    error = ((codes * unit - quantized).abs() / step).max()
    return WeightCodes(codes.to(torch.int8), _vector(unit), quantizer.num_bits, error=float(error))


def _vector(unit: Tensor) -> Tensor:
    return unit.reshape(()).float() if unit.numel() == 1 else unit.reshape(-1).float()
