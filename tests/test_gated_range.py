"""DDTB's quantizers: the gate written a second time, bounds of each image, gradients against frozen roundings."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from helpers import assert_close, finite_differences, freeze, gradients
from torch import Tensor, nn

from basicsr_quant.quantizers import (
    BoundGate,
    GatedRange,
    LearnedRange,
    PercentileBounds,
    QuantContext,
    fake_quantize,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Fixed(nn.Module):
    """A gate that says what it is told."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.means = logits, None

    def forward(self, means: Tensor) -> Tensor:
        self.means = means
        return self.logits


def quantizer(images: int, channels: int = 4, *, open_: float = 1.0, logits: Tensor | None = None, **kwargs):
    """A calibrated, selected quantizer inside a pass over so many images."""
    q = GatedRange(kwargs.pop('bits', 3), channels, 'layer', zero_point='integer', **kwargs)
    q.set_range(torch.tensor(-1.0), torch.tensor(2.0))
    q.select(True)
    q.context = QuantContext()
    q.context.measures = {'warm_up': lambda image: torch.tensor(open_)}
    q.context.begin(torch.zeros(images, 3, 8, 8))
    if logits is not None:
        q.gate = Fixed(logits)
    return q


# --------------------------------------------------------------------------------------------------------------- bounds

LOGITS = torch.tensor([[0.0, 0.0], [1.0, -1.0], [-2.0, 0.5]])


