"""What an integer engine computes, in PyTorch: codes in, integer sums, requantization, codes out.

The graph of an :class:`~.capture.IntegerPlan` is run with its tensors held as codes wherever the plan has them so.
Convolutions and linear layers sum int8 x uint8 products and an int32 bias exactly and requantize as ONNX Runtime does;
additions and products are requantized by its formulas. Everything else computes in float32 on the values of the codes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor, fx
from torch.fx import Node
from torch.fx.node import map_aggregate
from torch.nn import functional

from .graph import ADDITIONS, CONVOLUTIONS, EXACT_FLOAT32, MOVES, MULTIPLICATIONS, aten
from .operators import ACTIVATION, CODES, CONSTANT, INTEGERS, MATRIX_PRODUCT, along_first


@dataclass
class Codes:
    """A quantized tensor: value = scale (code - zero_point), codes held in float32 (those of biases in float64)."""

    codes: Tensor
    scale: Tensor
    zero_point: int

    def value(self) -> Tensor:
        return (self.codes - self.zero_point).float() * along_first(self.scale, self.codes)


@dataclass
class Sums:
    """What a layer has summed before it is requantized: value = scale sum, scale (C,) along dimension 1 or last."""

    sums: Tensor
    scale: Tensor
    channel: int
    rectified: bool = False

    def value(self) -> Tensor:
        value = (self.sums.double() * self._scale().double()).float()
        return value.relu() if self.rectified else value

    def _scale(self) -> Tensor:
        shape = [1] * self.sums.dim()
        shape[self.channel] = -1
        return self.scale.reshape(shape) if self.scale.dim() else self.scale

    def requantized(self, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
        codes = torch.round(self.sums.float() * (self._scale() / scale)) + zero_point
        return codes.clamp_(max(low, zero_point) if self.rectified else low, high)


@dataclass
class Pair:
    """Two quantized tensors that are to be added."""

    first: Codes
    second: Codes

    def value(self) -> Tensor:
        return self.first.value() + self.second.value()

    def requantized(self, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
        # Sums of products are fused in ONNX Runtime's kernel, that of the zero points too: one unfused rounding there
        # moves the sum by half a unit in its last place, which is a whole code at a tie.
        a, b = self.first, self.second
        ratio_a, ratio_b = a.scale / scale, b.scale / scale
        zero_a, zero_b = torch.tensor(float(a.zero_point)), torch.tensor(float(b.zero_point))
        offset = float(zero_point) - _fused(zero_a, ratio_a, zero_b * ratio_b)
        total = _fused(a.codes, ratio_a, _fused(b.codes, ratio_b, offset))
        return torch.round(total).clamp_(low, high)


@dataclass
class Product:
    """Two quantized tensors that are to be multiplied, of shapes that broadcast."""

    first: Codes
    second: Codes

    def value(self) -> Tensor:
        return self.first.value() * self.second.value()

    def requantized(self, scale: Tensor, zero_point: int, low: int, high: int) -> Tensor:
        a, b = self.first, self.second
        total = (a.codes - a.zero_point) * (b.codes - b.zero_point) * (a.scale * b.scale / scale) + zero_point
        return torch.round(total).clamp_(low, high)


def _fused(x: Tensor, factor: Tensor, addend: Tensor) -> Tensor:
    """x factor + addend in float32 with one rounding: the product is exact in float64."""
    return (x.double() * factor.double() + addend.double()).float()


Held = Union[Codes, Sums, Pair, Product]


class Simulator(fx.Interpreter):
    """Runs an integer plan.

    Args:
        graph: Of an :class:`~.capture.IntegerPlan`.
        layers: By node name, what computes a layer whose weight is in floating point: the order in which an engine sums
            in floating point is its own, and a quantizer behind it would see the difference.

    >>> output = Simulator(plan.graph)(image)  # doctest: +SKIP
    """

    def __init__(self, graph: fx.GraphModule, layers: Mapping[str, Callable[[Tensor], Tensor]] | None = None) -> None:
        super().__init__(graph)
        self.layers = dict(layers or {})

    @torch.no_grad()
    def __call__(self, image: Tensor) -> Tensor:
        return self.run(image)  # type: ignore[no-any-return]

    def run_node(self, n: Node) -> Any:
        if n.op == 'output':
            return _plain(self.fetch_args_kwargs_from_env(n)[0][0])
        if n.op == 'call_module':  # see float_regions
            return self.module.get_submodule(str(n.target))(*_plain(self.fetch_args_kwargs_from_env(n)[0]))
        if n.op != 'call_function':
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.name in self.layers:
            return self.layers[n.name](_plain(args[0]))
        if n.target is CONSTANT:
            dtype = torch.float64 if args[0].dtype == torch.int32 else torch.float32
            return Codes(args[0].to(dtype), args[1], 0)
        if n.target in (ACTIVATION, CODES):
            return _quantize(*args)
        if n.target is MATRIX_PRODUCT:
            return MATRIX_PRODUCT(args[0].codes, *args[1:])
        if n.target is INTEGERS:
            found = _quantize(*args)
            return Codes(found.codes, torch.ones(()), found.zero_point)
        first = args[0] if args else None
        if n.target in CONVOLUTIONS and isinstance(first, Codes) and isinstance(args[1], Codes):
            return _layer(n.target, *args)
        if n.target in MOVES and isinstance(first, Codes) and not first.scale.dim():
            moved = n.target(first.codes, *args[1:], **kwargs)
            if isinstance(moved, Tensor):
                return Codes(moved, first.scale, first.zero_point)
            return [Codes(part, first.scale, first.zero_point) for part in moved]
        if n.target is operator.getitem:
            return args[0][args[1]]
        if n.target is aten.relu.default and isinstance(first, Sums):
            return Sums(first.sums, first.scale, first.channel, True)
        if n.target in ADDITIONS and isinstance(first, Codes) and isinstance(args[1], Codes) and not kwargs:
            return Pair(first, args[1])
        if n.target in MULTIPLICATIONS and isinstance(first, Codes) and isinstance(args[1], Codes):
            return Product(first, args[1])
        return n.target(*_plain(args), **_plain(kwargs))  # type: ignore[operator]


def _plain(tree: Any) -> Any:
    return map_aggregate(tree, lambda leaf: leaf.value() if isinstance(leaf, (Codes, Sums, Pair, Product)) else leaf)


def _quantize(x: Tensor | Held, scale: float, zero_point: int, low: int, high: int, signed: bool) -> Codes:
    step = torch.tensor(scale, dtype=torch.float32)
    if isinstance(x, (Sums, Pair, Product)):
        return Codes(x.requantized(step, zero_point, low, high), step, zero_point)
    value = x.value() if isinstance(x, Codes) else x
    return Codes((torch.round(value / step) + zero_point).clamp_(low, high), step, zero_point)


def _layer(target: Any, x: Codes, weight: Codes, bias: Codes | Tensor | None = None, *rest: Any) -> Sums | Tensor:
    if isinstance(bias, Tensor):
        return target(x.value(), weight.value(), bias, *rest)  # type: ignore[no-any-return]
    centred = x.codes - x.zero_point
    rows = weight.codes.abs().flatten(1).sum(dim=1, dtype=torch.float64)
    bound = float(rows.max()) * 255 + (0.0 if bias is None else float(bias.codes.abs().max()))
    dtype = torch.float32 if bound < EXACT_FLOAT32 else torch.float64
    codes = None if bias is None else bias.codes.to(dtype)
    centred, kernel = centred.to(dtype), weight.codes.to(dtype)
    if target is aten.linear.default:
        return Sums(functional.linear(centred, kernel, codes), x.scale * weight.scale, -1)
    return Sums(target(centred, kernel, codes, *rest), x.scale * weight.scale, 1)
