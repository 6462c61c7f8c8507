"""The fake-quantize function against a second writing, NumPy, PyTorch's own operators, and its promises."""

from __future__ import annotations

import importlib
import itertools
import math

import numpy as np
import pytest
import torch
from helpers import assert_close, finite_differences, freeze, gradients, steps
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from basicsr_quant.quantizers import align_zero_point, fake_quantize, num_steps

module = importlib.import_module('basicsr_quant.quantizers.fake_quantize')
ZERO_POINTS = ['float', 'integer']
NARROW = pytest.mark.parametrize('narrow', [False, True], ids=['wide', 'narrow'])


@pytest.fixture
def plain(monkeypatch):
    """Switches the scalar path off, as often as asked."""
    return lambda: monkeypatch.setattr(module, '_is_scalar_case', lambda *_: False)


# ------------------------------------------------------------------------------------------------------- the gradients

# Bounds and bits for x of shape (3, 2, 2, 2), by how they broadcast. Points lie inside, above and below every range.
BOUNDS = {
    'per tensor': ([-0.7], [1.1], ()),
    'per channel of a weight': ([-0.7, -1.3, -0.2], [1.1, 0.4, 0.9], (3, 1, 1, 1)),
    'per channel of an input': ([-0.7, -1.3], [1.1, 0.4], (1, 2, 1, 1)),
    'upper alone per sample': ([-0.7], [1.1, 0.4, 0.9], (3, 1, 1, 1)),
    'symmetric': ([-0.9], [0.9], ()),
    'from zero': ([0.0], [0.9], ()),
    'all positive': ([0.2], [0.9], ()),
    'all negative': ([-0.9], [-0.2], ()),
}
BITS = {
    'number': 3,
    'fraction': 3.4,
    'tensor': torch.tensor(3.4, dtype=torch.float64),
    'tensor per sample': torch.tensor([2.3, 4.0, 7.7], dtype=torch.float64).reshape(3, 1, 1, 1),
}


@pytest.mark.parametrize('zero_point', ZERO_POINTS)
@NARROW
@pytest.mark.parametrize('bits', BITS)
@pytest.mark.parametrize('bounds', BOUNDS)
def test_gradients_are_finite_differences_of_the_frozen_rounding(bounds, bits, narrow, zero_point):
    low, high, shape = BOUNDS[bounds]
    if zero_point == 'integer' and bounds == 'from zero':
        low = [-1e-3]  # at exactly zero the widening of the range has a kink
    lower, upper = (torch.tensor(b, dtype=torch.float64) for b in (low, high))
    lower, upper = (b.reshape(shape if b.numel() > 1 else ()) for b in (lower, upper))
    draw = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(3, 2, 2, 2, generator=draw, dtype=torch.float64) for _ in range(2))
    kwargs = {'zero_point': zero_point, 'narrow_range': narrow}
    args = [x, lower, upper, BITS[bits]]

    frozen = freeze(*args, **kwargs)
    assert_close(fake_quantize(*args, **kwargs), frozen(*args), rtol=1e-12, atol=1e-12)
    found = gradients(lambda *a: (fake_quantize(*a, **kwargs) * weights).sum(), args)
    wanted = finite_differences(lambda *a: (frozen(*a) * weights).sum(), args)
    for ours, theirs in zip(found, wanted):
        if theirs is not None:
            assert ours.abs().sum() > 0 or theirs.abs().sum() == 0
            assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('zero_point', ZERO_POINTS)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ('x', 'dx', 'dl', 'du'),
    [
        pytest.param(-1.0, 1, 0, 0, id='at the lower bound'),
        pytest.param(2.0, 1, 0, 0, id='at the upper bound'),
        pytest.param(0.0, 1, 0, 0, id='at a code'),
        pytest.param(-1.5, 0, 1, 0, id='below'),
        pytest.param(2.5, 0, 0, 1, id='above'),
        pytest.param(-math.inf, 0, 1, 0, id='far below'),
        pytest.param(math.inf, 0, 0, 1, id='far above'),
        pytest.param(math.nextafter(2.0, 3.0), 0, 0, 1, id='just above, double'),
    ],
)
def test_gradients_at_the_bounds_and_beyond(x, dx, dl, du, dtype, zero_point):
    if dtype == torch.float32 and not math.isinf(x):
        assert x == float(np.float32(x)) or x == math.nextafter(2.0, 3.0)
        x = float(np.nextafter(np.float32(2), np.float32(3))) if x == math.nextafter(2.0, 3.0) else x
    args = [torch.tensor([x], dtype=dtype), torch.tensor(-1.0, dtype=dtype), torch.tensor(2.0, dtype=dtype)]
    found = gradients(lambda *a: fake_quantize(*a, 2, zero_point=zero_point).sum(), args)
    assert [float(g) for g in found] == [dx, dl, du]


