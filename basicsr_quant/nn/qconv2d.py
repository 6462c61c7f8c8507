"""A convolution with quantized input and weight."""

from __future__ import annotations

from torch import Tensor, nn

from .quant_layer import QuantLayer


class QuantConv2d(QuantLayer, nn.Conv2d):
    """``conv2d(Q_a(x), Q_w(W), b)``; the bias stays in floating point.

    Zero padding is added after the quantizer, as in the published codes. It is on the activation's grid only with
    ``zero_point: integer``.
    """

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(self.input_quantizer(x), self.weight_quantizer(self.weight), self.bias)
