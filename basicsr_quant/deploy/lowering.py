"""Graph passes: one quantizer per tensor, scales folded, integer biases, exact sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from .graph import (
    CONVOLUTIONS,
    EXACT_FLOAT32,
    PIECES,
    SHUFFLES,
    arguments,
    aten,
    attribute,
    constant_value,
    largest_sum,
    moves_behind,
    source,
    weight_of,
)
from .node_report import NodeReport, reports_of
from .operators import ACTIVATION, CODES, CONSTANT, INTEGERS, MATRIX_PRODUCT, WHOLE

_SAME_DTYPE = (aten.type_as.default, aten.to.dtype, aten._to_copy.default, aten.to.dtype_layout)
_COPIES = (aten.clone.default, aten.contiguous.default, aten.alias.default, aten.detach.default)
_BLOCK = 16
"""Channels that ONNX Runtime's fastest float kernel computes together."""


def lower(graph: fx.GraphModule, engine: str) -> list[NodeReport]:
    """Rewrite ``graph`` in place into what integer engines fuse, and report its nodes.

    The biases of layers that an engine runs in integers become int32; for ONNX Runtime, layers with quantized input and
    weight whose output stays in floating point become exact sums, see :func:`_exact_sums`.
    """
    _fold_factors(graph)
    if engine == 'onnxruntime':
        _rectify_codes(graph)
        _simplify_prelu(graph)
    _move_before_shuffles(graph)
    _merge(graph)
    if engine == 'onnxruntime':
        _repeat_behind_moves(graph)
    if engine != 'tensorrt':  # its DequantizeLinear takes no int32
        _integer_biases(graph)
    graph.graph.eliminate_dead_code()
    reports = reports_of(graph, engine)
    if engine == 'onnxruntime':
        _integer_products(graph, {report.name for report in reports if report.integer})
        _exact_sums(graph, {report.name for report in reports if not report.integer})
        graph.graph.eliminate_dead_code()
    graph.recompile()
    return reports


def drop_no_ops(graph: fx.GraphModule) -> None:
    """Take out casts to the type that is there, copies, and factors of 1."""
    for node in list(graph.graph.nodes):
        if node.op != 'call_function':
            continue
        is_copy = node.target in _COPIES and _layout(node) == _layout(node.args[0])
        is_copy |= node.target is aten.dropout.default
        is_cast = node.target in _SAME_DTYPE and _dtype(node) == _dtype(node.args[0])
        is_one = node.target in (aten.mul.Tensor, aten.div.Tensor) and node.args[1] == 1
        if is_copy or is_cast or is_one:
            _bypass(node)
    graph.graph.eliminate_dead_code()
    graph.recompile()


def _bypass(node: Node) -> None:
    node.replace_all_uses_with(arguments(node)[0])
    node.graph.erase_node(node)


def _layout(node: Any) -> Any:
    value = node.meta.get('val') if isinstance(node, Node) else None
    return value.stride() if isinstance(value, Tensor) else None


def _dtype(node: Any) -> torch.dtype | None:
    value = node.meta.get('val') if isinstance(node, Node) else None
    if value is None and isinstance(node, Node) and node.op == 'get_attr':
        found = attribute(node.graph.owning_module, node)  # type: ignore[arg-type]
        return None if found is None else found.dtype
    return getattr(value, 'dtype', None)


def _register(graph: fx.GraphModule, name: str, tensor: Tensor, before: Node) -> Node:
    name = name.replace('.', '_')
    while hasattr(graph, name):
        name += '_'
    graph.register_buffer(name, tensor)
    with graph.graph.inserting_before(before):
        return graph.graph.get_attr(name)


def _fold_factors(graph: fx.GraphModule) -> None:
    """Residual scaling: a positive factor behind a layer, its ReLU and its quantizer goes into their scales."""
    for node in list(graph.graph.nodes):
        if node.target is not aten.mul.Tensor or not isinstance(node.args[1], (int, float)) or node.args[1] <= 0:
            continue
        factor, inner = float(node.args[1]), node.args[0]
        layer, grids = inner, []
        while isinstance(layer, Node) and layer.target in (ACTIVATION, aten.relu.default) and len(layer.users) == 1:
            grids += [layer] if layer.target is ACTIVATION else []
            layer = layer.args[0]
        found = weight_of(graph, layer) if isinstance(layer, Node) and layer.target in CONVOLUTIONS else None
        if found is None or len(layer.users) != 1 or len(layer.args) < 3:
            continue
        codes = layer.args[1].args[0]
        scale = _register(graph, f'{layer.name}_scale', found[1] * factor, layer)
        with graph.graph.inserting_before(layer):
            weight = graph.graph.call_function(CONSTANT, (codes, scale))
        bias = attribute(graph, layer.args[2])
        bias_node = None if bias is None else _register(graph, f'{layer.name}_bias', bias * factor, layer)
        layer.args = (layer.args[0], weight, bias_node, *layer.args[3:])
        for grid in grids:
            scaled = float(torch.tensor(arguments(grid)[1] * factor, dtype=torch.float32))
            grid.args = (grid.args[0], scaled, *grid.args[2:])
        _bypass(node)


