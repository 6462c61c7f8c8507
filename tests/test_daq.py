"""DAQ: step tables recomputed, grids, published numbers, choices from calibration images."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from helpers import BODY, assert_close, images, plan_of, quantized, reference, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from basicsr_quant.config import read_config
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import method_of, quantize
from basicsr_quant.methods.daq import output_error
from basicsr_quant.network.surgery import floating_point, quant_layers
from basicsr_quant.network.trace import trace
from basicsr_quant.quantizers import (
    DISTRIBUTIONS,
    DistributionRange,
    DistributionWeight,
    QuantContext,
    allocate_bits,
    channel_statistics,
    fake_quantize,
    quantize_statistics,
    step_table,
)
from basicsr_quant.quantizers.step_tables import SYMMETRIC_STEPS

# ------------------------------------------------------------------------------------------------------------- tables

DENSITIES = {  # one side, x > 0, deviation 1
    'gaussian': lambda x: np.exp(-x * x / 2) / math.sqrt(2 * math.pi),
    'laplacian': lambda x: np.exp(-math.sqrt(2) * x) / math.sqrt(2),
    'gamma': lambda x: np.sqrt(math.sqrt(3) / (8 * math.pi * x)) * np.exp(-math.sqrt(3) * x / 2),
    'uniform': lambda x: (x < math.sqrt(3)) / (2 * math.sqrt(3)),
}


def mse(distribution: str, step: float, bits: int) -> float:
    """E (x - q(x))^2, integrated with points that crowd at zero, where the Gamma density has its pole."""
    end = math.sqrt(3) if distribution == 'uniform' else 45.0
    t = (np.arange(400_000) + 0.5) / 400_000
    x, width = end * t**2, 2 * end * t / 400_000
    code = np.clip(np.ceil(x / step), 1, 2 ** (bits - 1)) - 0.5
    return float((2 * DENSITIES[distribution](x) * width * (x - code * step) ** 2).sum())


@pytest.mark.parametrize('bits', range(1, 9))
@pytest.mark.parametrize('distribution', DISTRIBUTIONS)
def test_table_is_where_the_error_is_least(distribution, bits):
    step = SYMMETRIC_STEPS[distribution][bits - 1]
    digits = 5e-4 if distribution == 'gaussian' else 5e-5  # half a unit of the last digit, and the integration's own
    ways = [mse(distribution, step + sign * 3 * digits, bits) for sign in (-1, 1)]
    assert mse(distribution, step, bits) < min(ways)


@pytest.mark.parametrize(
    ('bits', 'optimal', 'published'), [(2, 0.1190, 0.2135), (3, 0.0374, 0.0828), (4, 0.0116, 0.0286)]
)
def test_reference_table_is_the_next_wider_step(bits, optimal, published):
    steps = [step_table('gaussian', reference)[bits - 1] for reference in (False, True)]
    assert steps[1] == step_table('gaussian')[bits - 2]
    assert [round(mse('gaussian', s, bits), 4) for s in steps] == pytest.approx([optimal, published], abs=2e-4)


# ------------------------------------------------------------------------------------------------ the published numbers


@pytest.mark.parametrize('stat_bits', [4, 8, 32])
@pytest.mark.parametrize('rectified', [False, True], ids=['signed', 'relu'])
@pytest.mark.parametrize('bits', [2, 4])
def test_published_activations(bits, rectified, stat_bits):
    numbers = reference()
    quantizer = DistributionRange(bits, rectified, stat_bits, published=True)
    quantizer.set_steps(step_table('gaussian', reference=True))
    found = quantizer(torch.from_numpy(numbers['xr' if rectified else 'x']))
    wanted = numbers[f'daq_a{bits}_q{stat_bits}' + ('_relu' if rectified else '')]
    assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('bits', [2, 4])
def test_published_weights(bits):
    numbers = reference()
    quantizer = DistributionWeight(bits)
    quantizer.set_steps(step_table('gaussian', reference=True))
    found = quantizer(torch.from_numpy(numbers['w']))
    # The record holds the output of a convolution that was probed, so each filter carries that module's bias.
    bias = numbers[f'daq_w{bits}'] - found.numpy()
    assert np.ptp(bias.reshape(8, -1), axis=1).max() < 1e-6
    assert np.abs(bias).max() < 1 / math.sqrt(16 * 9), 'beyond the initial bias of a convolution with 16 x 9 inputs'


def test_reference_compat_selects_the_published_form():
    net = quantized('daq', 4, reference_compat=True, options={'stat_bits': 4})
    assert not method_of(plan_of(tiny(), 'daq', reference_compat=True)).needs_images
    method_of(plan_of(tiny(), 'daq', reference_compat=True)).calibrate(net, ())
    layer = net.body[0].conv2
    assert layer.input_quantizer.published and layer.input_quantizer.rectified
    assert layer.input_quantizer.step == pytest.approx(0.586)
    assert layer.weight_quantizer.step == pytest.approx(0.586)
    tail = torch.linspace(0, 1, 1024).reshape(1, 1, 32, 32) ** 100
    assert layer.input_quantizer(tail).unique().numel() > 2**4, 'the published grid is open above'
    clamped = DistributionRange(4, rectified=True)
    clamped.set_steps(layer.input_quantizer.steps)
    assert clamped(tail).unique().numel() <= 2**4


# --------------------------------------------------------------------------------------------------------------- grids


def activations(seed: int = 0, shape: tuple[int, ...] = (2, 6, 15, 17)) -> torch.Tensor:
    """Channels of very different mean, spread and tail."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=draw)
    scale = torch.logspace(-4, 3, shape[1]).reshape(1, -1, 1, 1)
    return x * x.abs().sqrt() * scale + torch.randn(1, shape[1], 1, 1, generator=draw) * scale


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 8), st.booleans(), st.integers(0, 1000), st.sampled_from([2, 8, 32]))
def test_a_channel_has_at_most_two_to_the_b_codes(bits, rectified, seed, stat_bits):
    x = activations(seed)
    x = x.relu() if rectified else x
    q = DistributionRange(bits, rectified, stat_bits)(x)
    assert max(channel.unique().numel() for sample in q for channel in sample) <= 2**bits
    if rectified:
        assert (q >= 0).all() and (q[x == 0] == 0).all()