def test_bits_gradient_of_points_outside_is_zero():
    bits = torch.tensor(3.0, requires_grad=True)
    fake_quantize(torch.tensor([-9.0, 9.0]), torch.tensor(-1.0), torch.tensor(2.0), bits).sum().backward()
    assert bits.grad == 0


def test_every_gradient_alone_equals_all_at_once(plain):
    for scalar in (True, False):
        if not scalar:
            plain()
        args = [torch.randn(64), torch.tensor(-0.4), torch.tensor(1.2)]
        together = gradients(lambda *a: fake_quantize(*a, 3).sum(), args)
        for index in range(3):
            leaves = [a.clone().requires_grad_(i == index) for i, a in enumerate(args)]
            fake_quantize(*leaves, 3).sum().backward()
            assert torch.equal(leaves[index].grad, together[index])


# ------------------------------------------------------------------------------------------ scalar path and plain path

RANGES = [(-1.0, 2.0), (-0.013, 0.0271), (0.0, 6.0), (-3.0, 0.0), (-1.5, 1.5), (0.5, 0.75), (-300.0, 41.0)]


@pytest.mark.parametrize('zero_point', ZERO_POINTS)
@NARROW
@pytest.mark.parametrize(('lower', 'upper'), RANGES)
@pytest.mark.parametrize('bits', [2, 4, 8])
def test_scalar_path_equals_the_plain_one(lower, upper, bits, narrow, zero_point, plain):
    draw = torch.Generator().manual_seed(bits)
    x = torch.randn(4096, generator=draw) * (upper - lower) / 2 + (upper + lower) / 2
    weights = torch.randn(4096, generator=draw)
    args = [x, torch.tensor(lower), torch.tensor(upper)]
    found = []
    for scalar in (True, False):
        if not scalar:
            plain()
        q = fake_quantize(*args, bits, zero_point=zero_point, narrow_range=narrow)
        grads = gradients(
            lambda *a: (fake_quantize(*a, bits, zero_point=zero_point, narrow_range=narrow) * weights).sum(), args
        )
        found.append((q, *grads))
    (q, gx, *g), (q_plain, gx_plain, *g_plain) = found
    if zero_point == 'integer':
        assert torch.equal(q, q_plain)
    else:  # the zero point's fraction is added in another order
        assert_close(q, q_plain, rtol=1e-6, atol=1e-6 * max(abs(lower), abs(upper)))
    assert torch.equal(gx, gx_plain)
    assert_close(g, g_plain, rtol=1e-4, atol=1e-3)  # sums of 4096 terms of size 1


def test_scalar_path_is_taken_and_only_where_it_may():
    x, one = torch.randn(3, 4), torch.tensor(1.0)
    assert module._is_scalar_case(x, -one, one, 4)
    assert module._is_scalar_case(torch.nn.Parameter(x), -one, one.reshape(1, 1), 4)
    for other in ((x.double(), -one, one, 4), (x, -one, one.expand(3, 1), 4), (x, -one, one, torch.tensor(4.0))):
        assert not module._is_scalar_case(*other)


# -------------------------------------------------------------------------------------------------- promises, any range


