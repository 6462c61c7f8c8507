"""The operators that an integer plan adds to a graph: what they compute in floating point."""

from __future__ import annotations

import torch
from torch import Tensor

NAMESPACE = 'basicsr_quant'


@torch.library.custom_op(f'{NAMESPACE}::activation', mutates_args=())
def activation(x: Tensor, scale: float, zero_point: int, low: int, high: int, signed: bool) -> Tensor:
    """Round to a grid: scale (clamp(round(x / scale) + zero_point, low, high) - zero_point).

    In an ONNX file this is QuantizeLinear, Clip where the container has more codes than the grid, DequantizeLinear.
    """
    codes = (x / scale).round_().add_(zero_point).clamp_(low, high)
    return codes.sub_(zero_point).mul_(scale)


@activation.register_fake
def _(x: Tensor, scale: float, zero_point: int, low: int, high: int, signed: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(f'{NAMESPACE}::integers', mutates_args=())
def integers(x: Tensor, scale: float, zero_point: int, low: int, high: int, signed: bool) -> Tensor:
    """The same grid without its scale: whole numbers, clamp(round(x / scale) + zero_point, low, high) - zero_point.

    Sums of products of whole numbers are exact in float32 below 2^24, in whatever order an engine adds them.
    """
    return (x / scale).round_().add_(zero_point).clamp_(low, high).sub_(zero_point)


@integers.register_fake
def _(x: Tensor, scale: float, zero_point: int, low: int, high: int, signed: bool) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op(f'{NAMESPACE}::constant', mutates_args=())
def constant(codes: Tensor, scale: Tensor) -> Tensor:
    """scale codes for a weight (int8) or bias (int32); a scale of (C,) goes along dimension 0.

    In an ONNX file this is DequantizeLinear.
    """
    return codes.to(scale.dtype) * along_first(scale, codes)


@constant.register_fake
def _(codes: Tensor, scale: Tensor) -> Tensor:
    return torch.empty(codes.shape, dtype=scale.dtype, device=codes.device)


@torch.library.custom_op(f'{NAMESPACE}::whole', mutates_args=())
def whole(codes: Tensor) -> Tensor:
    """Codes as whole numbers in float32.

    In an ONNX file this is Cast, which engines compute at load. A DequantizeLinear they leave where it is, and the
    layer behind it in a slower form, for weights that are no constants.
    """
    return codes.to(torch.float32, copy=True)


@whole.register_fake
def _(codes: Tensor) -> Tensor:
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)


@torch.library.custom_op(f'{NAMESPACE}::codes', mutates_args=())
def codes(x: Tensor, scale: float, zero_point: int, low: int, high: int, signed: bool) -> Tensor:
    """The codes of a grid as they are stored: clamp(round(x / scale) + zero_point, low, high), uint8 or int8.

    In an ONNX file this is QuantizeLinear, and Clip.
    """
    found = (x / scale).round_().add_(zero_point).clamp_(low, high)
    return found.to(torch.int8 if signed else torch.uint8)


@codes.register_fake
def _(x: Tensor, scale: float, zero_point: int, low: int, high: int, signed: bool) -> Tensor:
    return torch.empty_like(x, dtype=torch.int8 if signed else torch.uint8)


@torch.library.custom_op(f'{NAMESPACE}::matrix_product', mutates_args=())
def matrix_product(x: Tensor, weight: Tensor, zero_point: int) -> Tensor:
    """(x - zero_point) weight for codes x (..., I) and weight (I, O): whole numbers in float32, summed exactly.

    In an ONNX file this is MatMulInteger and a Cast of its int32 sums.
    """
    return ((x.double() - zero_point) @ weight.double()).float()


@matrix_product.register_fake
def _(x: Tensor, weight: Tensor, zero_point: int) -> Tensor:
    return torch.empty((*x.shape[:-1], weight.shape[1]), dtype=torch.float32, device=x.device)


def along_first(scale: Tensor, like: Tensor) -> Tensor:
    """A scale that broadcasts along dimension 0 of ``like``."""
    return scale.reshape(-1, *(1,) * (like.dim() - 1)) if scale.dim() else scale


ACTIVATION = activation._opoverload
INTEGERS = integers._opoverload
CONSTANT = constant._opoverload
WHOLE = whole._opoverload
CODES = codes._opoverload
MATRIX_PRODUCT = matrix_product._opoverload
