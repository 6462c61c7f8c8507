"""Integer plans: grids, graph passes, the simulator, and the file that ONNX Runtime runs."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest
import torch
from helpers import distilling, images, tiny
from torch import nn

from basicsr_quant.config import read_config
from basicsr_quant.deploy import engines
from basicsr_quant.deploy import export as exporting
from basicsr_quant.deploy.capture import integer_plan
from basicsr_quant.deploy.float_regions import with_engine_regions
from basicsr_quant.deploy.graph import PRODUCTS
from basicsr_quant.deploy.grids import activation_grid, weight_codes
from basicsr_quant.deploy.operators import ACTIVATION, MATRIX_PRODUCT
from basicsr_quant.deploy.parity import Parity, ParityImage, to_levels
from basicsr_quant.deploy.simulator import Simulator
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import method_of, quantize
from basicsr_quant.network.surgery import quant_layers
from basicsr_quant.network.trace import trace
from basicsr_quant.quantizers import (
    LearnedRange,
    LearnedStep,
    MaxAbsWeight,
    OffsetRange,
    PercentileWeight,
    SymmetricRange,
)

SHAPE = (1, 3, 16, 20)


class Shuffling(nn.Module):
    """Layers, a scaled residual block and a pixel shuffle."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Conv2d(4, 4, 3, padding=1)
        self.up = nn.Conv2d(4, 16, 3, padding=1)
        self.last = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x):
        y = self.first(x - 0.5)
        y = y + torch.relu(self.body(y)) * 0.5
        return self.last(torch.pixel_shuffle(self.up(y), 2)) + 0.5


def shuffling():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Shuffling()


def calibrated(net, size=16, **block):
    plan = read_config({'method': 'minmax', 'scope': 'all', **block}).plan(net, trace(net))
    quantize(net, plan)
    method_of(plan).calibrate(net, [images(2, size)])
    return net.eval(), plan


# ------------------------------------------------------------------------------------------------------------- grids


def ranged(quantizer, lower=-0.7, upper=1.9):
    quantizer.set_range(torch.tensor(lower), torch.tensor(upper))
    return quantizer


@pytest.mark.parametrize('engine', ['onnxruntime', 'tensorrt'])
@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('make', [
    lambda bits: LearnedRange(bits, zero_point='integer'), lambda bits: LearnedStep(bits),
    lambda bits: LearnedStep(bits, signed=False), SymmetricRange, lambda bits: SymmetricRange(bits, unsigned=True),
], ids=['range', 'lsq', 'lsq unsigned', 'pams', 'pams unsigned'])  # fmt: skip
def test_an_integer_grid_is_the_quantizers_own(make, bits, engine):
    quantizer = ranged(make(bits))
    grid = activation_grid('x', quantizer, engine)
    x = torch.linspace(-3, 3, 1001)
    if grid.shift == 0:
        torch.testing.assert_close(ACTIVATION(x, *grid.arguments()), quantizer(x), rtol=0, atol=grid.scale * 1e-3)
    else:  # 8 bits with an offset do not fit int8 at zero point 0
        assert engine == 'tensorrt' and (grid.zero_point, grid.low, grid.high) == (0, -128, 127)
    low, high = (-128, 127) if grid.signed else (0, 255)
    assert low <= grid.low <= grid.zero_point <= grid.high <= high


def test_a_float_zero_point_is_moved_by_less_than_half_a_step():
    grid = activation_grid('x', ranged(LearnedRange(4)), 'onnxruntime')
    exact = 0.7 / (2.6 / 15)
    assert grid.zero_point == round(exact) and grid.shift == pytest.approx(abs(exact - round(exact)), abs=1e-4)