@st.composite
def cases(draw):
    """x and a range that may lie anywhere, at most 50 widths away from zero."""
    width = draw(st.floats(1e-3, 1e3))
    lower = draw(st.floats(-50.0, 50.0)) * width
    values = draw(st.lists(st.floats(-0.5, 1.5, width=32), min_size=1, max_size=40))
    x = torch.tensor([v * width + lower for v in values])
    return x, torch.tensor(lower), torch.tensor(lower + width), draw(st.integers(2, 8)), draw(st.booleans())


def tolerance(lower, upper):
    return 1e-6 * float(torch.maximum(lower.abs(), upper.abs()))


PROPERTY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.mark.parametrize('zero_point', ZERO_POINTS)
@pytest.mark.parametrize('path', ['scalar', 'plain'])
def test_promises_of_the_grid(path, zero_point, plain):
    if path == 'plain':
        plain()

    @PROPERTY
    @given(cases())
    def promises(case):
        x, lower, upper, bits, narrow = case
        kwargs = {'zero_point': zero_point, 'narrow_range': narrow}
        q = fake_quantize(x, lower, upper, bits, **kwargs)
        if zero_point == 'integer':
            lower, upper = align_zero_point(lower, upper, bits, narrow)
        step = (upper - lower) / steps(bits, narrow)
        slack = tolerance(lower, upper)
        assert q.shape == x.shape
        assert len(q.unique()) <= steps(bits, narrow) + 1
        assert (q >= lower - slack).all() and (q <= upper + slack).all()
        inside = (x >= lower) & (x <= upper)
        assert ((q - x).abs()[inside] <= step / 2 + slack).all()
        codes = (q.double() - lower.double()) / step.double()
        assert ((codes - codes.round()).abs() * step <= slack).all()
        again = fake_quantize(q, lower, upper, bits, **kwargs)
        assert ((again - q).abs() <= slack).all()
        order = x.sort().indices
        assert (q[order].diff() >= 0).all()

    promises()


@pytest.mark.parametrize('path', ['scalar', 'plain'])
def test_integer_codes_equal_those_of_an_integer_engine(path, plain):
    if path == 'plain':
        plain()

    @PROPERTY
    @given(cases())
    def engine(case):
        x, lower, upper, bits, narrow = case
        n = int(num_steps(bits, narrow))
        q = fake_quantize(x, lower, upper, bits, zero_point='integer', narrow_range=narrow)
        low, high = (b.numpy() for b in align_zero_point(lower, upper, bits, narrow))
        scale = np.float32((high - low) / np.float32(n))
        zero = np.rint(-low / scale)
        assert 0 <= zero <= n
        assert abs(zero * scale + low) <= 1e-5 * (high - low)  # the aligned lower bound is a whole number of steps
        codes = np.clip(np.rint(x.numpy() / scale) + zero, 0, n)
        assert np.array_equal(q.numpy(), (codes - zero).astype(np.float32) * scale)
        assert fake_quantize(torch.zeros(1), lower, upper, bits, zero_point='integer', narrow_range=narrow) == 0

    engine()


@PROPERTY
@given(cases())
def test_alignment_moves_by_at_most_half_a_step_after_widening(case):
    _, lower, upper, bits, narrow = case
    low, high = align_zero_point(lower, upper, bits, narrow)
    wide_low, wide_high = lower.clamp(max=0), upper.clamp(min=0)
    step = (wide_high - wide_low) / steps(bits, narrow)
    slack = tolerance(wide_low, wide_high)
    assert abs(low - wide_low) <= step / 2 + slack and abs(high - wide_high) <= step / 2 + slack
    assert abs((high - low) - (wide_high - wide_low)) <= slack
    again = align_zero_point(low, high, bits, narrow)
    assert abs(again[0] - low) <= slack and abs(again[1] - high) <= slack


