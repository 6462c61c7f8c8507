"""Convolutions with quantized input and weight."""

from __future__ import annotations

from torch import Tensor, nn

from .quant_layer import QuantLayer


class _QuantConv(QuantLayer):
    """``conv(Q_a(x), Q_w(W), b)``; the bias stays in floating point.

    Zero padding is added after the quantizer, as in the published codes. It is on the activation's grid only with
    ``zero_point: integer``.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.input_quantizer(x), self.quantized_weight(), self.bias)  # type: ignore


class QuantConv1d(_QuantConv, nn.Conv1d):
    """For inputs (N, C, L)."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """For inputs (N, C, H, W)."""


class QuantConv3d(_QuantConv, nn.Conv3d):
    """For inputs (N, C, D, H, W)."""
