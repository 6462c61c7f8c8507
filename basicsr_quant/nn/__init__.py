"""Layers that hold quantizers."""

from .qconv import QuantConv1d, QuantConv2d, QuantConv3d, conv_per_sample
from .qconv_transpose import QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
from .qlinear import QuantLinear
from .qproducts import QuantProducts, operands_of, quantized_products
from .quant_layer import QuantLayer, dense_rows, stores_weight, swapped, weight_rows
from .twins import twin_class
from .weight_mask import GROUPS, PriorityMask, RefinedMask, SparsityModule, WeightMask, density, group_sizes, priorities

__all__ = [
    'GROUPS',
    'PriorityMask',
    'QuantConv1d',
    'QuantConv2d',
    'QuantConv3d',
    'QuantConvTranspose1d',
    'QuantConvTranspose2d',
    'QuantConvTranspose3d',
    'QuantLayer',
    'QuantLinear',
    'QuantProducts',
    'RefinedMask',
    'SparsityModule',
    'WeightMask',
    'conv_per_sample',
    'dense_rows',
    'density',
    'group_sizes',
    'operands_of',
    'priorities',
    'quantized_products',
    'stores_weight',
    'swapped',
    'twin_class',
    'weight_rows',
]
