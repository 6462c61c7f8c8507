"""Observers against NumPy, closed forms and exhaustive search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import assert_close, quantize_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from basicsr_quant.errors import QuantError
from basicsr_quant.quantizers import (
    OBSERVERS,
    align_zero_point,
    fake_quantize,
    percentile,
    percentile_of,
    search_mse_range,
)
from basicsr_quant.quantizers.observers import percentile_range

NAMES = list(OBSERVERS)


def normal(count: int = 3000, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


def laplacian(count: int = 3000) -> torch.Tensor:
    uniform = torch.rand(count, generator=torch.Generator().manual_seed(0)) - 0.5
    return -uniform.sign() * torch.log1p(-2 * uniform.abs() + 1e-7)


DATA = {
    'Gaussian': normal(),
    'Laplacian': laplacian(),
    'half-Gaussian': normal().relu(),
    'log-normal': normal().exp(),
    'outliers of 100 sigma': torch.cat([normal(), torch.full((3,), 100.0)]),
    'outliers of 100 sigma below': torch.cat([normal(), torch.full((3,), -100.0)]),
    'uniform': torch.rand(3000, generator=torch.Generator().manual_seed(0)) * 2 - 1,
    'tiny': normal() * 1e-6,
    'all positive': normal().abs() + 5,
    'all negative': -normal().abs() - 5,
}


def error(x, lower, upper, bits, **kwargs):
    q = fake_quantize(x, torch.as_tensor(lower), torch.as_tensor(upper), bits, **kwargs)
    return float((q.double() - x.double()).square().mean())


def observed(name, batches, **kwargs):
    observer = OBSERVERS[name](**kwargs)
    for batch in batches:
        observer.update(batch)
    return observer.range()


# -------------------------------------------------------------------------------------------------------- closed forms

BATCHES = [normal(500, seed).reshape(2, 5, 50) * scale for seed, scale in ((1, 1.0), (2, 3.0), (3, 0.5))]
EXTREMES = [(float(b.min()), float(b.max())) for b in BATCHES]
P97 = [tuple(np.percentile(b.double().numpy(), (3, 97))) for b in BATCHES]


def ema(values, decay):
    total = values[0]
    for value in values[1:]:
        total = decay * total + (1 - decay) * value
    return total


@pytest.mark.parametrize(
    ('name', 'kwargs', 'lower', 'upper'),
    [
        ('minmax', {}, min(lo for lo, _ in EXTREMES), max(hi for _, hi in EXTREMES)),
        ('ema_minmax', {}, ema([lo for lo, _ in EXTREMES], 0.9), ema([hi for _, hi in EXTREMES], 0.9)),
        ('ema_minmax', {'decay': 0.5}, ema([lo for lo, _ in EXTREMES], 0.5), ema([hi for _, hi in EXTREMES], 0.5)),
        ('percentile', {'percent': 97.0}, np.mean([lo for lo, _ in P97]), np.mean([hi for _, hi in P97])),
        ('percentile', {'percent': 100.0}, np.mean([lo for lo, _ in EXTREMES]), np.mean([hi for _, hi in EXTREMES])),
    ],
)
def test_closed_forms_over_batches(name, kwargs, lower, upper):
    found = observed(name, BATCHES, **kwargs)
    assert found[0].shape == found[1].shape == ()
    assert_close(torch.stack(found), torch.tensor([lower, upper]), rtol=1e-5)


@pytest.mark.parametrize('shape', [(6, 4, 3, 3), (6, 40)])
@pytest.mark.parametrize('name', NAMES)
def test_a_channel_is_observed_as_if_it_were_alone(name, shape):
    x = normal(int(np.prod(shape))).reshape(shape) * torch.arange(1.0, 7.0).reshape(6, *(1,) * (len(shape) - 1))
    lower, upper = observed(name, [x, 2 * x], per_channel=True)
    assert lower.shape == upper.shape == (6,) + (1,) * (len(shape) - 1)
    for channel in range(6):
        alone = observed(name, [x[channel], 2 * x[channel]])
        assert_close(torch.stack([lower[channel].squeeze(), upper[channel].squeeze()]), torch.stack(alone), rtol=1e-5)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize('name', NAMES)
def test_dtypes(name, dtype):
    x = normal(1000).to(dtype)
    lower, upper = observed(name, [x])
    wanted = torch.promote_types(dtype, torch.float32)
    assert lower.dtype == upper.dtype == wanted
    assert_close(torch.stack([lower, upper]), torch.stack(observed(name, [x.to(wanted)])))


@pytest.mark.parametrize('name', NAMES)
@pytest.mark.parametrize('value', [0.0, 3.0, -3.0])
def test_a_constant_tensor_has_a_range_that_reconstructs_it(name, value):
    x = torch.full((50,), value)
    lower, upper = observed(name, [x, x])
    assert lower <= upper
    assert_close(fake_quantize(x, lower, upper, 4), x)


@pytest.mark.parametrize('name', NAMES)
def test_observing_leaves_the_tensor_and_the_random_state_alone_and_keeps_no_graph(name):
    x = normal(300000).requires_grad_()
    before, state = x.detach().clone(), torch.get_rng_state()
    lower, upper = observed(name, [x])
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    assert not lower.requires_grad and not upper.requires_grad


@pytest.mark.parametrize('name', NAMES)
def test_a_range_needs_something_seen(name):
    with pytest.raises(AssertionError, match='before update'):
        OBSERVERS[name]().range()


def test_an_unknown_observer_names_the_known_ones():
    with pytest.raises(QuantError, match=r"no observer 'minmx' .did you mean 'minmax'.*percentile"):
        OBSERVERS['minmx']


# ---------------------------------------------------------------------------------------------------------- percentile


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=60),
    percent=st.one_of(st.floats(0, 100), st.sampled_from([0.0, 1.0, 50.0, 99.0, 99.9, 100.0])),
)
def test_percentile_equals_numpy(values, percent):
    rows = torch.tensor([values, values[::-1]], dtype=torch.float64)
    wanted = np.percentile(rows.numpy(), percent, axis=1)
    assert_close(percentile(rows, percent), torch.from_numpy(wanted), rtol=1e-9, atol=1e-9)


ROWS = {
    'Gaussian': normal(200000),
    'half zeros': normal(200000).relu(),
    'zeros but for one in two hundred': (normal(200000) - 2.576).relu(),
    'constant': torch.full((200000,), 3.0),
    'sorted': normal(200000).sort().values,
    'two values': (normal(200000) > 2.2).float(),
    'an outlier every 48 values': torch.zeros(200000).index_fill(0, torch.arange(0, 200000, 48), 9.0),
    'the same, one further': torch.zeros(200000).index_fill(0, torch.arange(1, 200000, 48), 9.0),
}


@pytest.mark.parametrize('percent', [95.0, 97.3, 99.0, 99.9, 99.999, 100.0])
@pytest.mark.parametrize('kind', ROWS)
def test_percentile_range_of_long_rows_equals_the_plain_one(kind, percent):
    rows = torch.stack([ROWS[kind], -2 * ROWS[kind]])
    lower, upper = percentile_range(rows, percent)
    assert_close(lower, percentile(rows, 100 - percent), rtol=1e-6)
    assert_close(upper, percentile(rows, percent), rtol=1e-6)


@pytest.mark.slow
def test_percentile_of_more_values_than_torch_quantile_takes():
    x = torch.rand(1, (1 << 24) + 1000, generator=torch.Generator().manual_seed(0))
    with pytest.raises(RuntimeError):
        torch.quantile(x, 0.99)
    lower, upper = observed('percentile', [x], percent=99.0)
    assert_close(torch.stack([lower, upper]), np.percentile(x.numpy(), (1, 99)).astype(np.float32), rtol=1e-5)


# ---------------------------------------------------------------------------------------------------------- MSE search

MODES = {
    'asymmetric': {},
    'asymmetric, integer zero point': {'zero_point': 'integer'},
    'symmetric': {'symmetric': True},
    'symmetric, narrow': {'symmetric': True, 'narrow_range': True},
}


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('mode', MODES)
def test_mse_search_is_never_worse_than_extremes_or_percentiles(mode, bits):
    rows, kwargs = torch.stack([x[-3000:] for x in DATA.values()]), dict(MODES[mode])
    lowers, uppers = search_mse_range(rows, bits, **kwargs)
    symmetric = kwargs.pop('symmetric', False)
    for data, x, lower, upper in zip(DATA, rows, lowers, uppers):
        found = error(x, lower, upper, bits, **kwargs)
        for percent in (100.0, 99.9, 99.0):
            lower, upper = percentile(x[None], 100 - percent), percentile(x[None], percent)
            if symmetric:
                upper = torch.maximum(-lower, upper)
                lower = -upper
            # Up to the 640th of an extreme, which is the search's resolution; at 8 bits that is part of a step.
            slack = 1.01 if bits == 8 else 1.001
            assert found <= error(x, lower, upper, bits, **kwargs) * slack, (data, percent)


def exhaustive(x, bits, symmetric, narrow, points=100):
    """Least error over a fine grid of bounds, in NumPy; x thinned for speed, evenly over its order statistics."""
    x = np.sort(x.double().numpy())
    highs = np.concatenate([np.linspace(0, x[-1], points), np.quantile(x, np.linspace(0.5, 1, points))])
    highs = highs[highs > 0]
    if symmetric:
        bound = np.abs(x).max()
        fine = np.concatenate([np.linspace(0, bound, 4 * points)[1:], np.linspace(0, 6 * x.std(), 4 * points)[1:]])
        fine = fine[fine <= bound]
        return min(float(((quantize_rows(x, -u, u, bits, narrow) - x) ** 2).mean()) for u in fine)
    lows = -np.quantile(np.maximum(-x, 0), np.linspace(0, 1, points // 2))
    best = np.inf
    for low in np.unique(lows):
        rows = quantize_rows(x[None], np.full(len(highs), low), highs, bits)
        best = min(best, float(((rows - x) ** 2).mean(axis=1).min()))
    return best


@pytest.mark.parametrize('bits', [2, 3, 4])
@pytest.mark.parametrize('mode', ['symmetric', 'symmetric, narrow'])
@pytest.mark.parametrize('data', ['Gaussian', 'Laplacian', 'half-Gaussian', 'outliers of 100 sigma'])
def test_symmetric_mse_search_is_within_two_percent_of_the_best(data, mode, bits):
    x = DATA[data]
    narrow = 'narrow' in mode
    lower, upper = search_mse_range(x[None], bits, symmetric=True, narrow_range=narrow)
    assert_close(lower, -upper, 0, 0)
    assert error(x, lower, upper, bits, narrow_range=narrow) <= 1.02 * exhaustive(x, bits, True, narrow)


@pytest.mark.parametrize('bits', [2, 4])
@pytest.mark.parametrize('data', ['Gaussian', 'Laplacian', 'half-Gaussian', 'outliers of 100 sigma'])
def test_asymmetric_mse_search_is_within_two_percent_of_the_best(data, bits):
    x = DATA[data]
    lower, upper = search_mse_range(x[None], bits)
    assert error(x, lower, upper, bits) <= 1.02 * exhaustive(x, bits, False, False)


@pytest.mark.parametrize(('bits', 'step'), [(2, 0.996), (3, 0.586), (4, 0.335)])
def test_mse_search_finds_the_known_steps_for_a_normal_distribution(bits, step):
    quantiles = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000
    x = (torch.special.ndtri(quantiles)).float()
    _, upper = search_mse_range(x[None], bits, symmetric=True)
    resolution = 2 * float(x.max()) / 640 / (2**bits - 1)
    assert abs(2 * float(upper) / (2**bits - 1) - step) <= resolution + 5e-4


def test_mse_search_measures_the_grid_that_will_be_used():
    """With 2 bits the zero point's rounding moves a range by up to a sixth of it: it belongs into the search."""
    x = normal().relu() * 2 - 0.3 * normal(seed=5).abs()
    found = [search_mse_range(x[None], 2, zero_point=z) for z in ('integer', 'float')]
    used = [error(x, *bounds, 2, zero_point='integer') for bounds in found]
    assert used[0] < used[1]
    low, high = align_zero_point(*found[0], 2)
    assert low <= 0 <= high


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_mse_search_keeps_a_bound_that_is_zero(bits):
    x = DATA['half-Gaussian']
    assert search_mse_range(x[None], bits)[0] == 0
    assert search_mse_range(-x[None], bits)[1] == 0