@pytest.mark.parametrize('rectified', [False, True])
def test_bounds_are_fake_quantizes_bounds(rectified):
    x = activations().relu() if rectified else activations()
    quantizer = DistributionRange(3, rectified)
    lower, upper = quantizer.bounds(x)
    assert lower.shape == upper.shape == (2, 6, 1, 1)
    q, wanted = quantizer(x), fake_quantize(x, lower, upper, 3)
    step = (upper - lower) / 7
    assert (((q - wanted) / step).abs() < 1e-3).float().mean() > 0.995  # ties fall either way
    assert (((q - wanted) / step).abs() < 1.001).all()


@pytest.mark.parametrize('scale', [1e-12, 1e-3, 1.0, 1e12])
@pytest.mark.parametrize('rectified', [False, True])
def test_grid_scales_with_its_input(rectified, scale):
    x = activations(shape=(1, 3, 16, 16)) / 100
    x = x.relu() if rectified else x
    quantizer = DistributionRange(4, rectified)
    at = 2.0 ** round(math.log2(scale))
    assert_close(quantizer(x * at) / at, quantizer(x), rtol=1e-5, atol=1e-6 * float(x.abs().max()))


@pytest.mark.parametrize('stat_bits', [2, 4, 32])
@pytest.mark.parametrize('rectified', [False, True])
@pytest.mark.parametrize(
    'x',
    [
        torch.zeros(2, 3, 4, 4),
        torch.full((1, 3, 4, 4), 0.3),
        torch.rand(1, 3, 1, 1),
        torch.rand(2, 1, 4, 4),
        torch.rand(1, 1, 1, 1),
        torch.cat([torch.zeros(1, 1, 4, 4), torch.rand(1, 2, 4, 4)], dim=1),
        torch.full((1, 3, 4, 4), 1e-38),
        torch.full((1, 3, 4, 4), 1e18),
    ],
    ids=['dead', 'constant', 'pixel', 'one channel', 'one value', 'one dead', 'tiny', 'huge'],
)
@pytest.mark.parametrize('published', [False, True])
@pytest.mark.parametrize('mixed', [False, True])
def test_degenerate_inputs_stay_finite(x, rectified, stat_bits, published, mixed):
    q = DistributionRange(4, rectified, stat_bits, mixed=mixed, published=published)(x)
    assert q.isfinite().all() and q.shape == x.shape
    assert (q[x == 0].abs() <= 1.0).all()


def test_constant_channel_is_its_mean():
    x = torch.full((1, 2, 5, 5), 0.7)
    x[0, 1] = -3.0
    assert_close(DistributionRange(2)(x), x, rtol=1e-6)


