"""Layers that hold quantizers."""

from torch import nn

from .qconv2d import QuantConv2d
from .qlinear import QuantLinear
from .qproducts import QuantProducts, operands_of, quantized_products
from .quant_layer import QuantLayer

QUANTIZED_TWINS: dict[type[nn.Module], type[QuantLayer]] = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear}
"""Which class stands in for which. Exact types only: a subclass may have a forward of its own."""

__all__ = [
    'QUANTIZED_TWINS',
    'QuantConv2d',
    'QuantLayer',
    'QuantLinear',
    'QuantProducts',
    'operands_of',
    'quantized_products',
]
