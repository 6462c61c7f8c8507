"""Transposed convolutions with quantized input and weight."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional

from .quant_layer import QuantLayer


class _QuantConvTranspose(QuantLayer):
    """``conv_transpose(Q_a(x), Q_w(W), b)``; the bias stays in floating point.

    A range per channel is one for each output channel, as for any convolution; the weight quantizer is given
    :func:`~.quant_layer.weight_rows`.
    """

    function: ClassVar[Any]
    dimensions: ClassVar[int]

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        layer: Any = self
        places = (layer.stride, layer.padding)
        extra = layer._output_padding(x, output_size, *places, layer.kernel_size, self.dimensions, layer.dilation)
        return self.function(  # type: ignore[no-any-return]
            self.input_quantizer(x), self.quantized_weight(), layer.bias, *places, extra, layer.groups, layer.dilation
        )


class QuantConvTranspose1d(_QuantConvTranspose, nn.ConvTranspose1d):
    """For inputs (N, C, L)."""

    function = staticmethod(functional.conv_transpose1d)
    dimensions = 1


class QuantConvTranspose2d(_QuantConvTranspose, nn.ConvTranspose2d):
    """For inputs (N, C, H, W)."""

    function = staticmethod(functional.conv_transpose2d)
    dimensions = 2


class QuantConvTranspose3d(_QuantConvTranspose, nn.ConvTranspose3d):
    """For inputs (N, C, D, H, W)."""

    function = staticmethod(functional.conv_transpose3d)
    dimensions = 3