@pytest.mark.parametrize('rectified', [False, True])
@pytest.mark.parametrize('bits', [2, 4])
def test_gradient_is_the_identity(bits, rectified):
    x = activations().relu() if rectified else activations()
    x.requires_grad_()
    weight = torch.randn(x.shape)
    (DistributionRange(bits, rectified)(x) * weight).sum().backward()
    assert torch.equal(x.grad, weight)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize('rectified', [False, True])
def test_other_dtypes(dtype, rectified):
    x = activations(shape=(2, 3, 8, 8)).clamp(-100, 100).to(dtype)
    x = x.relu() if rectified else x
    q = DistributionRange(4, rectified, stat_bits=8)(x)
    assert q.dtype == dtype
    assert_close(q.double(), DistributionRange(4, rectified, stat_bits=8)(x.float()).to(dtype).double(), rtol=1e-2)


def test_samples_do_not_influence_each_other():
    x = activations()
    quantizer = DistributionRange(3, stat_bits=4, mixed=True)
    assert_close(quantizer(x)[1:], quantizer(x[1:]), rtol=1e-5)


def test_statistics_of_rectified_inputs_count_positive_entries():
    x = activations().relu()
    _, found = channel_statistics(x, rectified=True)
    for n in range(x.shape[0]):
        for c in range(x.shape[1]):
            positive = torch.cat([x[n, c][x[n, c] > 0], torch.zeros(1)])
            assert_close(found[n, c, 0, 0], positive.std(correction=0), rtol=1e-4)


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_quantized_statistics(bits):
    values = torch.rand(3, 64, 1, 1).exp()
    q = quantize_statistics(values, step_table('gaussian')[bits - 1], bits)
    assert all(sample.unique().numel() <= 2**bits + 1 for sample in q)
    assert (q >= values.amin(dim=1, keepdim=True)).all()
    skewed = torch.cat([torch.full((1, 63, 1, 1), 0.1), torch.full((1, 1, 1, 1), 50.0)], dim=1)
    assert (quantize_statistics(skewed, step_table('gaussian')[bits - 1], bits) >= 0.1).all()


@pytest.mark.parametrize('per_channel', [False, True])
def test_weights(per_channel):
    weight = torch.randn(6, 5, 3, 3) * torch.logspace(-2, 0, 6).reshape(-1, 1, 1, 1)
    quantizer = DistributionWeight(3, per_channel)
    q = quantizer(weight)
    dims = (1, 2, 3) if per_channel else (0, 1, 2, 3)
    step = step_table('gaussian')[2] * weight.std(dims, keepdim=True)
    codes = q / step + 0.5
    assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert codes.round().min() >= -3 and codes.round().max() <= 4
    with torch.no_grad():
        assert_close(quantizer(2 * weight), 2 * q, rtol=1e-5)


def test_one_weight_a_channel_stays_finite():
    assert DistributionWeight(4, per_channel=True)(torch.randn(3, 1, 1, 1)).isfinite().all()


def test_compiles():
    quantizer = DistributionRange(4, rectified=True, stat_bits=4)
    x = activations().relu()
    assert_close(torch.compile(quantizer, backend='eager', fullgraph=True)(x), quantizer(x))


# ----------------------------------------------------------------------------------------------------- mixed precision


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 8), st.integers(0, 1000), st.sampled_from([1, 3, 64]))
def test_bits_spend_what_the_mean_allows(bits, seed, channels):
    deviation = torch.rand(2, channels, 1, 1, generator=torch.Generator().manual_seed(seed)).pow(4)
    found = allocate_bits(deviation, bits)
    assert torch.equal(found, found.round()) and found.min() >= 1 and found.max() <= 8
    mean = found.mean(dim=1)
    assert (mean <= bits).all()
    assert (mean > bits - 1).all()
    order = deviation.flatten(1).argsort(dim=1)
    assert (found.flatten(1).gather(1, order).diff(dim=1) >= 0).all()


def test_mixed_precision_halves_the_error_of_unequal_channels():
    x = torch.randn(1, 16, 32, 32) * torch.logspace(-1, 1, 16).reshape(1, -1, 1, 1)
    plain, mixed = DistributionRange(3), DistributionRange(3, mixed=True, name='layer')
    mixed.context = QuantContext()
    errors = [float((q(x) - x).square().mean()) for q in (plain, mixed)]
    assert errors[1] < errors[0] / 2
    assert mixed.context.bits['layer'].shape == (1,) and mixed.context.bits['layer'] <= 3.0


# -------------------------------------------------------------------------------------------------------------- method


def calibrated(**options):
    net = tiny()
    plan = plan_of(net, 'daq', 2, [n for n in BODY if n.endswith('conv2')], options=options)
    quantize(net, plan)
    seen = method_of(plan).calibrate(net, iter([images(1, seed=s) for s in range(4)]))
    return net, seen


