"""The base class of quantizers: bits, a grid, and bounds that subclasses give."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .context import QuantContext, floating_bytes
from .fake_quantize import fake_quantize


class Quantizer(nn.Module):
    """Fake-quantizes its input between the bounds that :meth:`bounds` gives.

    State dict: ``bits`` (int64, 0-dim), ``calibrated`` (bool, 0-dim) and the subclass's range tensors.

    Args:
        bits: Bits of the grid, 2 to 8.
        zero_point: ``float`` or ``integer``, see :func:`fake_quantize`.
        narrow_range: Leave out one level, see :func:`fake_quantize`.

    Attributes:
        enabled: While False the input passes through unchanged (calibration looks at the FP32 network). Not state.
        context: What the current forward pass shares; set by the surgery. Not state.
    """

    bits: Tensor
    calibrated: Tensor

    def __init__(self, bits: int, *, zero_point: str = 'float', narrow_range: bool = False) -> None:
        super().__init__()
        self.num_bits = bits
        self.zero_point = zero_point
        self.narrow_range = narrow_range
        self.enabled = True
        self.context: QuantContext | None = None
        self.register_buffer('bits', torch.tensor(bits))
        self.register_buffer('calibrated', torch.tensor(False))

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return lower and upper, in units of ``x``, with the gradients that the method wants."""
        raise NotImplementedError

    def set_range(self, lower: Tensor, upper: Tensor) -> None:
        """Take over a calibrated range (in place, so that an optimizer built earlier keeps its parameters)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        lower, upper = self.bounds(x)
        return fake_quantize(
            x, lower, upper, self.num_bits, zero_point=self.zero_point, narrow_range=self.narrow_range
        )

    def set_bits(self, bits: int) -> None:
        """Change the grid to ``bits`` bits; the range stays."""
        self.num_bits = bits
        self.bits.fill_(bits)

    @property
    def stored_bytes(self) -> int:
        """Bytes that the quantizer adds to a network: its floating-point tensors; flags and counts are none."""
        return floating_bytes(self)

    @property
    def macs(self) -> int:
        """Multiply-accumulates that choosing a range takes for each image, which no layer's MACs hold."""
        return 0

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.bits.is_meta:
            self.num_bits = int(self.bits)  # a method may have chosen other bits than the plan's

    def extra_repr(self) -> str:
        return f'bits={self.num_bits}, zero_point={self.zero_point}' + (', narrow' if self.narrow_range else '')


class RelativeRange(Quantizer):
    """A quantizer whose range parameters are stored relative to their calibrated width.

    ``unit`` (a buffer) is the calibrated width of the range; parameters are multiples of it. An optimizer's absolute
    step is thereby a relative one, whatever the scale of the network's features (0-1, 0-255): decision 6 of the
    design. Bounds are ``parameter * unit``.
    """

    unit: Tensor

    def __init__(self, bits: int, shape: tuple[int, ...] = (), **kwargs: object) -> None:
        super().__init__(bits, **kwargs)  # type: ignore[arg-type]
        self.register_buffer('unit', torch.ones(shape))

    def _set_unit(self, width: Tensor) -> None:
        # A layer that calibration saw as constant keeps the unit 1: its width is no measure of anything.
        width = width.detach().to(self.unit)
        self.unit.copy_(torch.where(width > 0, width, torch.ones_like(width)).expand_as(self.unit))
        self.calibrated.fill_(True)

    def range_parameters(self) -> list[nn.Parameter]:
        """The parameters that an optimizer treats as ranges."""
        return list(self.parameters(recurse=False))

    def clamp_range(self) -> None:
        """Keep the range open and positive; called after each optimizer step."""
