"""What a plan leaves in floating point between its integer parts, computed by the engine for the simulator.

Normalizations, softmax, GELU and products of two activations sum and approximate in an order and to a last bit that is
the engine's own. A quantizer behind them turns that last bit into a whole code now and then, which says nothing about
the integers that the simulator is to prove. So these parts of the graph run in ONNX Runtime, each as a file of its own.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx import Node
from torch.fx.passes.infra.partitioner import CapabilityBasedPartitioner
from torch.fx.passes.operator_support import OperatorSupportBase

from . import engines
from .graph import (
    ADDITIONS,
    CONCATENATIONS,
    CONVOLUTIONS,
    MOVES,
    MULTIPLICATIONS,
    OTHER_CONVOLUTIONS,
    PRODUCTS,
    aten,
    source,
)
from .onnx_file import translated
from .operators import ACTIVATION, CODES, CONSTANT, INTEGERS, MATRIX_PRODUCT, WHOLE

_OWN = (ACTIVATION, CODES, CONSTANT, INTEGERS, MATRIX_PRODUCT, WHOLE)
_INEXACT = (
    *PRODUCTS, aten.layer_norm.default, aten.native_layer_norm.default, aten.softmax.int, aten._softmax.default,
    aten.gelu.default, aten.scaled_dot_product_attention.default,
)  # fmt: skip
"""Operators whose last bit is the engine's; a region without one of them is exact in PyTorch as well."""


class _Floating(OperatorSupportBase):
    """Constants, and operators that the simulator would compute in floating point."""

    def is_node_supported(self, submodules: Mapping[str, nn.Module], node: Node) -> bool:
        if node.op != 'call_function':
            return node.op == 'get_attr' and any(self.is_node_supported(submodules, user) for user in node.users)
        if node.target in (*_OWN, *CONVOLUTIONS, *OTHER_CONVOLUTIONS, aten.relu.default):
            return False
        root: Any = node
        while isinstance(root, Node) and root.target in MOVES:
            root = root.args[0]
        if isinstance(root, Node) and root is not node and root.target in _OWN:
            return False  # a move of codes
        joins = node.target in (*ADDITIONS, *MULTIPLICATIONS, *CONCATENATIONS)
        operands: Any = node.args[0] if node.target in CONCATENATIONS else node.args[:2]
        return not (joins and all(source(operand) is not None for operand in operands))


class _Region(nn.Module):
    """A part of a graph as a file in ONNX Runtime, for inputs of the shapes that it meets first."""

    def __init__(self, part: fx.GraphModule) -> None:
        super().__init__()
        self.part = part
        self._sessions: dict[tuple[torch.Size, ...], Any] = {}

    def forward(self, *given: Any) -> Any:
        if not all(isinstance(value, Tensor) for value in given):
            return self.part(*given)
        shapes = tuple(value.shape for value in given)
        if shapes not in self._sessions:
            content = translated(self.part, given).SerializeToString()
            self._sessions[shapes] = engines.onnxruntime_session(content)
        session = self._sessions[shapes]
        names = [held.name for held in session.get_inputs()]
        found = session.run(None, {name: value.contiguous().numpy() for name, value in zip(names, given)})
        outputs = tuple(torch.from_numpy(value) for value in found)
        return outputs if len(outputs) > 1 else outputs[0]


def with_engine_regions(graph: fx.GraphModule) -> fx.GraphModule:
    """A copy of ``graph`` in which ONNX Runtime computes what is left in floating point and inexact.

    ``graph`` itself where there is nothing of that kind.
    """
    if not any(node.target in _INEXACT for node in graph.graph.nodes):
        return graph
    with warnings.catch_warnings():  # torch's own, about its own tree specifications
        warnings.simplefilter('ignore', FutureWarning)
        twin = copy.deepcopy(graph)
    partitioner = CapabilityBasedPartitioner(twin, _Floating(), True, skip_horizontal_fusion=True)
    parts = [
        part for part in partitioner.propose_partitions() if any(node.target in _INEXACT for node in part.nodes)
    ]
    before = {name for name, _ in twin.named_children()}
    twin = partitioner.fuse_partitions(parts)
    for name, part in list(twin.named_children()):
        if name not in before and isinstance(part, fx.GraphModule):
            setattr(twin, name, _Region(part))
    return twin
