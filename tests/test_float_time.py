"""How long engines compute in floating point, on networks of which it is known."""

from __future__ import annotations

import pytest
import torch
from helpers import images, plan_of, tiny

from basicsr_quant.deploy.bench import bound_by_time
from basicsr_quant.deploy.capture import float_graph, integer_plan
from basicsr_quant.methods import method_of, quantize

onnx = pytest.importorskip('onnx')
for package in ('onnxscript', 'onnxruntime', 'openvino'):
    pytest.importorskip(package)

from basicsr_quant.deploy.float_time import onnxruntime_float_share, openvino_float_share  # noqa: E402
from basicsr_quant.deploy.onnx_file import packed_onnx, to_onnx  # noqa: E402

SHAPE = (1, 3, 64, 64)
SHARES = {'onnxruntime': onnxruntime_float_share, 'openvino': openvino_float_share}


def file_of(bits: int | None, engine: str, tmp_path) -> str:
    path = tmp_path / 'model.onnx'
    if bits is None:
        graph, batched = float_graph(tiny(), SHAPE)
        path.write_bytes(to_onnx(graph, SHAPE, batched=batched).SerializeToString())
        return str(path)
    plan = plan_of(tiny(), 'minmax', bits, zero_point='integer', skip='quantized')
    net = quantize(tiny(), plan)
    method_of(plan).calibrate(net, [images(2, 16)])
    path.write_bytes(packed_onnx(integer_plan(net.eval(), SHAPE, engine)).SerializeToString())
    return str(path)


@pytest.mark.parametrize('engine', SHARES)
def test_a_file_in_floating_point_is_all_of_it(engine, tmp_path):
    assert SHARES[engine](file_of(None, engine, tmp_path), torch.rand(SHAPE), 1) == 1.0


@pytest.mark.parametrize('engine', SHARES)
def test_a_file_in_integers_is_a_part_of_it(engine, tmp_path):
    assert 0 < SHARES[engine](file_of(8, engine, tmp_path), torch.rand(SHAPE), 1) < 0.9


@pytest.mark.parametrize('fp32, left, bound', [(1.0, 1.0, 1.0), (1.0, 0.0, 4.0), (2.0, 1.0, 1.6), (1.0, 1.2, 1 / 1.2)])
def test_the_bound(fp32, left, bound):
    assert bound_by_time(fp32, left) == pytest.approx(bound)
