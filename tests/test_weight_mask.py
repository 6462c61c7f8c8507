"""N:M masks against a second writing: exact counts, nesting, the gradients of each mask, quantizers behind it."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from helpers import gradients
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from basicsr_quant.nn import (
    GROUPS,
    PriorityMask,
    QuantConv2d,
    QuantLinear,
    RefinedMask,
    WeightMask,
    density,
    group_sizes,
    priorities,
)
from basicsr_quant.nn.weight_mask import rank_in_groups
from basicsr_quant.quantizers import SymmetricRange

SHAPES = [(1, 32, 1, 2), (1, 70, 2, 1), (2, 7, 1, 1), (2, 1, 3, 3), (2, 40), (1, 64)]
CASES = [pytest.param(shape, m, id=f'{"x".join(map(str, shape))} M{m}') for shape in SHAPES for m in GROUPS]


def weight_of(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def groups_of(weight: Tensor, m: int):
    """Every group as a 1-D tensor, by loops."""
    spatial = list(itertools.product(*map(range, weight.shape[2:])))
    for out in range(weight.shape[0]):
        for place in spatial:
            row = weight[(out, slice(None), *place)]
            yield from (row[start : start + m] for start in range(0, len(row), m))


@pytest.mark.parametrize(('shape', 'm'), CASES)
def test_every_group_keeps_exactly_its_largest(shape, m):
    weight = weight_of(shape)
    mask = WeightMask(shape, m, m)
    mask.rank(weight)
    before = torch.zeros(shape, dtype=torch.bool)
    for n in range(1, m + 1):
        mask.kept.fill_(n)
        keep = mask.keep()
        for magnitudes, kept in zip(groups_of(weight.abs(), m), groups_of(keep, m)):
            assert int(kept.sum()) == min(n, len(kept))
            assert kept.all() or magnitudes[kept].min() >= magnitudes[~kept].max()
        assert bool((before <= keep).all()), 'masks of growing N are nested'
        assert float(keep.float().mean()) == pytest.approx(density(shape[1], m, n))
        before = keep
    assert keep.all()
    assert mask.ranks.dtype == torch.uint8 and mask.ranks.numel() == weight.numel(), 'one byte a weight'


@pytest.mark.parametrize('weight', [torch.zeros(2, 10, 1, 1), torch.ones(2, 10, 1, 1), -torch.ones(2, 10, 1, 1)])
def test_equal_magnitudes_are_ranked_once_each_the_first_channel_first(weight):
    assert rank_in_groups(weight, 4)[0, :, 0, 0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]


@given(channels=st.integers(1, 100), m=st.sampled_from(GROUPS), n=st.integers(1, 32))
@settings(deadline=None, max_examples=60)
def test_density_counts_short_groups_as_they_are(channels, m, n):
    assert sum(group_sizes(channels, m)) == channels
    assert 0 < density(channels, m, n) <= 1
    assert density(channels, m, n) == pytest.approx(sum(min(n, s) for s in group_sizes(channels, m)) / channels)


# -------------------------------------------------------------------------------------------------------- gradients


def hand_made(weight: Tensor, m: int, scores: Tensor) -> Tensor:
    """SLS's mask unit by unit: sum of b_i U_i."""
    ranks = rank_in_groups(weight, m)
    p = [torch.ones(())] + [scores[:i].prod() for i in range(1, m)]
    return sum((float(p[i] > 0.5) if i else 1.0) * (ranks == i).float() for i in range(m))


@pytest.mark.parametrize('m', GROUPS)
def test_scores_get_the_straight_through_gradient_in_closed_form(m):
    """dL/ds_j = sum over i >= j of (prod of s_k, k <= i, k != j) x (sum of dL/dW_masked x W over the rank i)."""
    shape = (3, 40, 3, 3)
    weight, upstream = weight_of(shape), weight_of(shape, 1)
    mask = PriorityMask(shape, m).train()
    mask.rank(weight)
    with torch.no_grad():
        mask.scores.copy_(torch.rand(m - 1, generator=torch.Generator().manual_seed(2)) * 0.2 + 0.83)
    leaf = weight.clone().requires_grad_()
    out = mask(leaf)
    assert torch.equal(out, weight * hand_made(weight, m, mask.scores.detach()))
    out.backward(upstream)
    ranks, scores = rank_in_groups(weight, m), mask.scores.detach().double()
    units = [float((upstream.double() * weight.double())[ranks == i].sum()) for i in range(m)]
    wanted = [
        sum(float(scores[:i].prod() / scores[j]) * units[i] for i in range(j + 1, m)) for j in range(m - 1)
    ]
    torch.testing.assert_close(mask.scores.grad, torch.tensor(wanted), rtol=1e-3, atol=1e-4)
    assert torch.equal(leaf.grad, upstream * hand_made(weight, m, mask.scores.detach()))


def test_n_is_one_more_than_the_products_above_a_half():
    scores = torch.tensor([1.0, 0.9, 0.7, 1.02, 0.1, 1.03, 1.0])
    assert priorities(scores).tolist() == [1, 1, 1, 1, 0, 0, 0]
    mask = PriorityMask((1, 8, 1, 1), 8)
    with torch.no_grad():
        mask.scores.copy_(scores + torch.tensor([0.5, 0, 0, 0, -0.2, 0, 0]))
    mask.follow_scores(1.03)
    low, high = mask.scores.detach().aminmax()
    assert int(mask.kept) == 5 and float(low) == 0 and float(high) == pytest.approx(1.03)


