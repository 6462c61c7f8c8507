"""The simulator's arithmetic against ONNX Runtime's own operators, code by code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from basicsr_quant.deploy.operators import ACTIVATION
from basicsr_quant.deploy.simulator import Codes, Pair, Product, Simulator

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')

from basicsr_quant.deploy.engines import onnxruntime_session  # noqa: E402

EVERY = np.arange(256, dtype=np.uint8)


def one_operator(kind, constants, inputs, attributes=None, domain='com.microsoft'):
    """A session with one operator; ``inputs`` are names of uint8 inputs among the ``constants`` in order."""
    helper, types = onnx.helper, onnx.TensorProto
    names = [name for name, _ in constants]
    held = [onnx.numpy_helper.from_array(value, name) for name, value in constants if name not in inputs]
    node = helper.make_node(kind, names, ['y'], domain=domain, **(attributes or {}))
    given = [helper.make_tensor_value_info(name, types.UINT8, ['n']) for name in inputs]
    made = [helper.make_tensor_value_info('y', types.UINT8, ['n'])]
    graph = helper.make_graph([node], 'one', given, made, held)
    opsets = [helper.make_opsetid('', 21), helper.make_opsetid('com.microsoft', 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return onnxruntime_session(model.SerializeToString())


def scalar(value, dtype=np.float32):
    return np.array(value, dtype)


GRIDS = [
    # A sum that lies at a tie but for its last bit, as it was met in a PAMS network.
    ((0.003995344042778015, 127), (0.004011905286461115, 125), (0.0031391517259180546, 127)),
    ((0.5, 3), (0.25, 7), (1.0, 9)), ((0.3, 10), (0.1, 20), (0.4, 30)), ((1.5, 100), (0.5, 20), (2.0, 0)),
    ((0.0117, 201), (0.0093, 255), (0.0201, 128)),
]  # fmt: skip


@pytest.mark.parametrize('operator, held_as, widening', [('QLinearAdd', Pair, 1.0), ('QLinearMul', Product, 64.0)])
@pytest.mark.parametrize('grids', GRIDS)
def test_additions_and_products_of_all_pairs_of_codes(grids, operator, held_as, widening):
    grids = (*grids[:2], (grids[2][0] * (1.0 if held_as is Pair else widening * grids[0][0]), grids[2][1]))
    constants = [('a', None)] + [(f'{n}{k}', scalar(v, t)) for n, (s, z) in zip('abc', grids)
                                 for k, v, t in (('s', s, np.float32), ('z', z, np.uint8))]
    constants.insert(3, ('b', None))
    a, b = (codes.ravel() for codes in np.meshgrid(EVERY, EVERY))
    found = one_operator(operator, constants, 'ab').run(None, {'a': a, 'b': b})[0]
    held = [Codes(torch.from_numpy(codes).float(), torch.tensor(scale), zero)
            for codes, (scale, zero) in zip((a, b), grids)]
    wanted = held_as(*held).requantized(torch.tensor(grids[2][0]), grids[2][1], 0, 255)
    np.testing.assert_array_equal(wanted.numpy(), found)


def graph_of(*steps):
    """A graph that quantizes its input, applies the functions, and quantizes again behind the last one."""
    graph = torch.fx.Graph()
    x = graph.placeholder('x')
    for function, *arguments in steps:
        x = graph.call_function(function, (x, *arguments))
    graph.output((x,))
    return torch.fx.GraphModule({}, graph)


@pytest.mark.parametrize('function, arguments, kind, attributes', [
    (torch.ops.aten.leaky_relu.default, (0.05,), 'QLinearLeakyRelu', {'alpha': 0.05}),
    (torch.ops.aten.leaky_relu.default, (-0.3,), 'QLinearLeakyRelu', {'alpha': -0.3}),
    (torch.ops.aten.sigmoid.default, (), 'QLinearSigmoid', None),
])  # fmt: skip
@pytest.mark.parametrize('scale, zero, onto, origin', [(0.031, 128, 0.0157, 100), (0.2, 30, 1 / 255, 0)])
def test_functions_of_all_codes(function, arguments, kind, attributes, scale, zero, onto, origin):
    constants = [('a', None), ('s', scalar(scale)), ('z', scalar(zero, np.uint8)), ('t', scalar(onto)),
                 ('o', scalar(origin, np.uint8))]
    found = one_operator(kind, constants, 'a', attributes).run(None, {'a': EVERY})[0]
    grid, target = (scale, zero, 0, 255, False), (onto, origin, 0, 255, False)
    net = graph_of((ACTIVATION, *grid), (function, *arguments), (ACTIVATION, *target))
    values = (torch.from_numpy(EVERY).float() - zero) * torch.tensor(scale)
    simulator = Simulator(net)
    simulator.garbage_collect_values = False
    simulator(values)
    codes = next(held for node, held in reversed(simulator.env.items()) if isinstance(held, Codes)).codes
    np.testing.assert_array_equal(codes.numpy(), found)
