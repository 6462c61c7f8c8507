"""What the engines make of a file: which nodes run in integers, which stay in floating point and why."""

from __future__ import annotations

import os
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from . import engines
from .capture import IntegerPlan
from .graph import aten
from .node_report import NodeReport

_FLOAT_ARITHMETIC = ('Add', 'Sub', 'Mul', 'Div')
_MOVES = ('Transpose', 'Reshape', 'DepthToSpace', 'MaxPool', 'Clip', 'Split', 'Slice')
_CLAMPS = (aten.clamp.default, aten.hardtanh.default, aten.relu6.default, aten.clamp_min.default)


@dataclass
class Findings:
    """What a check found.

    Attributes:
        engine: Whose graph was read.
        integer: Convolutions, matrix products and additions that run in integers, by operator of the engine.
        floating: Those in floating point, by operator.
        nodes: The plan's nodes that stay in floating point.
        others: All other operators of the engine's graph that compute in floating point, by name.
        faults: Sentences; empty where the graph is clean.
    """

    engine: str
    integer: dict[str, int] = field(default_factory=dict)
    floating: dict[str, int] = field(default_factory=dict)
    nodes: list[NodeReport] = field(default_factory=list)
    others: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """The findings as text."""
        counted = ', '.join(f'{count} {name}' for name, count in (*self.integer.items(), *self.floating.items()))
        text = [f'{self.engine}: {counted}']
        text += [f'  float: {node.layer or node.name} ({node.kind}): {node.why}' for node in self.nodes]
        if self.others:
            rest = ', '.join(f'{count} {name}' for name, count in sorted(self.others.items()))
            text.append(f"  float: {rest}: the network's own arithmetic, and scale and bias of the layers above")
        return text + [f'  FAULT: {fault}' for fault in self.faults]


def check_onnxruntime(plan: IntegerPlan, model: bytes | str) -> Findings:
    """Read the graph that ONNX Runtime executes: fused operators, stray Clips, Cast chains."""
    import onnx

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'optimized.onnx')
        engines.onnxruntime_session(model, optimized=path)
        graph = onnx.load(path).graph
    kinds = Counter(node.op_type for node in graph.node)
    found = Findings('ONNX Runtime')
    for name, count in kinds.items():
        if name.startswith('QLinear') or name in ('MatMulInteger', 'MatMulIntegerToFloat', 'ConvInteger', 'QGemm'):
            found.integer[name] = count
        elif name in ('Conv', 'FusedConv', 'MatMul', 'Gemm', 'FusedMatMul'):
            found.floating[name] = count
        elif name in _FLOAT_ARITHMETIC:
            found.others[name] = count
    found.nodes = [node for node in plan.nodes if not node.integer]
    if plan.engine == 'onnxruntime':
        integer = {node.name.split('_token')[0] for node in graph.node if node.op_type == 'QLinearConv'}
        for node in plan.nodes:
            if node.integer and node.kind == 'conv2d' and f'node_{node.name}' not in integer:
                found.faults.append(f'{node.layer} runs in floating point, the plan has it in integers')
        for kind, name, words in (('add', 'QLinearAdd', 'additions'), ('mul', 'QLinearMul', 'multiplications'),
                                  ('cat', 'QLinearConcat', 'concatenations'),
                                  ('linear', 'MatMulInteger', 'linear layers')):  # fmt: skip
            planned = sum(node.integer for node in plan.nodes if node.kind == kind)
            if kinds[name] < planned:
                found.faults.append(f'{kinds[name]} {words} run in integers, the plan has {planned}')
    found.faults += _clips(plan, graph) + _casts(graph)
    return found


def _clips(plan: IntegerPlan, graph: Any) -> list[str]:
    """Clips on codes stand behind a quantizer or an integer layer; all others have to be the network's own."""
    makers = {output: node for node in graph.node for output in node.output}
    own = sum(node.target in _CLAMPS for node in plan.graph.graph.nodes)
    stray = []
    for node in graph.node:
        maker = makers.get(node.input[0]) if node.op_type == 'Clip' else None
        behind = maker is not None and _moves_codes(maker, makers)
        if node.op_type == 'Clip' and not behind:
            stray.append(node.name)
    return [f'{len(stray)} Clip nodes in floating point, {stray[0]} first'] if len(stray) > own else []


def _moves_codes(node: Any, makers: dict[str, Any]) -> bool:
    while node is not None and node.op_type in _MOVES:
        node = makers.get(node.input[0])
    return node is not None and node.op_type.startswith(('QLinear', 'Quantize'))


def _casts(graph: Any) -> list[str]:
    makers = {output: node.op_type for node in graph.node for output in node.output}
    chained = [node.name for node in graph.node if node.op_type == 'Cast' and makers.get(node.input[0]) == 'Cast']
    return [f'a chain of Casts at {chained[0]}'] if chained else []


def check_openvino(plan: IntegerPlan, model: bytes | str, precision: str = 'f32') -> Findings:
    """Read OpenVINO's execution graph: precision in and out of each convolution and matrix product."""
    compiled = engines.openvino_compiled(model, precision=precision)
    found = Findings('OpenVINO')
    kinds: Counter[str] = Counter()
    floating = []
    for op in compiled.get_runtime_model().get_ops():
        info = op.get_rt_info()
        kind = info['layerType'].astype(str) if 'layerType' in info else ''
        if kind not in ('Convolution', 'FullyConnected', 'MatMul', 'Deconvolution'):
            continue
        runs = info['runtimePrecision'].astype(str)
        kinds[f'{kind} {runs}'] += 1
        if runs not in ('u8', 'i8'):
            floating.append(info['originalLayersNames'].astype(str))
    for name, count in kinds.items():
        (found.integer if name.endswith(('u8', 'i8')) else found.floating)[name] = count
    found.nodes = [node for node in plan.nodes if not node.integer and node.kind in ('conv2d', 'linear')]
    if plan.engine == 'openvino':
        planned = sum(node.integer for node in plan.nodes if node.kind == 'conv2d')
        there = sum(count for name, count in found.integer.items() if name.startswith('Convolution'))
        if there < planned:
            found.faults.append(f'{there} convolutions run in integers, the plan has {planned}')
    return found
