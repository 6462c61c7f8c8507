"""2DQuant's search for bounds, against every candidate in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import images, plan_of, quantize_rows, quantized, tiny
from torch.nn import functional

from basicsr_quant.methods import method_of
from basicsr_quant.network.surgery import floating_point, quantizers
from basicsr_quant.quantizers import OBSERVERS, fake_quantize, search_bounds


def normal(count: int = 400, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(seed))


OUTLIER = torch.tensor([12.0])
# values -> which of the bounds the search moves at 4 bits
DATA = {
    'bell': (normal(), 'both'),
    'bell with an outlier': (torch.cat([normal(), OUTLIER]), 'both'),
    'shifted bell': (normal() + 1.0, 'both'),
    'ReLU': (torch.cat([normal().relu(), OUTLIER]), 'upper'),
    'softmax': ((normal() * 2).softmax(0), 'upper'),
    'GELU': (torch.cat([functional.gelu(normal()), OUTLIER]), 'upper'),
    'above zero': (normal().abs() + 5, 'upper'),
    'below zero': (-torch.cat([normal().relu(), OUTLIER]), 'lower'),
}


def candidates(x: np.ndarray, moves: str, points: int) -> np.ndarray:
    """The paper's ranges (K, 2), written as it writes them."""
    low, high = x.min(), x.max()
    found = []
    for i in range(points):
        both, one = i * (high - low) / (2 * points), i * (high - low) / points
        found.append({
            'both': (low + both, high - both), 'upper': (low, high - one), 'lower': (low + one, high),
            'symmetric': (-np.abs(x).max() * (1 - i / points), np.abs(x).max() * (1 - i / points)),
        }[moves])  # fmt: skip
    return np.array(found)


@pytest.mark.parametrize('bits', [2, 4, 8])
@pytest.mark.parametrize('symmetric', [False, True], ids=['', 'symmetric'])
@pytest.mark.parametrize('kind', DATA)
def test_no_candidate_is_better(kind: str, symmetric: bool, bits: int) -> None:
    x, moves = DATA[kind]
    values = x.double().numpy()
    ranges = candidates(values, 'symmetric' if symmetric else moves, 50)
    errors = [((quantize_rows(values, *r, bits) - values) ** 2).mean() for r in ranges]
    lower, upper = search_bounds(x.double()[None], bits, symmetric=symmetric, points=50)
    best = ranges[int(np.argmin(errors))]
    np.testing.assert_allclose([float(lower), float(upper)], best, rtol=1e-6, atol=1e-9)


def test_rows_are_searched_alone_and_extremes_may_be_wider_than_the_rows() -> None:
    rows = torch.stack([x[:400] for x, _ in DATA.values()])
    together = search_bounds(rows, 4)
    alone = [search_bounds(row[None], 4) for row in rows]
    assert all(torch.equal(a, torch.cat(b)) for a, b in zip(together, zip(*alone)))
    x = normal()[None]
    wide = (x.amin(dim=1) * 2, x.amax(dim=1) * 2)
    lower, upper = search_bounds(x, 4, wide, points=100)
    i = (lower - wide[0]) / (wide[1] - wide[0]) * 200
    torch.testing.assert_close(i, i.round(), rtol=0, atol=1e-2)
    torch.testing.assert_close(wide[1] - upper, lower - wide[0])


def test_the_extremes_are_those_of_all_batches() -> None:
    observer = OBSERVERS['dobi'](bits=8, samples=64)
    for batch in (normal(5000), torch.tensor([-9.0, 9.0]), normal(5000, seed=1)):
        observer.update(batch)
    lower, upper = observer.range()
    assert lower == -upper, 'both move alike from -9 and 9'
    assert float((9 - upper) / 0.09) == pytest.approx(round(float((9 - upper) / 0.09)), abs=1e-3)


def test_it_measures_the_grid_that_will_be_used() -> None:
    x = (normal().relu() * 2 - 0.3 * normal(seed=5).abs())[None]
    found = [search_bounds(x, 2, zero_point=z) for z in ('integer', 'float')]
    used = [float((fake_quantize(x, *b, 2, zero_point='integer') - x).square().mean()) for b in found]
    assert used[0] < used[1]


@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
@pytest.mark.parametrize('method', ['mse', 'lsq', 'pams', 'odm', 'cadyq'])
def test_methods_start_from_it(method: str, granularity: str) -> None:
    settings = {'w_granularity': granularity}
    if method == 'cadyq':
        settings['options'] = {'bits': [4]}
    errors = {}
    x = images(4)
    wanted = tiny()(x)
    for init in ('dobi', 'minmax') if method != 'mse' else ('dobi', 'mse'):
        options = {**settings.get('options', {}), 'init': init}
        net = quantized(method, bits=4, **{**settings, 'options': options})
        method_of(plan_of(tiny(), method, 4, **{**settings, 'options': options})).calibrate(net, [x])
        errors[init] = float((net(x) - wanted).detach().square().mean())
        assert all(q.calibrated for q in quantizers(net).values())
        with floating_point(net):
            assert torch.equal(net(x), wanted)
    first, second = errors.values()
    assert first < (second if granularity == 'tensor' and method != 'mse' else 1.5 * second)