@pytest.mark.parametrize('bits, make, halved, exact', [
    (8, lambda b: SymmetricRange(b), False, True), (4, lambda b: SymmetricRange(b, (5, 1, 1, 1)), False, True),
    (4, lambda b: LearnedStep(b), False, True), (8, lambda b: LearnedStep(b), False, True),
    (2, lambda b: SymmetricRange(b, narrow_range=False), True, True),
    (7, lambda b: SymmetricRange(b, narrow_range=False), True, True),
    (8, lambda b: SymmetricRange(b, narrow_range=False), False, False),
    (4, lambda b: PercentileWeight(b), True, True), (4, lambda b: MaxAbsWeight(b, True), False, True),
])  # fmt: skip
def test_weight_codes_are_the_fake_quantized_weight(bits, make, halved, exact):
    weight = torch.randn(5, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    quantizer = ranged(make(bits), -2.0, 2.0)
    found = weight_codes('w', weight, quantizer)
    assert found.codes.dtype == torch.int8 and found.halved == halved
    scale = found.scale.reshape(-1, 1, 1, 1)
    apart = ((found.codes * scale - quantizer(weight)).abs() / scale).max()
    assert (apart < 1e-3) if exact else (found.error > 0.1 and apart <= 1.01)
    if halved:
        assert (found.codes % 2 != 0).all()


def test_weights_that_are_rounded_anew_do_not_shrink():
    weight = (torch.randn(8, 64, 3, 3, generator=torch.Generator().manual_seed(1)) * 0.3).clamp(-1, 1)
    quantizer = ranged(SymmetricRange(8, narrow_range=False), -1.0, 1.0)
    found = weight_codes('w', weight, quantizer)
    assert not found.halved and found.error > 0.1
    stored = found.codes * found.scale
    assert float((stored * weight).sum() / weight.square().sum()) == pytest.approx(1.0, abs=2e-3)
    assert float((stored - weight).abs().max()) <= float(found.scale) * 0.5001


@pytest.mark.parametrize('quantizer, words', [
    (LearnedRange(8), 'never calibrated'), (ranged(LearnedRange(8), 0.0, 0.0), 'no width'),
    (ranged(LearnedRange(8, (3, 1, 1, 1))), 'each channel'),
], ids=['uncalibrated', 'no width', 'channels'])  # fmt: skip
def test_grids_that_engines_cannot_have(quantizer, words):
    with pytest.raises(QuantError, match=words):
        activation_grid('body.0', quantizer, 'onnxruntime')


def test_offsets_and_ranges_that_follow_the_image_are_refused():
    offsets = ranged(OffsetRange(8, 3, zero_point='integer'))
    activation_grid('x', offsets, 'onnxruntime')
    offsets.select(shift=True, scale=False)
    with pytest.raises(QuantError, match='offsets: false'):
        activation_grid('x', offsets, 'onnxruntime')
    net = tiny()
    plan = read_config({'method': 'daq'}).plan(net, trace(net))
    quantize(net, plan)
    method_of(plan).calibrate(net, [images()])
    with pytest.raises(QuantError, match='follows each image'):
        integer_plan(net.eval(), SHAPE)


# ------------------------------------------------------------------------------------------------ graph and simulator


def test_factors_biases_and_shuffles_are_folded():
    net, _ = calibrated(shuffling(), skip='quantized')
    plan = integer_plan(net, SHAPE)
    assert {n.layer or n.kind: n.integer for n in plan.nodes} == {
        'first': True, 'body': True, 'add': True, 'up': True, 'last': False,
    }  # fmt: skip
    factors = [n for n in plan.graph.graph.nodes if 'mul' in str(n.target) and not isinstance(n.args[1], torch.fx.Node)]
    assert not factors
    shuffle = next(n for n in plan.graph.graph.nodes if 'pixel_shuffle' in str(n.target))
    assert shuffle.args[0].target is ACTIVATION
    assert {user.args[1:] for user in shuffle.users} == {shuffle.args[0].args[1:]}  # the same grid on both sides
    x = images(1, 24, seed=5)
    torch.testing.assert_close(plan.graph(x), net(x), rtol=0, atol=0.02)


def test_the_simulator_does_integer_arithmetic():
    """A layer by NumPy in int64: codes, products, bias codes, requantization."""
    net, _ = calibrated(shuffling(), skip='quantized')
    plan = integer_plan(net, SHAPE)
    x = images(1, 16, seed=3)
    layers = quant_layers(net)
    first = activation_grid('first', layers['first'].input_quantizer, 'onnxruntime')
    then = activation_grid('body', layers['body'].input_quantizer, 'onnxruntime')
    weight = weight_codes('first', net.first.weight, layers['first'].weight_quantizer)
    codes = np.clip(np.rint((x.numpy() - np.float32(0.5)) / np.float32(first.scale)) + first.zero_point, 0, 255)
    codes = codes.astype(np.int64) - first.zero_point
    padded = np.pad(codes, ((0, 0), (0, 0), (1, 1), (1, 1)))
    kernel = weight.codes.numpy().astype(np.int64)
    sums = sum(
        np.einsum('oi,nihw->nohw', kernel[:, :, i, j], padded[:, :, i:i + 16, j:j + 16])
        for i in range(3) for j in range(3)
    )  # fmt: skip
    step = np.float32(first.scale) * weight.scale.numpy()
    bias = np.rint(net.first.bias.detach().double().numpy() / np.float64(step)).astype(np.int64)
    sums = sums + bias.reshape(1, -1, 1, 1)
    wanted = np.rint(sums.astype(np.float32) * (step / np.float32(then.scale))) + then.zero_point
    simulator = Simulator(plan.graph)
    simulator.garbage_collect_values = False
    simulator(x)
    node = next(n for n in plan.graph.graph.nodes if n.target is ACTIVATION and n.args[0].name == 'conv2d')
    np.testing.assert_array_equal(simulator.env[node].codes.numpy(), np.clip(wanted, 0, 255))


@pytest.fixture(scope='module')
def deployment():
    """The packages of the extra ``deploy``; without them these tests are skipped."""
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package)


