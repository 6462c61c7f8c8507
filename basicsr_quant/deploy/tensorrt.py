"""What TensorRT's ONNX parser asks of a quantized file, read in the file itself: there is no engine to ask."""

from __future__ import annotations

from typing import Any

from .checker import Findings

_TYPES = {1: 'float32', 2: 'uint8', 3: 'int8', 6: 'int32', 21: 'uint4', 22: 'int4'}
_INT8 = 3


def check_tensorrt(model: Any) -> Findings:
    """Check a file of the profile ``tensorrt``.

    The rules are those of TensorRT's documents and of what its parser refuses: codes are int8, zero points 0, scales
    positive constants; DequantizeLinear takes no int32, so biases stay in floating point; nothing stands between a
    quantizer and its DequantizeLinear; weights are int8 with one scale, or one a output channel.

    Args:
        model: An ``onnx.ModelProto``.
    """
    from onnx import numpy_helper

    graph = model.graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == 'Constant':
            constants.update((node.output[0], a.t) for a in node.attribute if a.name == 'value')
    makers = {output: node for node in graph.node for output in node.output}
    found = Findings('TensorRT (its rules, not run)')
    pairs = weights = 0
    for node in graph.node:
        if node.op_type not in ('QuantizeLinear', 'DequantizeLinear'):
            continue
        scale, zero = (constants.get(name) for name in (*node.input[1:], '')[:2])
        if scale is None or not (numpy_helper.to_array(scale) > 0).all():
            found.faults.append(f'{node.name}: its scale is no positive constant')
        if zero is not None and (zero.data_type != _INT8 or numpy_helper.to_array(zero).any()):
            kind = _TYPES.get(zero.data_type, str(zero.data_type))
            found.faults.append(f'{node.name}: zero point of type {kind}; int8 and 0 is needed')
        if node.op_type == 'QuantizeLinear':
            if zero is None:
                found.faults.append(f'{node.name}: without an int8 zero point it makes uint8 codes')
            continue
        weight, maker = constants.get(node.input[0]), makers.get(node.input[0])
        if weight is not None and weight.data_type == _INT8:
            weights += 1
        elif weight is None and maker is not None and maker.op_type == 'QuantizeLinear':
            pairs += 1
        else:
            given = 'an input of the file' if maker is None else maker.op_type
            given = given if weight is None else _TYPES.get(weight.data_type, str(weight.data_type))
            found.faults.append(f'{node.name}: takes {given}; an int8 constant or a QuantizeLinear is needed')
    found.integer = {'quantized tensors': pairs, 'int8 weights': weights}
    return found