@pytest.mark.parametrize('parts', [1, 4])
@pytest.mark.parametrize('bits', [2, 3, 8])
def test_each_image_has_the_learned_bounds_times_its_factors(bits, parts):
    x = normal(3 * parts, 4, 5, 5) * 1.5
    q = quantizer(3, bits=bits, logits=LOGITS)
    found = q(x)
    for image, (up, low) in enumerate(2 * torch.sigmoid(LOGITS)):
        rows = slice(image * parts, (image + 1) * parts)
        wanted = fake_quantize(x[rows], -1.0 * low, 2.0 * up, bits, zero_point='integer')
        assert_close(found[rows], wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(q.context.gates['layer'], LOGITS)
    assert_close(q.gate.means, x.reshape(3, parts, 4, -1).mean((1, 3)), atol=1e-6)


@pytest.mark.parametrize('bits', [2, 3, 4])
def test_the_grid_is_the_published_one(bits):
    """q = (round(s x' - z) + z) / s with x' = clip(x, l, u), s = (2^b - 1) / (u - l), z = round(s l) + 2^(b - 1)."""
    x = normal(3, 4, 5, 5).double() * 1.5
    found = quantizer(3, bits=bits, logits=LOGITS)(x)
    for image, (up, low) in enumerate(2 / (1 + np.exp(-LOGITS.double().numpy()))):
        lower, upper = -1.0 * low, 2.0 * up
        s = (2**bits - 1) / (upper - lower)
        z = np.rint(s * lower) + 2 ** (bits - 1)
        wanted = (np.rint(s * np.clip(x[image].numpy(), lower, upper) - z) + z) / s
        assert_close(found[image].detach(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(('shape', 'images'), [((6, 4), 3), ((6, 7, 4), 3), ((2, 5, 6, 4), 2)])
def test_in_linear_layers_channels_are_the_last_dimension(shape, images):
    x = normal(*shape)
    q = quantizer(images, logits=LOGITS[:images], last=True)
    assert q(x).shape == x.shape
    assert_close(q.gate.means, x.reshape(images, -1, 4).mean(1), atol=1e-6)


@pytest.mark.parametrize('case', ['not in force', 'not selected'])
def test_without_a_gate_in_force_it_is_a_learned_range_to_the_bit(case):
    x = normal(3, 4, 6, 6)
    q = quantizer(3, open_=0.0)
    if case == 'not selected':
        q.select(False)
        q.context = None  # nothing of the image is read
    plain = LearnedRange(3, zero_point='integer')
    plain.set_range(torch.tensor(-1.0), torch.tensor(2.0))
    results = []
    for one in (q, plain):
        given = x.clone().requires_grad_()
        y = one(given)
        y.square().sum().backward()
        results.append((y, given.grad, one.lower.grad, one.upper.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])
    assert_close(results[0][2], results[1][2], rtol=1e-5)
    assert_close(results[0][3], results[1][3], rtol=1e-5)


def test_a_network_around_it_is_needed():
    q = quantizer(3)
    q.context.input = None
    with pytest.raises(RuntimeError, match='inside its network only'):
        q(normal(3, 4, 5, 5))


# ------------------------------------------------------------------------------------------------------------ gradients


@pytest.mark.parametrize('bits', [2, 4])
def test_gradients_are_those_of_the_frozen_rounding_function(bits):
    x, logits = normal(3, 4, 3, 3).double() * 1.5, LOGITS.double()
    loss = normal(3, 4, 3, 3, seed=1).double()
    lower, upper = torch.tensor(-0.9).double(), torch.tensor(1.7).double()

    def bounds(lower: Tensor, upper: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
        s = 2 * torch.sigmoid(logits)
        return (lower * s[:, 1]).reshape(3, 1, 1, 1), (upper * s[:, 0]).reshape(3, 1, 1, 1)

    frozen = freeze(x, *bounds(lower, upper, logits), bits, zero_point='integer')

    def smooth(x: Tensor, lower: Tensor, upper: Tensor, logits: Tensor) -> Tensor:
        return (frozen(x, *bounds(lower, upper, logits), bits) * loss).sum()

    def ours(x: Tensor, lower: Tensor, upper: Tensor, logits: Tensor) -> Tensor:
        q = quantizer(3, bits=bits, logits=logits).double()
        q.unit.fill_(1.0)
        del q.lower, q.upper
        q.lower, q.upper = lower, upper  # tensors with a history, to differentiate by
        return (q(x) * loss).sum()

    args = [x, lower, upper, logits]
    assert_close(ours(*args), smooth(*args), rtol=1e-9)
    for found, wanted in zip(gradients(ours, args), finite_differences(smooth, args)):
        assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert wanted.abs().max() > 0


# ------------------------------------------------------------------------------------------------------------- the gate


def rounded(x: np.ndarray, bits: int = 2) -> np.ndarray:
    """Rows of x on 2^b levels between their extremes and zero, zero among them."""
    low, high = np.minimum(x.min(1, keepdims=True), 0), np.maximum(x.max(1, keepdims=True), 0)
    step = np.maximum(high - low, 1e-30) / (2**bits - 1)
    zero = np.rint(-low / step)
    return np.clip(np.rint(x / step), -zero, 2**bits - 1 - zero) * step


def by_hand(gate: BoundGate, means: np.ndarray, batched: bool) -> np.ndarray:
    """The gate in NumPy."""
    p = {k: v.detach().double().numpy() for k, v in gate.state_dict().items()}

    def ternary(w: np.ndarray) -> np.ndarray:
        bound = np.abs(w).max()
        return np.rint(w / bound) * bound

    hidden = rounded(means) @ ternary(p['first']).T
    mean, variance = (hidden.mean(0), hidden.var(0)) if batched else (p['mean'], p['variance'])
    hidden = (hidden - mean) / np.sqrt(variance + 1e-5) * p['weight'] + p['bias']
    return rounded(np.maximum(hidden, 0)) @ ternary(p['second']).T


@pytest.mark.parametrize('training', [True, False])
def test_a_gate_is_two_ternary_layers_with_a_batch_norm_between(training):
    gate = BoundGate(6, seed=3).double().train(training)
    gate.mean.copy_(normal(32, seed=4))
    gate.variance.copy_(normal(32, seed=5).abs() + 0.5)
    gate.bias.data.copy_(normal(32, seed=6) * 0.3)
    means = normal(5, 6, seed=7).double()
    wanted = by_hand(gate, means.numpy(), batched=training)
    before = gate.mean.clone(), gate.variance.clone()
    assert_close(gate(means), wanted, rtol=1e-6, atol=1e-9)
    hidden = torch.from_numpy(rounded(means.numpy())) @ (gate.first / gate.first.abs().max()).round().T
    hidden = hidden.detach() * gate.first.detach().abs().max()
    for now, old, new in zip((gate.mean, gate.variance), before, (hidden.mean(0), hidden.var(0))):
        assert_close(now, 0.9 * old + 0.1 * new if training else old, rtol=1e-6)


@pytest.mark.parametrize('name', ['first', 'weight', 'bias', 'second'])
def test_every_part_of_a_gate_learns_by_the_frozen_rounding_function(name):
    gate = BoundGate(5, seed=1).double()
    gate.bias.data.copy_(normal(32, seed=2) * 0.3)
    means, loss = normal(4, 5, seed=3).double(), normal(4, 2, seed=4).double()
    p = {k: v.detach().clone() for k, v in gate.named_parameters()}

    def normed(h: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return ((h - h.mean(0)) / (h.var(0, unbiased=False) + 1e-5).sqrt() * weight + bias).relu()

    def ternary(w: Tensor) -> Tensor:
        return (w / w.abs().max()).round() * w.abs().max()

    pooled = torch.from_numpy(rounded(means.numpy()))
    added = {k: ternary(p[k]) - p[k] for k in ('first', 'second')}  # what rounding adds here
    hidden = normed(pooled @ ternary(p['first']).T, p['weight'], p['bias'])
    added['hidden'] = torch.from_numpy(rounded(hidden.numpy())) - hidden

    def smooth(value: Tensor) -> Tensor:
        q = {**p, name: value}
        h = normed(pooled @ (q['first'] + added['first']).T, q['weight'], q['bias']) + added['hidden']
        return (h @ (q['second'] + added['second']).T * loss).sum()

    (gate(means) * loss).sum().backward()
    found = getattr(gate, name).grad
    assert_close(found, finite_differences(smooth, [p[name]])[0], rtol=1e-4, atol=1e-6)
    assert found.abs().max() > 0


def test_an_image_is_gated_alike_whatever_stands_beside_it():
    gate, means = BoundGate(6).eval(), normal(4, 6)
    gate.mean.copy_(normal(32, seed=1))
    assert_close(gate(means)[2:3], gate(means[2:3]), rtol=1e-5, atol=1e-6)


def test_one_image_trains_with_the_running_statistics_and_dead_layers_are_finite():
    gate = BoundGate(6)
    alone = gate(normal(1, 6))
    assert_close(alone, copy.deepcopy(gate).eval()(normal(1, 6)))
    alone.sum().backward()
    assert all(p.grad.isfinite().all() for p in gate.parameters())
    assert gate(torch.zeros(3, 6)).isfinite().all()


def test_gates_draw_from_a_random_state_of_their_own():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, same, other = GatedRange(4, 6, 'a'), GatedRange(4, 6, 'a'), GatedRange(4, 6, 'b')
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.gate.first, same.gate.first) and not torch.equal(one.gate.first, other.gate.first)
    assert one.gate.first.abs().max() <= 6**-0.5 and one.gate.second.abs().max() <= 32**-0.5


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_follows_the_input(dtype):
    x = normal(3, 4, 5, 5).to(dtype).requires_grad_()
    q = quantizer(3)
    y = q(x)
    y.float().sum().backward()
    assert y.dtype == x.grad.dtype == dtype


def test_the_selection_is_saved_and_copied():
    source = quantizer(3)
    target = GatedRange(3, 4, 'other', zero_point='integer')
    assert not target.use_gate
    target.load_state_dict(source.state_dict())
    assert target.use_gate and copy.deepcopy(source).use_gate
    target.gated.fill_(False)
    target.apply_selection()
    assert not target.use_gate


# -------------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize('per_channel', [False, True])
@pytest.mark.parametrize('bits', [2, 4])
def test_weights_lie_between_percentiles_of_the_current_weight(bits, per_channel):
    q, weight = PercentileBounds(bits, per_channel, 99.0), normal(4, 6, 3, 3)
    for w in (weight, 3 * weight + 0.2):
        w = w.clone().requires_grad_()
        found = q(w)
        found.sum().backward()
        rows = w.detach().reshape(4 if per_channel else 1, -1).double().numpy()
        low, high = (np.percentile(rows, p, axis=1)[:, None] for p in (1, 99))
        step = (high - low) / (2**bits - 1)
        zero = np.rint(-low / step)
        codes = np.clip(np.rint(rows / step), -zero, 2**bits - 1 - zero)
        assert_close(found.detach().reshape(rows.shape), codes * step, rtol=1e-4, atol=1e-5)
        aligned = (rows >= (-zero * step) - 1e-9) & (rows <= (2**bits - 1 - zero) * step + 1e-9)
        assert_close(w.grad.reshape(rows.shape), aligned.astype(float))
    assert not list(q.parameters()) and bool(q.calibrated)