CASES = {
    'minmax skip': {'skip': 'quantized'},
    'minmax': {},
    'body, float zero point, mid-rise': {'method': 'odm', 'w_bits': 4, 'a_bits': 4, 'scope': 'body'},
    'channels': {'method': 'mse', 'w_bits': 4, 'a_bits': 3, 'w_granularity': 'channel', 'skip': 'quantized'},
    'pams': {'method': 'pams', 'w_bits': 2, 'a_bits': 8, 'skip': 'quantized'},
    'lsq': {'method': 'lsq', 'w_bits': 2, 'a_bits': 2, 'skip': 'quantized'},
    'auto': {'method': 'auto', 'auto': {'a_granularity': 'tensor'}, 'skip': 'quantized'},
    'auto 7': {'method': 'auto', 'auto': {'a_granularity': 'tensor'}, 'a_bits': 7, 'skip': 'quantized'},
}


@pytest.mark.parametrize('case', CASES)
def test_onnx_runtime_computes_what_the_simulator_does(case, deployment, tmp_path):
    net, plan = calibrated(shuffling(), **CASES[case])
    pictures = [ParityImage(str(i), images(1, size, seed=i), i) for i, size in enumerate((16, 23))]
    said: list[str] = []
    done = exporting.export(
        net, plan, str(tmp_path / 'model.onnx'), shape=SHAPE, images=pictures, source='noise',
        psnr=lambda output, _: float(output.mean()), report=said.append,
    )  # fmt: skip
    assert done.parity.differing <= 1e-4 and done.parity.largest <= 1
    assert done.parity.values == 3 * 4 * (16 * 16 + 23 * 23)
    card = json.loads((tmp_path / 'model.json').read_text())
    assert card['engine'] == 'onnxruntime' and card['opset'] == 21 and card['parity']['count'] == 2
    if case == 'minmax skip':
        assert done.findings[0].integer == {'QLinearConv': 3, 'QLinearAdd': 1}
        assert done.findings[0].floating == {'Conv': 1}
    assert bool(done.plan.realigned) == ('float' in case)
    moved = [line for line in said if 'grids moved onto integer codes' in line]
    change = done.parity.psnr['plan'] - done.parity.psnr['test']
    assert len(moved) == ('float' in case) and all(line.endswith(f'; PSNR {change:+.3f} dB') for line in moved)


def test_layers_that_stay_in_floating_point_sum_whole_constants_and_divide(deployment, tmp_path):
    """Weights behind a DequantizeLinear would cost the layer its fastest kernel, a factor behind it its whole numbers:
    both at load, so the graph that runs is read."""
    import onnx
    from onnx import numpy_helper

    net, _ = calibrated(tiny(channels=16, blocks=1), w_bits=4, layers={'*': {'w_bits': 4, 'a_bits': 8}})
    content = exporting.packed_onnx(integer_plan(net, SHAPE)).SerializeToString()
    engines.onnxruntime_session(content, optimized=str(tmp_path / 'optimized.onnx'))
    graph = onnx.load(tmp_path / 'optimized.onnx').graph
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    layers = [node for node in graph.node if 'Conv' in node.op_type and not node.op_type.startswith('QLinear')]
    assert len(layers) == 3  # first, body.0.conv2 and last: skip: fp
    weights = [constants[node.input[1]] for node in layers if node.input[1] in constants]
    assert [len(weight) for weight in weights] == [16, 16]  # the last has fewer channels than a block
    for values in (*weights, *(constants[node.input[2]] for node in layers)):
        np.testing.assert_array_equal(values, np.rint(values))