# -------------------------------------------------------------------------------------------------- many, long batches


@pytest.mark.parametrize('name', NAMES)
def test_memory_does_not_grow_with_batches(name):
    def held(observer):
        found = [v for v in vars(observer).values() if isinstance(v, (torch.Tensor, list))]
        tensors = [t for v in found for t in (v if isinstance(v, list) else [v])]
        return sum(t.untyped_storage().nbytes() for t in tensors if isinstance(t, torch.Tensor))

    observer = OBSERVERS[name]()
    for i in range(64):
        observer.update(normal(30000, i))
        assert held(observer) <= 4 * (1 << 17) + 64


def test_mse_observer_gives_every_batch_the_same_weight():
    """A hundred images, each with values of its own: none may be forgotten because others came later."""
    observer = OBSERVERS['mse'](bits=2)
    for i in range(100):
        observer.update(torch.rand(20000, generator=torch.Generator().manual_seed(i)) * 0.5 + i)
    counts = observer._kept[0, : sum(observer._lengths)].int().bincount()
    assert len(counts) == 100 and counts.min() == counts.max() > 500


def test_mse_observer_takes_batches_of_any_size_and_more_of_them_than_it_keeps():
    observer = OBSERVERS['mse'](bits=4, samples=8)
    for size in (3, 1, 20, 2, 1, 5, *[4] * 20):
        observer.update(torch.linspace(-1, 1, size))
        assert sum(observer._lengths) <= 8 == max(8, observer._kept.shape[1])
    assert len(observer._lengths) == 8
    lower, upper = observer.range()
    assert -1 <= lower <= upper <= 1


def test_mse_observer_sees_all_of_a_weight():
    weight = normal(64 * 64 * 9).reshape(64, 64, 3, 3)
    observer = OBSERVERS['mse'](bits=4, symmetric=True)
    observer.update(weight)
    assert_close(torch.stack(observer.range()), torch.stack(search_mse_range(weight.reshape(1, -1), 4, True))[:, 0])


def test_mse_observer_gives_the_same_range_each_time():
    batches = [normal(100000, i) for i in range(5)]
    first, second = (observed('mse', batches, bits=3) for _ in range(2))
    assert torch.equal(torch.stack(first), torch.stack(second))


@pytest.mark.parametrize(('bits', 'percent'), [(2, 99.0), (3, 99.0), (4, 99.0), (6, 99.9), (8, 99.99)])
def test_fewer_values_are_cut_off_at_more_bits(bits, percent):
    assert percentile_of(bits) == pytest.approx(percent)