@pytest.mark.parametrize('zero_point', ZERO_POINTS)
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_symmetric_narrow_range_is_odd_and_holds_zero(bits, zero_point):
    x, bound = torch.linspace(0, 3, 2001), torch.tensor(1.7)
    x = torch.cat([x, -x])
    kwargs = {'zero_point': zero_point, 'narrow_range': True}
    q = fake_quantize(x, -bound, bound, bits, **kwargs)
    assert torch.equal(fake_quantize(-x, -bound, bound, bits, **kwargs), -q)
    assert fake_quantize(torch.zeros(1), -bound, bound, bits, **kwargs) == 0
    assert len(q.unique()) == 2**bits - 1


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_symmetric_wide_range_is_mid_rise(bits):
    q = fake_quantize(torch.linspace(-3, 3, 2001), torch.tensor(-1.7), torch.tensor(1.7), bits).unique()
    assert len(q) == 2**bits
    step = 3.4 / (2**bits - 1)
    assert_close(q.abs().min(), step / 2, rtol=1e-5)


@pytest.mark.parametrize(
    ('bits', 'narrow', 'n'), [(2, False, 3), (2, True, 2), (8, False, 255), (3.5, True, 2**3.5 - 2)]
)
def test_number_of_steps(bits, narrow, n):
    assert num_steps(bits, narrow) == n
    assert_close(num_steps(torch.tensor(float(bits)), narrow), n)


# --------------------------------------------------------------------------------------------------- against PyTorch's


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('zero', [0, 1, 3])
def test_equals_torch_per_tensor(bits, zero):
    scale, n = 0.125, 2**bits - 1  # a power of two: ties are exact, and both round them to even
    x = torch.cat([torch.arange(-300, 300) * scale / 2, torch.randn(2000) * n * scale])
    lower, upper = torch.tensor(-zero * scale), torch.tensor((n - zero) * scale)
    leaf = x.clone().requires_grad_()
    ours = fake_quantize(leaf, lower, upper, bits, zero_point='integer')
    theirs = torch.fake_quantize_per_tensor_affine(x, scale, zero, 0, n)
    assert torch.equal(ours, theirs)
    ours.sum().backward()
    # PyTorch also lets gradients through within half a step beyond the range.
    away = ((x < lower - scale / 2) | (x > upper + scale / 2) | ((x >= lower) & (x <= upper))).nonzero()[:, 0]
    leaf_2 = x.clone().requires_grad_()
    torch.fake_quantize_per_tensor_affine(leaf_2, scale, zero, 0, n).sum().backward()
    assert torch.equal(leaf.grad[away], leaf_2.grad[away])


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_equals_torch_per_channel(bits):
    n = 2**bits - 1
    x = torch.randn(4, 5, 3, 3) * 3
    scale, zero = torch.tensor([0.5, 0.25, 1.0, 0.125]), torch.tensor([0, 1, 2, 3], dtype=torch.int32)
    lower = (-zero * scale).reshape(4, 1, 1, 1)
    ours = fake_quantize(x, lower, lower + (n * scale).reshape(4, 1, 1, 1), bits, zero_point='integer')
    assert torch.equal(ours, torch.fake_quantize_per_channel_affine(x, scale, zero, 0, 0, n))


