"""A linear layer with quantized input and weight."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from .quant_layer import QuantLayer


class QuantLinear(QuantLayer, nn.Linear):
    """``Q_a(x) Q_w(mask W)^T + b`` for x of shape (..., in_features); the bias stays in floating point."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.input_quantizer(x), self.quantized_weight(), self.bias)