@pytest.mark.parametrize('groups', [1, 2])
def test_a_transposed_convolution_in_the_file(groups, deployment, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Shuffling()
        net.up = nn.ConvTranspose2d(4, 16, 3, padding=1, groups=groups)
    net, plan = calibrated(net, w_granularity='channel')
    done = exporting.export(
        net, plan, str(tmp_path / 'model.onnx'), shape=SHAPE, images=[ParityImage('a', images(1, 16))],
        source='noise', psnr=lambda output, _: float(output.mean()),
    )  # fmt: skip
    assert done.parity.differing <= 1e-4 and done.parity.largest <= 1
    found = {node.layer: node for node in done.plan.nodes if node.kind == 'conv_transpose2d'}
    assert list(found) == ['up'] and not found['up'].integer and 'floating point in an exported' in found['up'].why


def test_a_batch_is_computed_as_its_images_are(deployment):
    net, _ = calibrated(shuffling(), skip='quantized')
    run = engines.onnxruntime_runner(exporting.packed_onnx(integer_plan(net, SHAPE)).SerializeToString())
    assert run.shape == (None, 3, None, None)
    x = images(3, 18)
    torch.testing.assert_close(run(x), torch.cat([run(x[i : i + 1]) for i in range(3)]), rtol=0, atol=0)
    with pytest.raises(QuantError, match='ONNX Runtime fails on an input of 3x2x18x18'):
        run(x[:, :2])


def test_a_network_that_fixes_its_batch_still_exports_for_any_size(deployment):
    class One(nn.Sequential):
        images = -1

        def forward(self, x):
            return super().forward(x.reshape(self.images, 3, x.shape[2], x.shape[3]))

    net, _ = calibrated(One(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)))
    net.images = 1
    plan = integer_plan(net, SHAPE)
    assert plan.dynamic and not plan.batched
    run = engines.onnxruntime_runner(exporting.packed_onnx(plan).SerializeToString())
    assert run.shape == (1, 3, None, None) and run(images(1, 21)).shape == (1, 3, 21, 21)


@pytest.mark.parametrize(
    'block', [{}, {'method': 'lsq', 'w_bits': 4, 'a_bits': 4}, {'method': 'pams'}], ids=['8', '4', '8 of 255 levels']
)
def test_functions_splits_concatenations_and_products_run_in_integers(block, deployment, tmp_path):
    """What is not ReLU stands between quantizers: every convolution but the last is an integer one."""
    net, plan = calibrated(distilling(), skip='quantized', **block)
    pictures = [ParityImage(str(i), images(1, size, seed=i), i) for i, size in enumerate((16, 23))]
    done = exporting.export(
        net, plan, str(tmp_path / 'model.onnx'), shape=SHAPE, images=pictures, source='noise',
        psnr=lambda output, _: float(output.mean()),
    )  # fmt: skip
    assert done.parity.largest <= 1 and done.parity.differing <= 1e-4
    assert done.findings[0].integer == {
        'QLinearConv': 6, 'QLinearLeakyRelu': 1, 'QLinearConcat': 1, 'QLinearSigmoid': 1, 'QLinearMul': 1,
    }  # fmt: skip
    assert done.findings[0].floating == {'Conv': 1}


@pytest.mark.parametrize('slopes, operator', [([0.25], 'leaky_relu'), ([0.2, -0.1, 1.0, 0.0], 'maximum'),
                                              ([0.2, 1.5, 0.3, 0.1], 'prelu')])  # fmt: skip
def test_prelu_in_the_form_that_is_fast(slopes, operator):
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.PReLU(len(slopes)), nn.Conv2d(4, 3, 3, padding=1))
    net[1].weight.data = torch.tensor(slopes)
    net, _ = calibrated(net, skip='quantized')
    plan = integer_plan(net, SHAPE)
    assert operator in {str(n.target).split('.')[1] for n in plan.graph.graph.nodes if n.op == 'call_function'}
    x = images(1, 16, seed=5)
    torch.testing.assert_close(plan.graph(x), net(x), atol=0.01, rtol=0)


