"""Quantizer modules: what they keep, how ranges are set, and their gradients in closed form."""

from __future__ import annotations

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from helpers import assert_close, finite_differences, freeze
from torch import nn

from basicsr_quant.network.channels import layout, output_channels
from basicsr_quant.nn import twin_class, weight_rows
from basicsr_quant.quantizers import (
    LearnedRange,
    LearnedStep,
    MaxAbsWeight,
    OffsetRange,
    PercentileWeight,
    QuantContext,
    SymmetricRange,
    fake_quantize,
)

CHANNELS = 3
SHAPE = (CHANNELS, 1, 1, 1)
QUANTIZERS = {
    'LearnedRange': lambda: LearnedRange(4),
    'LearnedRange, integer': lambda: LearnedRange(4, zero_point='integer'),
    'LearnedRange per channel': lambda: LearnedRange(4, SHAPE),
    'LearnedRange, fixed': lambda: LearnedRange(4, learn=False),
    'LearnedStep': lambda: LearnedStep(4),
    'LearnedStep, unsigned': lambda: LearnedStep(4, signed=False),
    'LearnedStep per channel': lambda: LearnedStep(4, SHAPE),
    'SymmetricRange': lambda: SymmetricRange(4),
    'SymmetricRange, unsigned': lambda: SymmetricRange(4, unsigned=True),
    'SymmetricRange per channel': lambda: SymmetricRange(4, SHAPE, narrow_range=False),
    'OffsetRange': lambda: OffsetRange(4, CHANNELS),
    'PercentileWeight': lambda: PercentileWeight(4),
    'PercentileWeight per channel': lambda: PercentileWeight(4, SHAPE),
    'MaxAbsWeight': lambda: MaxAbsWeight(4),
    'MaxAbsWeight per channel': lambda: MaxAbsWeight(4, per_channel=True),
}
RELATIVE = [name for name in QUANTIZERS if 'Weight' not in name]
every = pytest.mark.parametrize('name', QUANTIZERS)


def sample(seed: int = 0) -> torch.Tensor:
    return torch.randn(CHANNELS, CHANNELS, 5, 5, generator=torch.Generator().manual_seed(seed))


def used(name: str) -> nn.Module:
    """A quantizer that calibration and training have moved away from its defaults."""
    quantizer = QUANTIZERS[name]()
    quantizer.set_range(torch.tensor(-1.3), torch.tensor(2.2))
    if isinstance(quantizer, OffsetRange):
        quantizer.select(shift=True, scale=False)
    with torch.no_grad():
        for parameter in quantizer.parameters():
            parameter.mul_(1.1).add_(0.01)
    return quantizer


# -------------------------------------------------------------------------------------------------- keeping and loading


@every
def test_state_dict_round_trip(name):
    source, target = used(name), QUANTIZERS[name]()
    state = {k: v.clone() for k, v in source.state_dict().items()}
    target.load_state_dict(state, strict=True)
    assert torch.equal(target(sample()), source(sample()))
    assert bool(target.calibrated) and int(target.bits) == 4
    assert {k: v.shape for k, v in target.state_dict().items()} == {k: v.shape for k, v in state.items()}