def _rectify_codes(graph: fx.GraphModule) -> None:
    """A ReLU before a quantizer is a lower bound on its codes: engines fuse that, whatever the zero point."""
    for node in list(graph.graph.nodes):
        if node.target is ACTIVATION and node.args[0].target is aten.relu.default and len(node.args[0].users) == 1:
            relu = node.args[0]
            scale, zero_point, low, high, signed = node.args[1:]
            node.args = (relu.args[0], scale, zero_point, max(low, zero_point), high, signed)
            graph.graph.erase_node(relu)


def _move_before_shuffles(graph: fx.GraphModule) -> None:
    """Quantize before a pixel shuffle, not behind it: the values are the same, and engines move 8-bit codes."""
    for node in list(graph.graph.nodes):
        while node.target is ACTIVATION and node.args[0].target in SHUFFLES and len(node.args[0].users) == 1:
            shuffle = node.args[0]
            node.replace_all_uses_with(shuffle)
            with graph.graph.inserting_before(shuffle):
                moved = graph.graph.call_function(ACTIVATION, (shuffle.args[0], *node.args[1:]))
            moved.meta.update(shuffle.args[0].meta)
            graph.graph.erase_node(node)
            shuffle.args = (moved, *shuffle.args[1:])
            node = moved


def _simplify_prelu(graph: fx.GraphModule) -> None:
    """PReLU on codes: with one slope a leaky ReLU, which ONNX Runtime looks up in a table of 256 codes; with slopes up
    to 1 for each channel max(x, slope x), three quarters of the time of its PReLU. The values are the same."""
    for node in list(graph.graph.nodes):
        slope = attribute(graph, node.args[1]) if node.target is aten.prelu.default else None
        if slope is None or source(node.args[0]) is None or float(slope.max()) > 1:
            continue
        x = node.args[0]
        if slope.numel() == 1:
            with graph.graph.inserting_before(node):
                simple = graph.graph.call_function(aten.leaky_relu.default, (x, float(slope)))
        else:
            held = _register(graph, f'{node.name}_slope', slope.reshape(-1, *(1,) * (node.meta['val'].dim() - 2)), node)
            with graph.graph.inserting_before(node):
                product = graph.graph.call_function(aten.mul.Tensor, (x, held))
                simple = graph.graph.call_function(aten.maximum.default, (x, product))
        node.replace_all_uses_with(simple)
        graph.graph.erase_node(node)


def _repeat_behind_moves(graph: fx.GraphModule) -> None:
    """The same quantizer behind a pixel shuffle or a split again: ONNX Runtime moves 8-bit codes, and fuses what
    follows, only where it finds one on both sides. It changes no value."""
    for node in list(graph.graph.nodes):
        whole = isinstance(node.meta.get('val'), (list, tuple))  # a split, whose parts come behind it
        grid = source(node) if node.target in (*SHUFFLES, *PIECES) and not whole else None
        if grid is not None:
            with graph.graph.inserting_after(node):
                again = graph.graph.call_function(ACTIVATION, (node, *grid.args[1:]))
            node.replace_all_uses_with(again, delete_user_cb=lambda user, again=again: user is not again)


def _merge(graph: fx.GraphModule) -> None:
    """One quantizer for a tensor and a grid: a second one on the same grid changes nothing."""
    first: dict[Any, Node] = {}
    for node in list(graph.graph.nodes):
        if node.target is not ACTIVATION:
            continue
        before = source(node.args[0])
        if before is not None and before.args[1:] == node.args[1:]:
            _bypass(node)
        elif node.args in first:
            node.replace_all_uses_with(first[node.args])
            graph.graph.erase_node(node)
        else:
            first[node.args] = node


def _integer_biases(graph: fx.GraphModule) -> None:
    """Biases as int32 at s_x s_w, where input and weight are quantized; engines would round them anyway."""
    for node in list(graph.graph.nodes):
        grid = source(node.args[0]) if node.target in CONVOLUTIONS else None
        found = weight_of(graph, node) if grid is not None else None
        bias = attribute(graph, node.args[2]) if found is not None and len(node.args) > 2 else None
        if grid is None or found is None or bias is None:
            continue
        scale = torch.tensor(grid.args[1], dtype=torch.float32) * found[1]
        codes = (bias.double() / scale.double()).round().clamp(-(2**31) + 1, 2**31 - 1).to(torch.int32)
        codes_node = _register(graph, f'{node.name}_bias_codes', codes, node)
        scale_node = _register(graph, f'{node.name}_bias_scale', scale, node)
        with graph.graph.inserting_before(node):
            constant = graph.graph.call_function(CONSTANT, (codes_node, scale_node))
        node.args = (*node.args[:2], constant, *node.args[3:])


