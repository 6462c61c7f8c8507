"""Layers that hold quantizers."""

from .qconv import QuantConv1d, QuantConv2d, QuantConv3d, conv_per_sample
from .qconv_transpose import QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
from .qlinear import QuantLinear
from .qproducts import QuantProducts, operands_of, quantized_products
from .quant_layer import QuantLayer, stores_weight, weight_rows
from .twins import twin_class

__all__ = [
    'QuantConv1d',
    'QuantConv2d',
    'QuantConv3d',
    'QuantConvTranspose1d',
    'QuantConvTranspose2d',
    'QuantConvTranspose3d',
    'QuantLayer',
    'QuantLinear',
    'QuantProducts',
    'conv_per_sample',
    'operands_of',
    'quantized_products',
    'stores_weight',
    'twin_class',
    'weight_rows',
]