@every
def test_state_is_tensors_that_load_with_weights_only(name):
    file = io.BytesIO()
    torch.save(used(name).state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    assert not {'enabled', 'context'} & {k.split('.')[-1] for k in state}


@every
@pytest.mark.parametrize('how', [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=['deepcopy', 'pickle'])  # noqa: S301
def test_copies_compute_the_same_and_share_nothing(name, how):
    source = used(name)
    source.context = QuantContext()
    source.context.begin(sample())
    twin = how(source)
    assert torch.equal(twin(sample()), source(sample()))
    assert twin.context is not source.context and twin.context.input is None
    before = source(sample())
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers()]:
            if tensor.is_floating_point():
                tensor.fill_(0.123)
    assert torch.equal(source(sample()), before)


@every
def test_a_new_range_is_written_in_place(name):
    quantizer = QUANTIZERS[name]()
    assert bool(quantizer.calibrated) == isinstance(quantizer, MaxAbsWeight)
    before = {n: (id(t), t.data_ptr()) for n, t in [*quantizer.named_parameters(), *quantizer.named_buffers()]}
    wants = {n: p.requires_grad for n, p in quantizer.named_parameters()}
    quantizer.set_range(torch.tensor(-0.3), torch.tensor(0.7, requires_grad=True))
    after = {n: (id(t), t.data_ptr()) for n, t in [*quantizer.named_parameters(), *quantizer.named_buffers()]}
    assert before == after
    assert {n: p.requires_grad for n, p in quantizer.named_parameters()} == wants
    assert all(p.is_leaf for p in quantizer.parameters())
    assert bool(quantizer.calibrated)


@every
def test_switched_off_the_input_itself_passes(name):
    quantizer, x = used(name), sample()
    quantizer.enabled = False
    assert quantizer(x) is x
    quantizer.enabled = True
    assert not torch.equal(quantizer(x), x)


@every
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_follows_the_input(name, dtype):
    x = sample().to(dtype).requires_grad_()
    q = used(name)(x)
    assert q.dtype == dtype
    q.float().sum().backward()
    assert x.grad.dtype == dtype


@every
def test_representation_names_bits_and_grid(name):
    assert 'bits=4, zero_point=' in repr(QUANTIZERS[name]())


# ---------------------------------------------------------------------------------------------------------- their range


@pytest.mark.parametrize(
    ('name', 'given', 'wanted'),
    [
        ('LearnedRange', (-1.0, 3.0), (-1.0, 3.0)),
        ('LearnedRange', (0.5, 3.0), (0.5, 3.0)),
        ('LearnedRange per channel', (-1.0, 3.0), (-1.0, 3.0)),
        ('OffsetRange', (-1.0, 3.0), (-1.0, 3.0)),
        ('SymmetricRange', (-1.0, 3.0), (-3.0, 3.0)),
        ('SymmetricRange', (-4.0, 3.0), (-4.0, 4.0)),
        ('SymmetricRange, unsigned', (0.0, 3.0), (0.0, 3.0)),
        ('SymmetricRange per channel', (-4.0, 3.0), (-4.0, 4.0)),
        ('LearnedStep', (-1.0, 7.0), (-8.0, 7.0)),
        ('LearnedStep', (-16.0, 7.0), (-16.0, 14.0)),
        ('LearnedStep, unsigned', (0.0, 30.0), (0.0, 30.0)),
    ],
)
def test_set_range_gives_these_bounds(name, given, wanted):
    quantizer = QUANTIZERS[name]()
    for _ in range(2):  # a second calibration replaces the first
        quantizer.set_range(*map(torch.tensor, given))
        lower, upper = quantizer.bounds(sample())
        assert_close(lower, torch.full_like(lower, wanted[0]), rtol=1e-6, atol=1e-6)
        assert_close(upper, torch.full_like(upper, wanted[1]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('name', RELATIVE)
def test_parameters_are_relative_to_the_calibrated_range(name):
    """Any scale of the features gives the same parameters, and a parameter's step is the same share of the range."""
    small, large = QUANTIZERS[name](), QUANTIZERS[name]()
    small.set_range(torch.tensor(-0.25), torch.tensor(0.5))
    large.set_range(torch.tensor(-0.25) * 1024, torch.tensor(0.5) * 1024)
    for (n, a), (_, b) in zip(small.named_parameters(), large.named_parameters()):
        assert torch.equal(a, b), n
        if n not in ('shift', 'scale'):
            assert a.abs().max() <= 1
    for quantizer in (small, large):
        with torch.no_grad():
            for parameter in quantizer.parameters():
                parameter.mul_(1.25)
    assert torch.equal(large(sample() * 1024), small(sample()) * 1024)


@pytest.mark.parametrize('name', RELATIVE)
def test_a_layer_that_calibration_saw_as_constant_works_on(name):
    quantizer = QUANTIZERS[name]()
    for value in (0.0, 2.0, -2.0):
        quantizer.set_range(torch.tensor(value), torch.tensor(value))
        assert all(t.isfinite().all() for t in quantizer.state_dict().values())
        quantizer.clamp_range()
        lower, upper = quantizer.bounds(sample())
        assert (upper > lower).all() and quantizer(sample()).isfinite().all()


@pytest.mark.parametrize('name', [n for n in QUANTIZERS if 'MaxAbs' not in n])
@pytest.mark.parametrize('value', [0.0, -5.0, 1e-9])
def test_clamp_range_keeps_the_range_open_and_the_parameters_themselves(name, value):
    quantizer = used(name)
    parameters = [id(p) for p in quantizer.parameters()]
    bounds = {'lower': 1.0, 'upper': value} if isinstance(quantizer, LearnedRange) else None
    with torch.no_grad():
        for n, parameter in quantizer.named_parameters():
            parameter.fill_(bounds.get(n, value) if bounds else value)
    quantizer.clamp_range()
    assert [id(p) for p in quantizer.parameters()] == parameters
    lower, upper = quantizer.bounds(sample())
    unit = quantizer.unit if name in RELATIVE else sample().abs().max()
    assert (upper - lower >= 0.9e-3 * unit).all()
    assert quantizer(sample()).isfinite().all()


@pytest.mark.parametrize('name', [n for n in QUANTIZERS if 'MaxAbs' not in n])
def test_clamp_range_leaves_a_sound_range_alone(name):
    quantizer = used(name)
    before = copy.deepcopy(quantizer.state_dict())
    quantizer.clamp_range()
    assert all(torch.equal(v, before[k]) for k, v in quantizer.state_dict().items())


@every
def test_a_channel_of_zeros_stays_zero_and_finite(name):
    weight = sample()
    weight[1] = 0
    quantizer = used(name)
    if 'channel' in name and not isinstance(quantizer, MaxAbsWeight):
        bound = weight.flatten(1).abs().amax(1).reshape(SHAPE)
        quantizer.set_range(-bound, bound)
    weight.requires_grad_()
    q = quantizer(weight)
    q.square().sum().backward()
    assert q.isfinite().all() and weight.grad.isfinite().all()
    if 'channel' in name:
        assert q[1].abs().max() <= 1e-5
    assert all(p.grad is None or p.grad.isfinite().all() for p in quantizer.parameters())


# ----------------------------------------------------------------------------------------------------- closed gradients


def step_gradient(x, step, low, high):
    """dq/ds of LSQ, element by element."""
    v = x / step
    inside = torch.round(v) - v
    return torch.where(v < low, torch.full_like(v, low), torch.where(v > high, torch.full_like(v, high), inside))


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('signed', [True, False])
@pytest.mark.parametrize(
    ('shape', 'batched', 'x_shape', 'count'),
    [
        pytest.param((), True, (5, 3, 4, 4), 48, id='activation: values of one sample'),
        pytest.param((), True, (5, 7, 6), 42, id='tokens: values of one sample'),
        pytest.param((), False, (5, 3, 4, 4), 240, id='weight: all values'),
        pytest.param((5, 1, 1, 1), False, (5, 3, 4, 4), 48, id='weight per channel: values of one channel'),
        pytest.param((), False, (5, 6), 30, id='linear weight'),
    ],
)
def test_lsq_gradient_with_its_factor(shape, batched, x_shape, count, signed, bits):
    quantizer = LearnedStep(bits, shape, signed=signed, batched=batched)
    quantizer.set_step(torch.tensor(0.25).expand(shape))
    with torch.no_grad():
        quantizer.step.mul_(1.5)
    draw = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(x_shape, generator=draw) for _ in range(2))
    if not signed:
        x = x.abs()
    quantizer(x).mul(weights).sum().backward()
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
    each = weights * step_gradient(x, 0.375, low, high)
    g = 1 / math.sqrt(count * high)
    wanted = each.flatten(1).sum(1).reshape(shape) if shape else each.sum()
    assert_close(quantizer.step.grad, wanted * g * 0.25, rtol=1e-4, atol=1e-5)  # 0.25: the unit of the parameter


def test_lsq_takes_an_empty_batch():
    quantizer = LearnedStep(4, batched=True)
    assert quantizer(torch.empty(0, 3, 4, 4)).shape == (0, 3, 4, 4)


def test_pams_gradient_is_that_of_the_published_code():
    quantizer = SymmetricRange(4)
    quantizer.set_range(torch.tensor(-1.5), torch.tensor(1.5))
    x, weights = sample(), sample(1)
    q = quantizer(x)
    (q * weights).sum().backward()
    inside = x.abs() <= 1.5
    each = torch.where(inside, (q.detach() - x) / 1.5, x.sign())
    assert inside.any() and not inside.all()
    assert_close(quantizer.alpha.grad, (each * weights).sum() * 1.5, rtol=1e-5)


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_pams_grid_by_its_formula(bits):
    quantizer, x, m = SymmetricRange(bits), sample() * 2, 2 ** (bits - 1) - 1
    quantizer.set_range(torch.tensor(-1.5), torch.tensor(1.5))
    wanted = np.rint(np.clip(x.double().numpy(), -1.5, 1.5) * m / 1.5) * 1.5 / m
    assert_close(quantizer(x), torch.from_numpy(wanted).float(), rtol=1e-6)
    assert quantizer(torch.zeros(1)) == 0


@pytest.mark.parametrize('per_channel', [False, True])
def test_percentile_weight_gamma_gradient(per_channel):
    """dL/dgamma = f(W) sum dL/dq dq/du with dq/du = (q - w) / u inside and sign(w) outside; f(W) is a constant."""
    weight, weights = sample(), sample(1)
    quantizer = PercentileWeight(3, SHAPE if per_channel else (), percent=90.0)
    with torch.no_grad():
        quantizer.gamma.mul_(0.8)
    w = weight.clone().requires_grad_()
    q = quantizer(w)
    (q * weights).sum().backward()

    rows = weight.abs().flatten(1) if per_channel else weight.abs().reshape(1, -1)
    f = torch.from_numpy(np.percentile(rows.numpy(), 90, axis=1)).float().reshape(SHAPE if per_channel else ())
    u = 0.8 * f
    inside = weight.abs() <= u
    each = torch.where(inside, (q.detach() - weight) / u, weight.sign()) * weights
    wanted = each.flatten(1).sum(1).reshape(SHAPE) if per_channel else each.sum()
    assert_close(quantizer.gamma.grad, f * wanted, rtol=1e-4, atol=1e-4)
    assert torch.equal(w.grad, weights * inside)


def test_percentile_weight_follows_the_weight_and_fits_a_bound():
    quantizer, weight = PercentileWeight(4), sample()
    quantizer.set_range(torch.tensor(-9.0), torch.tensor(9.0))
    assert quantizer.gamma == 1
    f = np.percentile(weight.abs().numpy(), 99)
    for factor in (1.0, 3.0):
        assert_close(quantizer.bounds(weight * factor)[1], torch.tensor(factor * f).float(), rtol=1e-5)
    quantizer.fit(weight, torch.tensor(0.5))
    assert_close(quantizer.bounds(weight)[1], torch.tensor(0.5), rtol=1e-6)
    quantizer.fit(torch.zeros(3, 3), torch.tensor(0.0))
    assert quantizer.gamma.isfinite()


def test_max_abs_weight_has_its_extreme_and_zero_as_codes():
    weight = sample()
    q = MaxAbsWeight(4)(weight)
    assert q.abs().max() == weight.abs().max() and (q == 0).any()
    rows = MaxAbsWeight(4, per_channel=True)(weight)
    assert_close(rows.flatten(1).abs().amax(1), weight.flatten(1).abs().amax(1), rtol=1e-6)


@pytest.mark.parametrize('zero_point', ['float', 'integer'])
def test_learned_range_gradient_is_the_functions_times_the_unit(zero_point):
    quantizer = LearnedRange(3, zero_point=zero_point).double()
    quantizer.set_range(torch.tensor(-0.5), torch.tensor(1.5))
    x = sample().double()
    quantizer(x).square().sum().backward()
    args = [x, torch.tensor(-0.5).double(), torch.tensor(1.5).double(), 3]
    frozen = freeze(*args, zero_point=zero_point)
    wanted = finite_differences(lambda low, high: frozen(x, low, high, 3).square().sum(), args[1:3])
    assert_close(quantizer.lower.grad, wanted[0] * 2.0, rtol=1e-5)
    assert_close(quantizer.upper.grad, wanted[1] * 2.0, rtol=1e-5)


# -------------------------------------------------------------------------------------------------------------- offsets


@pytest.mark.parametrize('shift', [False, True])
@pytest.mark.parametrize('scale', [False, True])
def test_offsets_start_as_identity_and_survive_saving(shift, scale):
    quantizer, plain = OffsetRange(4, CHANNELS), LearnedRange(4)
    for q in (quantizer, plain):
        q.set_range(torch.tensor(-1.0), torch.tensor(2.0))
    quantizer.select(shift=shift, scale=scale)
    assert torch.equal(quantizer(sample()), plain(sample()))

    with torch.no_grad():
        quantizer.shift += 0.1
        quantizer.scale *= 1.2
    loaded = OffsetRange(4, CHANNELS)
    loaded.load_state_dict(quantizer.state_dict())
    moved = sample() * (1.2 if scale else 1.0) + (0.1 * 3.0 if shift else 0.0)
    for q in (quantizer, loaded, copy.deepcopy(quantizer)):
        assert_close(q(sample()), plain(moved), rtol=1e-5, atol=1e-6)
    loaded(sample()).square().sum().backward()
    assert (loaded.shift.grad is not None) == shift and (loaded.scale.grad is not None) == scale
    loaded.select(shift=False, scale=False)
    assert torch.equal(loaded(sample()), plain(sample()))


def test_offsets_pass_unchanged_while_switched_off():
    quantizer, x = OffsetRange(4, CHANNELS), sample()
    quantizer.select(shift=True, scale=True)
    quantizer.enabled = False
    assert quantizer(x) is x


# --------------------------------------------------------------------------------------------------- layers and context


@pytest.mark.parametrize(
    ('layer', 'shape'),
    [
        pytest.param(nn.Conv2d(3, 6, 3, padding=1), (2, 3, 8, 8), id='convolution'),
        pytest.param(nn.Conv2d(6, 6, 3, groups=3, stride=2, dilation=2), (2, 6, 9, 9), id='grouped, strided, dilated'),
        pytest.param(nn.Conv2d(3, 6, 3, padding=1, padding_mode='reflect', bias=False), (2, 3, 8, 8), id='reflecting'),
        pytest.param(nn.Conv2d(3, 6, 3, padding='same'), (3, 8, 8), id='without a batch'),
        pytest.param(nn.Conv1d(4, 6, 3, padding=1, groups=2), (2, 4, 9), id='one dimension'),
        pytest.param(nn.Conv3d(4, 6, 3, padding=1, stride=2), (2, 4, 5, 6, 7), id='three dimensions'),
        pytest.param(nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 9), id='transposed, one dimension'),
        pytest.param(nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1), (2, 4, 7, 8), id='transposed'),
        pytest.param(nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2), (2, 4, 7, 8), id='transposed, grouped'),
        pytest.param(nn.ConvTranspose3d(4, 6, 3, groups=2, bias=False), (2, 4, 3, 4, 5), id='transposed, grouped, 3-D'),
        pytest.param(nn.Linear(5, 7), (2, 4, 5), id='linear'),
        pytest.param(nn.Linear(5, 7, bias=False), (5,), id='linear, one vector'),
    ],
)
def test_a_quantized_layer(layer, shape):
    twin, x = twin_class(layer).from_float(layer), torch.randn(shape)
    assert torch.equal(twin(x), layer(x)) and twin.quantizers() == []
    assert all(a is b for a, b in zip(twin.parameters(), layer.parameters()))
    twin.input_quantizer, twin.weight_quantizer = LearnedRange(4), MaxAbsWeight(4)
    assert twin.quantizers() == [twin.input_quantizer, twin.weight_quantizer]
    assert len(list(layer.children())) == 0, 'the original must gain nothing'
    with torch.no_grad():
        wanted = copy.deepcopy(layer)
        wanted.weight.copy_(MaxAbsWeight(4)(layer.weight))
    half = torch.tensor(0.5)
    assert_close(twin(x), wanted(fake_quantize(x, -half, half, 4)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('kind', [nn.Conv2d, nn.ConvTranspose2d])
def test_a_range_per_channel_is_of_an_output_channel(kind, groups):
    """An output channel whose weights are k times as large, with a range of its own, is k times as large."""
    layer, x = kind(8, 12, 3, groups=groups, bias=False), torch.randn(1, 8, 6, 6)
    scales = 2.0 ** torch.arange(12)
    scaled = copy.deepcopy(layer)
    scaled.weight.data.mul_(output_channels(scales, layer.weight, *layout(layer)))
    found = []
    for each in (layer, scaled):
        twin = twin_class(each).from_float(each)
        twin.weight_quantizer = MaxAbsWeight(2, per_channel=True)
        assert weight_rows(twin).shape == (12, 8 // groups, 3, 3)
        found.append(twin(x))
    assert not torch.allclose(found[0], layer(x), rtol=0.01)
    assert_close(found[1], found[0] * scales[:, None, None], rtol=1e-5, atol=1e-6)


def test_an_output_size_is_passed_on():
    layer, x = nn.ConvTranspose2d(2, 3, 3, stride=2), torch.randn(1, 2, 5, 5)
    twin = twin_class(layer).from_float(layer)
    assert torch.equal(twin(x, output_size=[12, 11]), layer(x, output_size=[12, 11]))


def test_context_measures_once_per_pass():
    context, calls = QuantContext(), []

    def measure(x):
        calls.append(1)
        return x.mean()

    with pytest.raises(RuntimeError, match='outside a forward pass'):
        context.measure('mean', measure)
    for value in (1.0, 2.0):
        context.begin(torch.full((1, 3, 2, 2), value))
        assert [float(context.measure('mean', measure)) for _ in range(3)] == [value] * 3
        context.bits['layer'] = torch.tensor(4.0)
    assert len(calls) == 2
    context.begin(torch.zeros(1))
    assert context.bits == {}
