"""Convolutions with quantized input and weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from .quant_layer import QuantLayer


class _QuantConv(QuantLayer):
    """``conv(Q_a(x), Q_w(W), b)``; the bias stays in floating point.

    Zero padding is added after the quantizer, as in the published codes. It is on the activation's grid only with
    ``zero_point: integer``.
    """

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_quantizer(x)  # first: it may choose the bits of the weight
        return self._conv_forward(x, self.quantized_weight(), self.bias)  # type: ignore


class QuantConv1d(_QuantConv, nn.Conv1d):
    """For inputs (N, C, L)."""


class QuantConv2d(_QuantConv, nn.Conv2d):
    """For inputs (N, C, H, W). A weight quantizer may give each image a weight of its own, see
    :func:`conv_per_sample`."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if weight.dim() == self.weight.dim():
            return super()._conv_forward(x, weight, bias)
        return conv_per_sample(self, x, weight, bias)


class QuantConv3d(_QuantConv, nn.Conv3d):
    """For inputs (N, C, D, H, W)."""


def conv_per_sample(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The convolution of ``layer`` with a weight of its own for each sample, as one grouped convolution.

    Args:
        layer: A ``Conv2d``, for its stride, padding, dilation and groups.
        x: (N, C, H, W).
        weight: (N, O, C / groups, k, k).
        bias: (O,) or None.

    Returns:
        (N, O, H', W').
    """
    count, padding = len(x), layer.padding
    if layer.padding_mode != 'zeros':
        x = functional.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    out = functional.conv2d(
        x.flatten(0, 1)[None],
        weight.flatten(0, 1),
        None if bias is None else bias.repeat(count),
        layer.stride,
        padding,
        layer.dilation,
        layer.groups * count,
    )
    return out[0].unflatten(0, (count, -1))