def test_evaluation_and_frozen_masks_read_no_score():
    weight = weight_of((4, 16, 3, 3))
    mask = PriorityMask(weight.shape, 8)
    mask.rank(weight)
    mask.kept.fill_(3)
    kept = mask.eval()(weight)
    assert int((kept != 0).sum()) == 3 * 2 * 9 * 4
    mask.train().freeze()
    with torch.no_grad():
        mask.scores.zero_()
    leaf = weight.clone().requires_grad_()
    assert torch.equal(mask(leaf), kept)
    mask(leaf).sum().backward()
    assert mask.scores.grad is None and torch.equal(leaf.grad != 0, kept != 0)
    loaded = PriorityMask(weight.shape, 8)
    loaded.load_state_dict(mask.state_dict())
    assert not loaded.learns and torch.equal(loaded(weight), kept)
    assert not copy.deepcopy(mask).learns


def test_sr_ste_draws_masked_weights_to_zero_and_lets_them_learn():
    weight, upstream = weight_of((4, 16, 1, 1)), weight_of((4, 16, 1, 1), 1)
    mask = RefinedMask(weight.shape, 4, 2, decay=0.25)
    mask.rank(weight)
    leaf = weight.clone().requires_grad_()
    mask(leaf).backward(upstream)
    masked = (mask(weight) == 0).float()
    assert masked.mean() == 0.5
    torch.testing.assert_close(leaf.grad, upstream + 0.25 * masked * weight)


# ------------------------------------------------------------------------------------------------ behind the quantizer


@pytest.mark.parametrize('narrow', [True, False], ids=['zero on the grid', 'no zero on the grid'])
@pytest.mark.parametrize('kind', ['conv', 'linear'])
def test_masked_places_are_zero_behind_any_quantizer_and_the_rest_is_on_the_grid(narrow, kind):
    layer = nn.Conv2d(16, 4, 3) if kind == 'conv' else nn.Linear(16, 4)
    twin = (QuantConv2d if kind == 'conv' else QuantLinear).from_float(layer)
    with torch.no_grad():
        layer.weight.copy_(weight_of(layer.weight.shape))
    quantizer = SymmetricRange(3, narrow_range=narrow)
    quantizer.set_range(torch.tensor(-1.5), torch.tensor(1.5))
    mask = WeightMask(tuple(layer.weight.shape), 8, 2)
    mask.rank(layer.weight)
    twin.weight_quantizer, twin.weight_mask = quantizer, mask
    found = twin.quantized_weight()
    assert torch.equal(found != 0, mask.keep() & (quantizer(layer.weight) != 0))
    assert torch.equal(found[mask.keep()], quantizer(layer.weight)[mask.keep()])
    found.sum().backward()
    inside = layer.weight.abs() <= 1.5
    assert torch.equal(layer.weight.grad != 0, mask.keep() & inside)
    # masked places give no gradient to the range: (q - w) / u over the kept ones inside, sign(w) outside
    w, keep = layer.weight.detach(), mask.keep()
    q = quantizer(w).detach()
    wanted = torch.where(inside, (q - w) / 1.5, w.sign())[keep].sum()
    (bound,) = [p for p in quantizer.parameters() if p.requires_grad]
    torch.testing.assert_close(bound.grad.sum() / quantizer.unit, wanted, rtol=1e-4, atol=1e-5)


def test_scores_behind_a_quantizer_get_the_gradient_of_masked_weights_too():
    weight, upstream = weight_of((2, 8, 1, 1)), weight_of((2, 8, 1, 1), 1)
    twin = QuantConv2d.from_float(nn.Conv2d(8, 2, 1))
    twin.weight.data.copy_(weight)
    quantizer = SymmetricRange(4, narrow_range=False)
    quantizer.set_range(torch.tensor(-9.0), torch.tensor(9.0))
    mask = PriorityMask(tuple(weight.shape), 4).train()
    mask.rank(weight)
    with torch.no_grad():
        mask.scores.copy_(torch.tensor([0.9, 0.5, 1.0]))
    mask.follow_scores(1.03)
    twin.weight_quantizer, twin.weight_mask = quantizer, mask
    (twin.quantized_weight() * upstream).sum().backward()

    def plain(scores: Tensor) -> Tensor:
        p = torch.cat([torch.ones(1), torch.cumprod(scores, 0)])
        return (weight * p[rank_in_groups(weight, 4).long()] * upstream).sum()

    wanted = gradients(plain, [mask.scores.detach()])[0]
    torch.testing.assert_close(mask.scores.grad, wanted)


@pytest.mark.slow
def test_the_masked_layer_compiles_whole():
    twin = QuantConv2d.from_float(nn.Conv2d(8, 4, 3))
    twin.weight_mask = PriorityMask(tuple(twin.weight.shape), 4).train()
    twin.weight_mask.rank(twin.weight)
    x = torch.rand(1, 8, 6, 6)
    compiled = torch.compile(twin, fullgraph=True, backend='aot_eager')
    torch.testing.assert_close(compiled(x), twin(x))