def test_openvino_fuses_functions_into_layers(deployment, tmp_path):
    pytest.importorskip('openvino')
    net, plan = calibrated(distilling(), skip='quantized')
    pictures = [ParityImage('0', images(1, 16), 0)]
    done = exporting.export(
        net, plan, str(tmp_path / 'model.onnx'), shape=SHAPE, images=pictures, source='noise', engine='openvino',
        psnr=lambda output, _: float(output.mean()),
    )  # fmt: skip
    assert done.plan.left_out == [f'tensor_quantizers.{name}' for name in ('first', 'a', 'up', 'c')]
    assert sum(done.findings[1].integer.values()) >= 6


def test_a_network_trained_for_openvino_is_what_openvino_runs(deployment, tmp_path):
    pytest.importorskip('openvino')
    net, plan = calibrated(distilling(), skip='quantized', engine='openvino')
    pictures = [ParityImage('0', images(1, 16), 0)]
    done = exporting.export(
        net, plan, str(tmp_path / 'model.onnx'), shape=SHAPE, images=pictures, source='noise', engine='openvino',
        psnr=lambda output, _: float(output.mean()),
    )  # fmt: skip
    assert done.plan.left_out == [] and {t.kind for t in plan.tensors} == {'part'}
    assert done.parity.psnr['plan'] == pytest.approx(done.parity.psnr['test'], abs=1e-5)