def test_auto_takes_the_best_of_four():
    net, seen = calibrated(images=3)
    errors = seen.choices['output_mse']
    assert seen.images == 3 and len(errors) == 4
    chosen = {k: seen.choices[k] for k in ('step_table', 'w_step_table')}
    least = min(errors, key=errors.get)
    assert least == f'activations {chosen["step_table"]}, weights {chosen["w_step_table"]}'
    batches = [images(1, seed=s) for s in range(3)]
    with floating_point(net), torch.no_grad():
        targets = [net(b) for b in batches]
    assert output_error(net, batches, targets) == pytest.approx(errors[least])
    assert all(q.calibrated for layer in quant_layers(net).values() for q in layer.quantizers())


@pytest.mark.parametrize('pair', [('optimal', 'reference'), ('reference', 'optimal')])
def test_tables_given_need_no_images(pair):
    net = tiny()
    plan = plan_of(net, 'daq', 2, options={'step_table': pair[0], 'w_step_table': pair[1]})
    quantize(net, plan)
    method = method_of(plan)
    assert not method.needs_images
    assert method.calibrate(net, ()).images == 0
    layer = net.body[0].conv1
    for quantizer, table in zip(layer.quantizers(), pair):
        assert quantizer.step == pytest.approx(step_table('gaussian', reference=table == 'reference')[1])


def test_one_table_named_leaves_two_to_compare():
    _, seen = calibrated(step_table='reference', w_step_table='auto')
    assert len(seen.choices['output_mse']) == 2 and seen.choices['step_table'] == 'reference'


def test_no_images_is_one_sentence():
    net = quantized('daq')
    with pytest.raises(QuantError, match='no image'):
        method_of(plan_of(tiny(), 'daq')).calibrate(net, ())


def test_calibration_changes_nothing_but_quantizers():
    before = tiny().state_dict()
    net, _ = calibrated()
    after = net.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert net.training


def test_trains_and_its_copy_computes_the_same():
    net, _ = calibrated()
    optimizer = torch.optim.SGD(net.parameters(), 1e-2)
    method_of(plan_of(tiny(), 'daq')).attach(net, optimizer, 1.0)
    before = net.body[0].conv1.weight.detach().clone()
    net(images()).square().mean().backward()
    optimizer.step()
    assert not torch.equal(net.body[0].conv1.weight, before)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    twin = copy.deepcopy(net)
    with torch.no_grad():
        assert torch.equal(twin(images()), net(images()))


class WithLinear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, 4, 3, padding=1)
        self.mix = torch.nn.Conv2d(4, 4, 1)
        self.fc1 = torch.nn.Linear(4, 4)
        self.last = torch.nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x):
        x = self.mix(self.first(x)).permute(0, 2, 3, 1)
        return self.last(self.fc1(x).permute(0, 3, 1, 2))


def test_linear_layer_is_refused_with_what_to_write():
    net = WithLinear()
    with pytest.raises(QuantError, match=r"layer 'fc1' is a Linear; .* quant.layers: \{") as error:
        read_config({'method': 'daq', 'w_bits': 4, 'a_bits': 4}).plan(net, trace(net))
    glob = str(error.value).split("{'")[1].split("'")[0]
    block = {'method': 'daq', 'w_bits': 4, 'a_bits': 4, 'layers': {glob: 'fp'}}
    assert [p.layer for p in read_config(block).plan(net, trace(net)).quantized] == ['mix']


@pytest.mark.parametrize(
    'options',
    [{'step_table': 'optimal'}, {'w_step_table': 'optimal'}, {'distribution': 'gamma'}, {'mixed_precision': True}],
    ids=str,
)
def test_reference_compat_allows_nothing_unpublished(options):
    net = tiny()
    with pytest.raises(QuantError, match=f'quant.daq.{next(iter(options))}: .*reference_compat'):
        read_config({'method': 'daq', 'reference_compat': True, 'daq': options}).plan(net, trace(net))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'distribution': 'normal'}, 'quant.daq.distribution'),
        ({'step_table': 'best'}, 'quant.daq.step_table'),
        ({'stat_bits': 1}, 'quant.daq.stat_bits'),
        ({'images': 0}, 'quant.daq.images'),
        ({'init': 'mse'}, 'quant.daq.init is not an option'),
    ],
)
def test_wrong_options_name_themselves(options, message):
    with pytest.raises(QuantError, match=message):
        read_config({'method': 'daq', 'daq': options})