@pytest.mark.parametrize('zero_point', ZERO_POINTS)
def test_each_channel_and_each_sample_alone(zero_point):
    x = torch.randn(3, 4, 5, 5)
    lower, upper = -torch.rand(3, 4, 1, 1), torch.rand(3, 4, 1, 1)
    bits = torch.tensor([2.0, 4.0, 8.0]).reshape(3, 1, 1, 1)
    together = fake_quantize(x, lower, upper, bits, zero_point=zero_point)
    for i, j in itertools.product(range(3), range(4)):
        alone = fake_quantize(x[i, j], lower[i, j, 0, 0], upper[i, j, 0, 0], float(bits[i]), zero_point=zero_point)
        assert_close(together[i, j], alone, rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- degenerate input


@pytest.mark.parametrize('zero_point', ZERO_POINTS)
@pytest.mark.parametrize('shape', [(), (4, 1)], ids=['scalar', 'plain'])
@pytest.mark.parametrize(
    ('lower', 'upper'),
    [
        pytest.param(0.0, 0.0, id='collapsed at zero'),
        pytest.param(1.5, 1.5, id='collapsed'),
        pytest.param(2.0, 1.0, id='reversed'),
        pytest.param(-1e-38, 1e-38, id='tiny'),
        pytest.param(-1e-45, 1e-45, id='subnormal'),
        pytest.param(-3e38, 3e38, id='wider than float32'),
        pytest.param(0.0, 3e38, id='huge'),
        pytest.param(0.5, 3.0, id='all positive'),
        pytest.param(-3.0, -0.5, id='all negative'),
        pytest.param(1e6, 1e6 + 1, id='far from zero'),
    ],
)
def test_result_and_gradients_are_finite(lower, upper, shape, zero_point):
    x = torch.tensor([-math.inf, -1e38, -1.0, -0.0, 0.0, 0.7, 1e-30, 1e38, math.inf]).expand(4, 9)
    args = [x, torch.full(shape, lower), torch.full(shape, upper)]
    for bits in (2, 8):
        q = fake_quantize(*args, bits, zero_point=zero_point)
        assert q.isfinite().all()
        for grad in gradients(lambda *a, bits=bits: fake_quantize(*a, bits, zero_point=zero_point).sum(), args):
            assert grad.isfinite().all()


def test_a_collapsed_range_gives_its_bound():
    q = fake_quantize(torch.tensor([-5.0, 1.5, 5.0]), torch.tensor(1.5), torch.tensor(1.5), 4)
    assert_close(q, torch.full((3,), 1.5), rtol=1e-6)


def test_infinite_values_go_to_the_bounds_and_nan_stays():
    x = torch.tensor([-math.inf, math.inf, math.nan])
    for lower in (torch.tensor(-1.0), torch.full((3,), -1.0)):
        q = fake_quantize(x, lower, torch.tensor(2.0), 4)
        assert_close(q[:2], torch.tensor([-1.0, 2.0]))
        assert q[2].isnan()


@pytest.mark.parametrize('shape', [(), (3, 1, 1, 1)])
@pytest.mark.parametrize('zero_point', ZERO_POINTS)
def test_empty_tensors(shape, zero_point):
    args = [torch.empty(3, 0, 4, 4), torch.full(shape, -1.0), torch.full(shape, 1.0)]
    assert fake_quantize(*args, 4, zero_point=zero_point).shape == (3, 0, 4, 4)
    for grad, arg in zip(gradients(lambda *a: fake_quantize(*a, 4, zero_point=zero_point).sum(), args), args):
        assert grad.shape == arg.shape and (grad == 0).all()


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_any_memory_layout(memory_format):
    x = torch.randn(2, 3, 4, 5).to(memory_format=memory_format)
    for view in (x, x.transpose(1, 3), x[:, :, ::2], x[:1].expand(4, 3, 4, 5)):
        args = [view, torch.tensor(-0.5), torch.tensor(0.8)]
        copy = [view.contiguous(), *args[1:]]
        assert torch.equal(fake_quantize(*args, 3), fake_quantize(*copy, 3))
        found, wanted = (gradients(lambda *a: fake_quantize(*a, 3).square().sum(), a) for a in (args, copy))
        for ours, theirs in zip(found, wanted):
            assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_input_is_left_alone():
    x = torch.randn(100)
    before = x.clone()
    fake_quantize(x, torch.tensor(-0.5), torch.tensor(0.5), 3)
    fake_quantize(x, torch.tensor([-0.5] * 100), torch.tensor(0.5), 3)
    assert torch.equal(x, before)


@pytest.mark.parametrize('zero_point', ['int', 'none', None])
def test_an_unknown_zero_point_is_refused(zero_point):
    with pytest.raises(ValueError, match="must be 'float' or 'integer'"):
        fake_quantize(torch.ones(1), torch.zeros(()), torch.ones(()), 4, zero_point=zero_point)


# ------------------------------------------------------------------------------------------- dtypes, autocast, compile


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('shape', [(), (1, 2, 1)])
@pytest.mark.parametrize('zero_point', ZERO_POINTS)
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype, zero_point, shape, bits):
    draw = torch.Generator().manual_seed(0)
    x, weights = (torch.randn(50, 2, 40, generator=draw).to(dtype) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    bounds = [torch.full(shape, -0.7), torch.full(shape, 1.9)]

    def loss(*args):
        return (fake_quantize(*args, bits, zero_point=zero_point).to(wide) * weights.to(wide)).sum()

    q = fake_quantize(x, *bounds, bits, zero_point=zero_point)
    assert q.dtype == dtype
    wanted = fake_quantize(x.to(wide), *bounds, bits, zero_point=zero_point).to(dtype)
    assert_close(q.to(wide), wanted.to(wide), rtol=1e-6, atol=1e-6)
    found, wanted = gradients(loss, [x, *bounds]), gradients(loss, [x.to(wide), *bounds])
    assert [g.dtype for g in found] == [dtype, torch.float32, torch.float32]
    assert torch.equal(found[0].to(wide), wanted[0])
    # The range's gradient is a sum of differences q - x: taken before q is rounded to half precision, or lost in it.
    for ours, theirs in zip(found[1:], wanted[1:]):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_bounds_and_bits(dtype):
    x = torch.randn(3, 4).to(dtype).requires_grad_()
    bounds = [torch.tensor(b, dtype=dtype, requires_grad=True) for b in (-1.0, 1.0)]
    bits = torch.tensor(4.0, dtype=dtype, requires_grad=True)
    fake_quantize(x, *bounds, bits).sum().backward()
    assert all(t.grad.dtype == dtype and t.grad.isfinite().all() for t in (x, *bounds, bits))


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_under_autocast(dtype):
    conv = torch.nn.Conv2d(3, 4, 3)
    lower, upper = (torch.tensor(b, requires_grad=True) for b in (-1.0, 1.0))
    with torch.autocast('cpu', dtype=dtype):
        y = conv(fake_quantize(torch.randn(1, 3, 8, 8), lower, upper, 4))
        q = fake_quantize(y, lower, upper, 4)
        assert y.dtype == q.dtype == dtype
    q.float().sum().backward()
    assert all(t.grad.isfinite().all() for t in (lower, upper, conv.weight))


@pytest.mark.parametrize('bits', [4, torch.tensor(4.0)], ids=['number', 'tensor'])
@pytest.mark.parametrize('zero_point', ZERO_POINTS)
def test_shapes_alone(zero_point, bits):
    meta = bits.to('meta') if isinstance(bits, torch.Tensor) else bits
    x = torch.empty(2, 3, 4, 4, device='meta', requires_grad=True)
    lower, upper = (torch.empty((), device='meta', requires_grad=True) for _ in range(2))
    q = fake_quantize(x, lower, upper, meta, zero_point=zero_point)
    q.sum().backward()
    assert q.shape == x.shape == x.grad.shape and lower.grad.shape == upper.grad.shape == ()
    with FakeTensorMode(allow_non_fake_inputs=True):
        x, bounds = torch.empty(2, 3, 4, 4), [torch.empty(()) for _ in range(2)]
        assert fake_quantize(x, *bounds, bits, zero_point=zero_point).shape == (2, 3, 4, 4)


@pytest.mark.slow
@pytest.mark.parametrize('backend', ['aot_eager', 'inductor'])
@pytest.mark.parametrize('zero_point', ZERO_POINTS)
@pytest.mark.parametrize('bits', [4, torch.tensor(3.7)], ids=['number', 'tensor'])
def test_compiled_equals_eager(bits, zero_point, backend):
    def loss(x, lower, upper, bits):
        return (fake_quantize(x * 2, lower, upper, bits, zero_point=zero_point) * weights).sum()

    weights = torch.randn(2, 3, 8, 8)
    args = [torch.randn(2, 3, 8, 8), torch.tensor(-0.8), torch.tensor(1.3), bits]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    assert_close(compiled(*args), loss(*args), rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients(compiled, args), gradients(loss, args)):
        if theirs is not None:
            assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