def _integer_products(graph: fx.GraphModule, integer: set[str]) -> None:
    """Linear layers as products of codes, with scale and bias in floating point behind: what ONNX Runtime would make of
    a product of dequantized tensors and a bias is one product in floating point."""
    turned: dict[str, Tensor] = {}
    for node in list(graph.graph.nodes):
        if node.target is not aten.linear.default or node.name not in integer:
            continue
        grid, found = source(node.args[0]), weight_of(graph, node)
        assert grid is not None and found is not None
        name = str(node.args[1].args[0].target)
        if name not in turned:
            turned[name] = found[0].t().contiguous()
        bias = constant_value(graph, node.args[2] if len(node.args) > 2 else None)
        scale = torch.tensor(grid.args[1], dtype=torch.float32) * found[1]
        step = _register(graph, f'{node.name}_step', scale, node)
        with graph.graph.inserting_before(node):
            x = graph.graph.call_function(CODES, grid.args)
            for move in reversed(moves_behind(node.args[0])):
                x = graph.graph.create_node('call_function', move.target, (x, *move.args[1:]))
            total = graph.graph.call_function(MATRIX_PRODUCT, (x, node.args[1].args[0], grid.args[2]))
            result = graph.graph.call_function(aten.mul.Tensor, (total, step))
            if bias is not None:
                offset = _register(graph, f'{node.name}_offset', bias, node)
                result = graph.graph.call_function(aten.add.Tensor, (result, offset))
        node.replace_all_uses_with(result)
        kept = node.name
        graph.graph.erase_node(node)
        total.name = kept
    for name, codes in turned.items():
        owner, _, leaf = name.rpartition('.')
        setattr(graph.get_submodule(owner), leaf, codes)


def _exact_sums(graph: fx.GraphModule, floating: set[str]) -> None:
    """Make layers that run in floating point reproducible: whole numbers first, the scale behind the sum.

    A float32 sum depends on the order of its terms, which every engine chooses for itself, and the difference flips
    roundings further down. Sums of whole numbers below 2^24 do not, at the same speed. The scale divides, for a factor
    would be multiplied into the weights at load, and they would be whole numbers no more.

    Weights are constants at load, which gives a layer the kernel that computes its channels in blocks. For fewer
    channels than a block (the last layer's three) that gains 3 %, and needs its input a second time in another order,
    the largest tensor of an up-scaled image: there they stay codes.
    """
    for node in list(graph.graph.nodes):
        grid = source(node.args[0]) if node.name in floating and node.target in CONVOLUTIONS else None
        found = weight_of(graph, node) if grid is not None else None
        largest = 0.0 if grid is None or found is None else largest_sum(found[0], grid)
        if grid is None or found is None or largest >= EXACT_FLOAT32:
            continue
        bias_node: Any = node.args[2] if len(node.args) > 2 else None
        bias = constant_value(graph, bias_node)
        codes = attribute(graph, bias_node.args[0]) if getattr(bias_node, 'target', None) is CONSTANT else None
        summed = codes is not None and largest + float(codes.double().abs().max()) < EXACT_FLOAT32
        shape = (1, -1, 1, 1) if node.target is aten.conv2d.default else (-1,)
        scale = 1 / (torch.tensor(grid.args[1], dtype=torch.float32) * found[1])
        steps = _register(graph, f'{node.name}_steps', scale.reshape(shape) if scale.dim() else scale, node)
        with graph.graph.inserting_before(node):
            x = graph.graph.call_function(INTEGERS, grid.args)
            for move in reversed(moves_behind(node.args[0])):
                x = graph.graph.create_node('call_function', move.target, (x, *move.args[1:]))
            if len(found[0]) < _BLOCK:
                one = _register(graph, f'{node.name}_one', torch.ones_like(found[1]), node)
                weight = graph.graph.call_function(CONSTANT, (node.args[1].args[0], one))
            else:
                weight = graph.graph.call_function(WHOLE, (node.args[1].args[0],))
            sum_bias = graph.graph.call_function(WHOLE, (bias_node.args[0],)) if summed else None
            total = graph.graph.call_function(node.target, (x, weight, sum_bias, *node.args[3:]))
            result = graph.graph.call_function(aten.div.Tensor, (total, steps))
            if bias is not None and not summed:
                offset = _register(graph, f'{node.name}_offset', bias.reshape(shape), node)
                result = graph.graph.call_function(aten.add.Tensor, (result, offset))
        node.replace_all_uses_with(result)
        name = node.name
        graph.graph.erase_node(node)
        total.name = name
