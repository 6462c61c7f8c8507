"""What of an integer plan stays in floating point, and why."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx import Node

from .graph import (
    ADDITIONS,
    CONCATENATIONS,
    CONVOLUTIONS,
    MULTIPLICATIONS,
    OTHER_CONVOLUTIONS,
    PRODUCTS,
    aten,
    source,
    weight_of,
)
from .operators import ACTIVATION


@dataclass(frozen=True)
class NodeReport:
    """One convolution, matrix product, addition, multiplication or concatenation of features.

    Args:
        name: Of the node in the graph, and in the file.
        kind: ``conv2d``, ``linear``, ``matmul``, ``add`` ...
        layer: Name of the layer whose weight it has, or ''.
        integer: Whether the plan has it run in integers.
        why: Why it stays in floating point, or ''.
    """

    name: str
    kind: str
    layer: str
    integer: bool
    why: str = ''


def reports_of(graph: fx.GraphModule, engine: str) -> list[NodeReport]:
    """Every convolution, linear layer and matrix product of a lowered graph, and what joins two features."""
    return [_report(graph, node, engine) for node in graph.graph.nodes if _counts(node)]



def _counts(node: Node) -> bool:
    if node.target in CONVOLUTIONS + OTHER_CONVOLUTIONS + PRODUCTS + CONCATENATIONS:
        return True
    return node.target in (*ADDITIONS, *MULTIPLICATIONS) and all(_is_feature(operand) for operand in node.args[:2])


def _is_feature(node: Any) -> bool:
    return isinstance(node, Node) and node.op == 'call_function'


def _report(graph: fx.GraphModule, node: Node, engine: str) -> NodeReport:
    kind = str(node.target).split('.')[1]
    layer, why = '', ''
    if node.target in CONVOLUTIONS:
        layer = _layer_name(node)
        if weight_of(graph, node) is None:
            why = 'its weight stays in floating point in the plan'
        elif source(node.args[0]) is None:
            why = 'its input stays in floating point in the plan'
        elif engine == 'onnxruntime' and node.target is aten.conv2d.default:
            why = _float_output(node)
    elif node.target in OTHER_CONVOLUTIONS:
        layer = _layer_name(node)
        why = f'a {kind} runs in floating point in an exported file'
    elif node.target in PRODUCTS:
        why = 'a product of two activations, which the plan does not quantize'
    else:
        operands: Any = node.args[0] if node.target in CONCATENATIONS else node.args[:2]
        if any(source(operand) is None for operand in operands):
            why = 'its operands are not quantized' + ('' if engine == 'openvino' else ' in the plan')
        else:
            why = _float_output(node)
    return NodeReport(node.name, kind, layer, not why, why)


def _float_output(node: Node) -> str:
    """Why the output of a node is not quantized, or ''. ONNX Runtime computes such a node in floating point."""
    users = list(node.users)
    if len(users) == 1 and users[0].target is ACTIVATION:
        return ''
    if any(user.op == 'output' for user in users) or _leads_to_output(node):
        return "its output is the network's, in floating point"
    names = ', '.join(sorted({_plain(user.target) for user in users}))
    return f'its output is not quantized: it goes to {names}'


def _leads_to_output(node: Node) -> bool:
    """Whether nothing but arithmetic without weights stands between a node and the network's output."""
    pending, seen = [node], set()
    while pending:
        for user in pending.pop().users:
            if user.target in CONVOLUTIONS + OTHER_CONVOLUTIONS + PRODUCTS or user.target is ACTIVATION:
                return False
            if user not in seen:
                seen.add(user)
                pending.append(user)
    return True


def _plain(target: str | Callable[..., Any]) -> str:
    return str(target).removeprefix('aten.').split('.')[0] if target is not operator.getitem else 'a tuple'


def _layer_name(node: Node) -> str:
    weight = node.args[1]
    while isinstance(weight, Node) and weight.op != 'get_attr':
        weight = weight.args[0]
    name = str(weight.target) if isinstance(weight, Node) else ''
    return name.removesuffix('.weight').removesuffix('.weight_quantizer.codes')