class Attending(nn.Module):
    """A convolution, attention over the columns of each row, a perceptron, a convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)
        self.wide, self.narrow = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        y = self.first(x).permute(0, 2, 3, 1)
        q, k, v = self.qkv(self.norm(y)).chunk(3, dim=-1)
        y = y + torch.softmax(q @ k.transpose(-2, -1) * 0.3, dim=-1) @ v
        y = y + self.narrow(nn.functional.gelu(self.wide(self.norm(y))))
        return self.last(self.middle(y.permute(0, 3, 1, 2).contiguous()))


@pytest.mark.parametrize('block', [{}, {'w_bits': 4, 'a_bits': 4, 'w_granularity': 'channel'}], ids=['8', '4'])
def test_linear_layers_are_products_of_integers_and_the_engine_computes_the_float_rest(block, deployment, tmp_path):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, plan = calibrated(Attending(), skip='quantized', **block)
    pictures = [ParityImage(str(i), images(1, 16, seed=i), i) for i in range(4)]
    done = exporting.export(
        net, plan, str(tmp_path / 'model.onnx'), shape=(1, 3, 16, 16), images=pictures, source='noise', dynamic=False,
        psnr=lambda output, _: float(output.mean()),
    )  # fmt: skip
    assert done.parity.differing == 0
    assert done.findings[0].integer == {'QLinearConv': 2, 'MatMulInteger': 3, 'QLinearAdd': 2}
    assert sum(n.target is MATRIX_PRODUCT for n in done.plan.graph.graph.nodes) == 3
    regions = with_engine_regions(done.plan.graph)
    ran = [n for n in regions.graph.nodes if n.op == 'call_module']
    assert ran and not any(n.target in PRODUCTS for n in regions.graph.nodes)
    x = images(1, 16, seed=9)
    torch.testing.assert_close(Simulator(regions)(x), done.plan.graph(x), atol=0.05 if not block else 0.3, rtol=0)


def test_a_network_that_fixes_its_size_says_how_to_export_it():
    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
            self.size = 32

        def forward(self, x):
            return self.last(self.first(x).reshape(-1, 4, self.size, self.size))

    net, _ = calibrated(Fixed(), 32)
    with pytest.raises(QuantError, match='height and width of Fixed cannot stay free'):
        integer_plan(net, (1, 3, 32, 32))
    assert not integer_plan(net, (1, 3, 32, 32), dynamic=False).dynamic


def test_a_graph_without_inexact_operators_is_simulated_as_it_is():
    net, _ = calibrated(shuffling(), skip='quantized')
    graph = integer_plan(net, SHAPE).graph
    assert with_engine_regions(graph) is graph


def test_a_clip_free_network_ends_in_its_output_quantizer(deployment, tmp_path):
    class Clamped(Shuffling):
        def forward(self, x):
            return super().forward(x).clamp(0, 1)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net, plan = calibrated(Clamped(), method='cfqp', skip='quantized')
    done = exporting.export(
        net, plan, str(tmp_path / 'model.onnx'), shape=SHAPE, images=[ParityImage('a', images(1, 16), 0)],
        source='noise', psnr=lambda output, _: float(output.mean()),
    )  # fmt: skip
    assert done.parity.differing == 0 and 'output_quantizer' in done.plan.activations
    assert done.findings[0].integer['QLinearConv'] == 3
    assert not any('clamp' in str(node.target) for node in done.plan.graph.graph.nodes)


def test_weights_of_four_bits_take_half_the_bytes(deployment):
    import onnx

    kinds = {}
    for bits in (8, 4):
        net, _ = calibrated(shuffling(), w_bits=bits, skip='quantized', layers={'*': {'w_bits': bits, 'a_bits': 8}})
        model = exporting.packed_onnx(integer_plan(net, SHAPE))
        kinds[bits] = {tensor.data_type for tensor in model.graph.initializer
                       if tensor.name.endswith(('codes', 'int4'))}
        kinds[bits] -= {onnx.TensorProto.INT32}
        packed = [t for t in model.graph.initializer if t.data_type == onnx.TensorProto.INT4]
        assert all(len(t.raw_data) * 2 == np.prod(t.dims) for t in packed)
    assert kinds == {8: {onnx.TensorProto.INT8}, 4: {onnx.TensorProto.INT4}}


# ----------------------------------------------------------------------------------------------------------- refusals


def test_levels():
    assert to_levels(torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0])).tolist() == [0, 0, 128, 255, 255]


def small(tmp_path, **kwargs):
    net, plan = calibrated(tiny(), skip='quantized')
    given = {'shape': SHAPE, 'images': [ParityImage('a', images(1, 16))], 'source': 'noise', 'psnr': lambda *_: 0.0}
    return exporting.export(net, plan, str(tmp_path / 'model.onnx'), **{**given, **kwargs})


def test_a_file_that_fails_parity_is_not_left_behind(deployment, tmp_path, monkeypatch):
    monkeypatch.setattr(exporting, 'measure', lambda *a, **k: Parity('noise', 1, 100, 0.02, 3))
    with pytest.raises(QuantError, match=r'parity failed: 2\.0000 %'):
        small(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_psnr_is_held_to_the_tolerance_at_eight_bits():
    net, _ = calibrated(tiny(), skip='quantized')
    lowered = integer_plan(net, SHAPE)
    found = Parity('x', psnr={'test': 30.0, 'plan': 30.0, 'onnxruntime': 30.03})
    found.check(lowered, 4)
    with pytest.raises(QuantError, match=r'30\.030 dB, 30\.000 dB'):
        found.check(lowered, 8)


def test_a_full_disk_leaves_nothing(deployment, tmp_path, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr('basicsr_quant.deploy.files.os.fsync', full)
    with pytest.raises(QuantError, match=r'model\.onnx cannot be written: No space left'):
        small(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('kwargs, words', [
    ({'opset': 17}, '--opset 17'), ({'engine': 'tensorrt', 'opset': 99}, '--opset 99'),
])  # fmt: skip
def test_opsets_that_are_refused(kwargs, words, tmp_path):
    with pytest.raises(QuantError, match=words):
        small(tmp_path, **kwargs)


@pytest.mark.parametrize('name, engine, words', [
    ('model.pth', 'onnxruntime', 'ends in .onnx'), ('model.xml', 'onnxruntime', '--engine openvino'),
])  # fmt: skip
def test_names_that_are_refused(name, engine, words, tmp_path):
    with pytest.raises(QuantError, match=words):
        exporting.check_target(str(tmp_path / name), engine)


def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(errno.EACCES, 'Permission denied')

    monkeypatch.setattr('basicsr_quant.deploy.files.tempfile.TemporaryFile', refuse)
    with pytest.raises(QuantError, match='cannot be written: Permission denied'):
        small(tmp_path)


def test_a_network_without_quantizers_is_refused():
    with pytest.raises(QuantError, match='no quantized layer'):
        integer_plan(tiny().eval(), SHAPE)
