"""Reading the graph of an integer plan: which operators there are, where a tensor's grid comes from, constants."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from .operators import ACTIVATION, CONSTANT

aten = torch.ops.aten
CONVOLUTIONS = (aten.conv2d.default, aten.linear.default)
OTHER_CONVOLUTIONS = (
    aten.conv1d.default, aten.conv3d.default, aten.conv_transpose1d.default, aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)  # fmt: skip
PRODUCTS = (aten.matmul.default, aten.bmm.default, aten.mm.default)
ADDITIONS = (aten.add.Tensor,)
MULTIPLICATIONS = (aten.mul.Tensor,)
CONCATENATIONS = (aten.cat.default,)
SHUFFLES = (aten.pixel_shuffle.default, aten.pixel_unshuffle.default)
PIECES = (
    operator.getitem, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default, aten.slice.Tensor,
    aten.select.int,
)  # fmt: skip
"""Operators that take a part of a tensor."""
FORMS = (
    aten.view.default, aten.reshape.default, aten.permute.default, aten.transpose.int, aten.flatten.using_ints,
    aten.unsqueeze.default, aten.squeeze.dim, aten.squeeze.dims, aten._unsafe_view.default, aten.roll.default,
)  # fmt: skip
"""Operators that give a tensor another shape or order."""
MOVES = (*SHUFFLES, *PIECES, *FORMS)
"""Operators that compute nothing: a grid goes through them."""
EXACT_FLOAT32 = 2**24
"""Below this every whole number is a float32."""


def source(node: Any) -> Node | None:
    """The quantizer that a tensor comes from, seen through moves; None for a tensor in floating point."""
    while isinstance(node, Node) and node.target in MOVES:
        node = node.args[0]
    return node if isinstance(node, Node) and node.target is ACTIVATION else None


def attribute(graph: fx.GraphModule, node: Any) -> Tensor | None:
    """The tensor behind a ``get_attr`` node."""
    if not isinstance(node, Node) or node.op != 'get_attr':
        return None
    found: Any = graph
    for part in str(node.target).split('.'):
        found = getattr(found, part)
    return found if isinstance(found, Tensor) else None


def weight_of(graph: fx.GraphModule, node: Node) -> tuple[Tensor, Tensor] | None:
    """Codes and scale of the weight of a convolution or linear layer, None where it is in floating point."""
    weight = node.args[1]
    if not isinstance(weight, Node) or weight.target is not CONSTANT:
        return None
    codes, scale = (attribute(graph, argument) for argument in weight.args)
    return None if codes is None or scale is None else (codes, scale)


def constant_value(graph: fx.GraphModule, node: Any) -> Tensor | None:
    """The value of a weight or bias, whether it is stored as codes or not; None for what is computed."""
    if isinstance(node, Node) and node.target is CONSTANT:
        codes, scale = (attribute(graph, argument) for argument in node.args)
        return None if codes is None or scale is None else codes.to(scale.dtype) * scale
    return attribute(graph, node)


def largest_sum(codes: Tensor, grid: Node) -> float:
    """The largest sum of products that a layer can meet, whatever the image."""
    _, zero_point, low, high = arguments(grid)[1:5]
    rows = codes.flatten(1).double()
    up, down = rows.clamp(min=0).sum(dim=1), rows.clamp(max=0).sum(dim=1)
    far, near = float(high - zero_point), float(low - zero_point)
    return float(torch.maximum((up * far + down * near).abs(), (up * near + down * far).abs()).max())


def arguments(node: Node) -> tuple[Any, ...]:
    """A node's positional arguments, of any type."""
    return node.args


def moves_behind(node: Any) -> list[Node]:
    """The moves between a tensor and what :func:`source` sees, the last one first."""
    found = []
    while isinstance(node, Node) and node.target in MOVES:
        found.append(node)
        node = node.args[0]
    return found
