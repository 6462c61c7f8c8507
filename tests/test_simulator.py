"""The simulator's arithmetic against ONNX Runtime's own operators, code by code."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from basicsr_quant.deploy.simulator import Codes, Pair

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


@pytest.mark.parametrize('grids', [
    # A sum that lies at a tie but for its last bit, as it was met in a PAMS network.
    ((0.003995344042778015, 127), (0.004011905286461115, 125), (0.0031391517259180546, 127)),
    ((0.5, 3), (0.25, 7), (1.0, 9)), ((0.3, 10), (0.1, 20), (0.4, 30)), ((1.5, 100), (0.5, 20), (2.0, 0)),
    ((0.0117, 201), (0.0093, 255), (0.0201, 128)),
])  # fmt: skip
def test_additions_of_all_pairs_of_codes(grids):
    constants = [('a', None)] + [(f'{n}{k}', scalar(v, t)) for n, (s, z) in zip('abc', grids)
                                 for k, v, t in (('s', s, np.float32), ('z', z, np.uint8))]
    constants.insert(3, ('b', None))
    a, b = (codes.ravel() for codes in np.meshgrid(EVERY, EVERY))
    found = one_operator('QLinearAdd', constants, 'ab').run(None, {'a': a, 'b': b})[0]
    held = [Codes(torch.from_numpy(codes).float(), torch.tensor(scale), zero)
            for codes, (scale, zero) in zip((a, b), grids)]
    wanted = Pair(*held).requantized(torch.tensor(grids[2][0]), grids[2][1], 0, 255)
    np.testing.assert_array_equal(wanted.numpy(), found)
