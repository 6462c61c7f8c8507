"""Two gradients and one step: the formula in NumPy, then training against a step written out by hand."""

from __future__ import annotations

import copy
import itertools
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import BODY, Tiny, assert_close, finite_differences, gradients, images, plan_of, tiny
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from basicsr_quant.methods import method_of, quantize
from basicsr_quant.methods.cooperative import CooperativeTraining, cooperation, deviation, mismatch
from basicsr_quant.network.surgery import quant_layers, quantizers
from basicsr_quant.quantizers import LearnedRange

GRANULARITIES, GATES = ['element', 'tensor', 'global'], ['cosine', 'sign', 'none']


def sims_by_hand(first, second, granularity, gate):
    """The formula of the paper in NumPy, float64."""

    first, second = ([np.asarray(g, dtype=np.float64) for g in gs] for gs in (first, second))

    def cosine(a, b):
        return np.sum(a * b) / max(np.sqrt(np.sum(a * a) * np.sum(b * b)), 1e-300)

    if gate == 'none':
        return [np.ones_like(a) for a in first]
    if gate == 'sign' or granularity == 'element':
        return [(np.sign(a) * np.sign(b) + 1) / 2 for a, b in zip(first, second)]
    if granularity == 'tensor':
        return [np.full_like(a, (cosine(a, b) + 1) / 2) for a, b in zip(first, second)]
    flat = [np.concatenate([g.ravel() for g in gs]) for gs in (first, second)]
    return [np.full_like(a, (cosine(*flat) + 1) / 2) for a in first]


# ---------------------------------------------------------------------------------------------------------- cooperation


def draws(seed: int = 0):
    draw = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=draw) for shape in ((4, 3, 3), (4,), (2, 5))] for _ in range(2)]


@pytest.mark.parametrize('gate', GATES)
@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('scales', [(1.0, 1.0), (1e-12, 1e-12), (1e-14, 1e3), (1e4, 1e12)])
def test_cooperation_is_the_formula_at_any_size_of_the_gradients(granularity, gate, scales):
    first, second = ([g * s for g in gs] for gs, s in zip(draws(), scales))
    sims, mean = cooperation(first, second, granularity, gate)
    wanted = sims_by_hand(*([g.double().numpy() for g in gs] for gs in (first, second)), granularity, gate)
    assert len(sims) == 3 and -1 <= mean <= 1
    for sim, hand, grad in zip(sims, wanted, first):
        assert sim.shape in ((), grad.shape)
        assert_close(sim.expand_as(grad), torch.from_numpy(hand).float(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize(('sign', 'sim', 'mean'), [(1.0, 1.0, 1.0), (-1.0, 0.0, -1.0)])
def test_aligned_gradients_count_fully_and_opposed_ones_not_at_all(granularity, sign, sim, mean):
    first, _ = draws()
    sims, cosine = cooperation(first, [sign * 3 * g for g in first], granularity)
    for s in sims:
        assert_close(s, torch.full_like(s, sim), atol=1e-6)
        assert s.min() >= 0 and s.max() <= 1
    assert_close(cosine, mean, rtol=1e-5)


def test_the_element_cosine_is_the_sign_gate_whatever_the_granularity():
    first, second = draws()
    wanted, mean = cooperation(first, second, 'element')
    for granularity in GRANULARITIES:
        sims, other = cooperation(first, second, granularity, 'sign')
        assert all(map(torch.equal, sims, wanted)) and other == mean
    agree = torch.cat([((a > 0) == (b > 0)).float().flatten() for a, b in zip(first, second)])
    assert torch.equal(torch.cat([s.flatten() for s in wanted]), agree)


@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('gate', GATES)
def test_zero_gradients_and_no_gradients(granularity, gate):
    first, second = draws()
    for a, b in ((first, [g * 0 for g in second]), ([g * 0 for g in first], second), ([g * 0 for g in first],) * 2):
        sims, mean = cooperation(a, b, granularity, gate)
        assert all(s.isfinite().all() for s in sims) and mean == 0
    assert cooperation([], [], granularity, gate)[0] == []


def test_mean_cosine_is_weighted_by_elements():
    first = [torch.ones(9), torch.ones(1)]
    assert_close(cooperation(first, [torch.ones(9), -torch.ones(1)], 'tensor')[1], 0.8, rtol=1e-6)


@pytest.mark.parametrize('granularity', GRANULARITIES)
def test_half_precision_gradients(granularity):
    first, second = ([g.bfloat16() for g in gs] for gs in draws())
    sims, _ = cooperation(first, second, granularity)
    wanted, _ = cooperation([g.float() for g in first], [g.float() for g in second], granularity)
    for sim, other in zip(sims, wanted):
        assert_close(sim.float(), other, rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------------------------------------------------------- terms


def test_mismatch_is_a_norm_of_everything_and_pulls_values_onto_the_grid():
    x, q = torch.randn(3, 4, 5, dtype=torch.float64), torch.randn(3, 4, 5, dtype=torch.float64)
    assert_close(mismatch(x, q), np.sqrt(((x - q).numpy() ** 2).sum()), rtol=1e-9)
    gx, gq = gradients(mismatch, [x, q.requires_grad_()])
    assert_close(gx, (x - q.detach()) / mismatch(x, q).detach(), rtol=1e-9)
    assert gq is None


def test_mismatch_without_a_detached_target_is_its_derivative_by_both():
    args = [torch.randn(2, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)]
    for ours, theirs in zip(*(f(lambda x, q: mismatch(x, q, False), args) for f in (gradients, finite_differences))):
        assert_close(ours, theirs, rtol=1e-6)


def test_deviation_is_the_standard_deviation_and_its_derivative():
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    assert_close(deviation(x), x.numpy().std(), rtol=1e-9)
    assert_close(gradients(deviation, [x])[0], finite_differences(deviation, [x])[0], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize('term', [lambda x: mismatch(x, x), deviation], ids=['mismatch', 'deviation'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_terms_are_finite_where_they_vanish(term, dtype):
    x = torch.full((3, 4), 2.0, dtype=dtype, requires_grad=True)
    loss = term(x)
    loss.backward()
    assert loss.isfinite() and loss < 1e-5 and x.grad.isfinite().all()


@pytest.mark.parametrize('term', [lambda x: mismatch(x, x * 0), deviation], ids=['mismatch', 'deviation'])
def test_terms_do_not_overflow_half_precision(term):
    x = torch.randn(100, 100).mul(300).half().requires_grad_()
    loss = term(x)
    loss.backward()
    assert loss.isfinite() and x.grad.isfinite().all() and x.grad.dtype == torch.float16


# ------------------------------------------------------------------------------------------------- training, by hand

WEIGHT = 0.02


def calibrated(method: str = 'odm', bits: int = 3, **options) -> Tiny:
    net = tiny()
    plan = plan_of(net, method, bits, BODY[1::2], options=options)
    quantize(net, plan)
    method_of(plan).calibrate(net, [images(4, seed=3)])
    return net


def terms_of(net: nn.Module, regularizer: str, detach: bool):
    """Collect the regularizer's terms of the next pass, with hooks of the test's own."""
    terms, handles = [], []

    def look(_, inputs, output):
        x, q = inputs[0], output.detach() if detach else output
        difference = (x - q).float() if regularizer == 'mismatch' else (x - x.mean()).float()
        size = 1 if regularizer == 'mismatch' else x.numel()
        terms.append((difference.pow(2).sum() / size + 1e-12).sqrt())

    for layer in quant_layers(net).values():
        handles.append(layer.input_quantizer.register_forward_hook(look))
    return terms, handles


def step_by_hand(net, optimizer, passes, context, regularizer, granularity, gate, weight, detach=True):
    """theta's gradient is g_R + lambda sim(g_R, g_M) g_M; that of the ranges is g_R alone."""
    ranges = {id(p) for q in quantizers(net).values() for p in q.parameters()}
    theta = [p for p in net.parameters() if id(p) not in ranges]
    both = [p for p in net.parameters() if p.requires_grad]
    totals = [torch.zeros_like(p) for p in both], [torch.zeros_like(p) for p in theta]
    for x, y in passes:
        terms, handles = terms_of(net, regularizer, detach)
        with context():
            loss = (net(x) - y).abs().mean()
            found = torch.autograd.grad(loss, both, retain_graph=True, allow_unused=True)
            other = torch.autograd.grad(sum(terms), theta, allow_unused=True)
        for handle in handles:
            handle.remove()
        for total, grads, factor in zip(totals, (found, other), (1, 1 / len(passes))):
            for t, g in zip(total, grads):
                t.add_(0 if g is None else g * factor)
    first = {id(p): g for p, g in zip(both, totals[0])}
    pair = [[first[id(p)].numpy() for p in theta], [g.numpy() for g in totals[1]]]
    for p, g in zip(both, totals[0]):
        p.grad = g.clone()
    for p, sim, g in zip(theta, sims_by_hand(*pair, granularity, gate), totals[1]):
        p.grad += weight * torch.from_numpy(sim) * g
    optimizer.step()
    for q in quantizers(net).values():
        if isinstance(q, LearnedRange):
            q.clamp_range()


def term_of(regularizer: str, detach: bool = True):
    return (lambda x, q: mismatch(x, q, detach)) if regularizer == 'mismatch' else (lambda x, q: deviation(x))


def compare(passes=1, steps=3, context=torch.enable_grad, set_to_none=True, scaler=None, regularizer='mismatch',
            granularity='tensor', gate='cosine', detach=True, weight=WEIGHT, **options):  # fmt: skip
    """Train by the class and by hand and return the largest difference between the parameters, and the training."""
    net = calibrated(**options)
    hand = copy.deepcopy(net)
    optimizer, other = (torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9) for n in (net, hand))
    training = CooperativeTraining(net, optimizer, term_of(regularizer, detach), weight, granularity, gate)
    for step in range(steps):
        batches = [(images(seed=10 * step + i), images(seed=50 * step + i + 7)) for i in range(passes)]
        optimizer.zero_grad(set_to_none=set_to_none)
        for x, y in batches:
            with context():
                loss = (net(x) - y).abs().mean()
            (loss if scaler is None else scaler.scale(loss)).backward()
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        step_by_hand(hand, other, batches, context, regularizer, granularity, gate, weight, detach)
    assert net.state_dict().keys() == hand.state_dict().keys()
    return max(float((a - b).detach().abs().max()) for a, b in zip(net.parameters(), hand.parameters())), training


@pytest.mark.parametrize('gate', GATES)
@pytest.mark.parametrize('granularity', GRANULARITIES)
@pytest.mark.parametrize('regularizer', ['mismatch', 'variance'])
def test_a_step_is_the_one_by_hand(regularizer, granularity, gate):
    error, training = compare(regularizer=regularizer, granularity=granularity, gate=gate)
    assert error <= 2e-6
    figures = training.log()
    assert figures['ratio'] > 1e-3, 'the regularizer must be large enough to be seen'
    assert set(figures) == {'l_regularizer', 'cosine', 'ratio', 'bits'} and figures['bits'] == 3


def test_the_comparison_sees_a_wrong_gate():
    """The tests above would not be worth much if every gate gave the same parameters."""
    nets = []
    for granularity, gate in itertools.product(GRANULARITIES, ['cosine', 'none']):
        net = calibrated()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        CooperativeTraining(net, optimizer, term_of('mismatch'), WEIGHT, granularity, gate)
        net(images()).abs().mean().backward()
        optimizer.step()
        nets.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    for a, b in itertools.combinations([*nets[0:1], *nets[1:2], nets[2], nets[4]], 2):
        assert (a - b).abs().max() > 1e-5


@pytest.mark.parametrize(
    'kwargs',
    [
        pytest.param({'passes': 3}, id='gradient accumulation: g_M is the mean over the passes'),
        pytest.param({'set_to_none': False}, id='gradients set to zero'),
        pytest.param({'passes': 2, 'set_to_none': False}, id='accumulation onto zeros'),
        pytest.param({'detach': False}, id='target not detached'),
        pytest.param({'weight': 0.0}, id='no weight'),
        pytest.param({'weight_clipping': False}, id='learned weight ranges'),
        pytest.param({'offsets': True, 'offsets_ratio': 0.0}, id='offsets that no layer uses'),
        pytest.param({'method': 'lsq'}, id='other quantizers'),
    ],
)
def test_a_step_is_the_one_by_hand_in_every_setting(kwargs):
    error, _ = compare(**kwargs)
    assert error <= 2e-6


def test_under_autocast():
    error, _ = compare(context=lambda: torch.autocast('cpu', dtype=torch.bfloat16))
    assert error <= 1e-4  # sums of bfloat16 products in another order


@pytest.mark.parametrize('scale', [2.0**10, 1.0])
def test_with_a_gradient_scaler(scale):
    error, _ = compare(scaler=torch.amp.GradScaler('cpu', init_scale=scale))
    assert error <= 2e-6


def test_a_step_that_the_scaler_skips_does_not_poison_the_next():
    net = calibrated()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    CooperativeTraining(net, optimizer, term_of('mismatch'), WEIGHT, 'tensor', 'cosine')
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    before = [p.detach().clone() for p in net.parameters()]
    for x in (images() * float('nan'), images()):
        optimizer.zero_grad()
        scaler.scale(net(x).abs().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        if x.isnan().any():
            assert all(map(torch.equal, before, net.parameters()))
    assert all(p.isfinite().all() for p in net.parameters())
    assert not all(map(torch.equal, before, net.parameters()))


# ------------------------------------------------------------------------------------------------- training, its edges


def started(net: Tiny, **kwargs):
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1)
    return optimizer, CooperativeTraining(net, optimizer, term_of('mismatch'), WEIGHT, 'tensor', 'cosine', **kwargs)


def one_step(net, optimizer, x=None):
    optimizer.zero_grad()
    net(images() if x is None else x).abs().mean().backward()
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize('between', ['eval', 'no_grad', 'a pass that breaks off', 'layers called on their own'])
@pytest.mark.parametrize('when', [0, 1], ids=['at first', 'after a step'])
def test_other_passes_have_no_effect(between, when):
    nets = [calibrated(), calibrated()]
    runs = [started(net) for net in nets]
    for step in range(2):
        if step == when:
            net = nets[1]
            if between == 'eval':
                net.eval()
                net(images(seed=8)).sum()
                net.train()
            elif between == 'no_grad':
                with torch.no_grad():
                    net(images(seed=8))
            elif between == 'layers called on their own':
                net.body(torch.randn(1, 4, 6, 6, requires_grad=True))
            else:
                handle = net.last.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(OSError('out of memory')))
                with pytest.raises(OSError, match='out of memory'):
                    net(images(seed=8))
                handle.remove()
        one, two = (one_step(net, optimizer) for net, (optimizer, _) in zip(nets, runs))
        assert torch.equal(one, two)


def test_a_step_without_a_pass_is_a_plain_step():
    net = calibrated()
    optimizer, _ = started(net)
    one_step(net, optimizer)
    before = [p.detach().clone() for p in net.parameters()]
    grads = [torch.ones_like(p) for p in net.parameters()]
    for p, g in zip(net.parameters(), grads):
        p.grad = g.clone()
    optimizer.step()
    for p, b, q in zip(net.parameters(), before, grads):
        if p is not None and p.dim() > 0:
            assert_close(p, b - 0.1 * q, rtol=1e-5)


@pytest.mark.parametrize('frozen', ['first', 'body.0', 'body.1.conv2', 'last'])
@pytest.mark.parametrize('when', ['before', 'meanwhile'])
def test_frozen_parameters_stay(frozen, when):
    net = calibrated()
    part = net.get_submodule(frozen)
    if when == 'before':
        part.requires_grad_(False)
    optimizer, _ = started(net)
    if when == 'meanwhile':
        one_step(net, optimizer)
        part.requires_grad_(False)
    before = [p.detach().clone() for p in part.parameters()]
    assert one_step(net, optimizer).isfinite().all()
    assert all(map(torch.equal, before, part.parameters()))


def test_all_frozen_but_the_ranges():
    net = calibrated()
    for name, p in net.named_parameters():
        p.requires_grad_('quantizer' in name)
    optimizer, _ = started(net)
    before = net.body[0].conv1.input_quantizer.upper.clone()
    one_step(net, optimizer)
    assert not torch.equal(net.body[0].conv1.input_quantizer.upper, before)


class Summed(nn.Module):
    """A weight that is a sum of two parameters: both get the very same gradient tensor from autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.delta = nn.Parameter(torch.randn(4, 3, 1, 1)), nn.Parameter(torch.zeros(4, 3, 1, 1))
        self.bias = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return nn.functional.conv2d(x, self.base + self.delta) + self.bias


def test_parameters_that_share_a_gradient_tensor():
    net = calibrated()
    torch.manual_seed(0)
    net.first = Summed()
    start = [net.first.base.detach().clone(), net.first.delta.detach().clone()]
    optimizer, training = started(net)
    training.weight = 1.0
    one_step(net, optimizer)
    assert_close(net.first.base - start[0], net.first.delta - start[1], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize('calls', [1, 2])
def test_passes_that_share_one_backward(calls):
    """Two passes, one loss: g_M is still the mean over the passes."""
    net = calibrated()
    optimizer, _ = started(net)
    optimizer.zero_grad()
    sum(net(images()).abs().mean() for _ in range(calls)).div(calls).backward()
    optimizer.step()
    other = calibrated()
    one_step(other, started(other)[0])
    for a, b in zip(net.parameters(), other.parameters()):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_activation_checkpointing_changes_nothing():
    class Checkpointed(nn.Sequential):
        def forward(self, x):
            for block in self:
                x = checkpoint(block, x, use_reentrant=False)
            return x

    results = []
    for wrap in (False, True):
        net = calibrated()
        if wrap:
            net.body.__class__ = Checkpointed
        optimizer, training = started(net)
        results.append([one_step(net, optimizer) for _ in range(2)])
        assert training.log()['ratio'] > 0
    for a, b in zip(*results):
        assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_adam_sees_the_combined_gradient():
    """The hook runs before any optimizer's arithmetic, not only before plain SGD's."""
    net = calibrated()
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    CooperativeTraining(net, optimizer, term_of('mismatch'), WEIGHT, 'tensor', 'none')
    net(images()).abs().mean().backward()
    before = {id(p): p.grad.clone() for p in net.parameters()}
    optimizer.step()
    for name, p in net.named_parameters():
        moved = optimizer.state[p]['exp_avg'] / 0.1 - before[id(p)]
        if 'quantizer' in name or name.startswith('last'):
            assert moved.abs().max() < 1e-6, 'ranges and what lies behind the last quantizer learn from g_R alone'
        elif name in ('first.weight', 'body.0.conv1.weight'):
            assert moved.abs().max() > 1e-5


# ------------------------------------------------------------------------------------------------------------ two ranks


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/rendezvous', rank=rank, world_size=2)
    net = calibrated()
    wrapped = DistributedDataParallel(net, broadcast_buffers=False)
    optimizer, training = started(net)
    grads = []
    optimizer.register_step_pre_hook(lambda *_: grads.append([p.grad.clone() for p in net.parameters()]))
    for step in range(2):
        optimizer.zero_grad()
        wrapped(images(seed=10 * step + rank)).abs().mean().backward()
        optimizer.step()
    torch.save((grads, net.state_dict(), training.log()['cosine']), os.path.join(folder, f'{rank}.pth'))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_combine_the_averaged_gradients(tmp_path: Path):
    mp.spawn(work, args=(str(tmp_path),), nprocs=2)
    (grads, state, cosine), (grads_1, state_1, cosine_1) = (torch.load(tmp_path / f'{r}.pth') for r in range(2))
    assert all(torch.equal(a, b) for s, s_1 in zip(grads, grads_1) for a, b in zip(s, s_1))
    assert all(torch.equal(v, state_1[k]) for k, v in state.items()) and cosine == cosine_1

    net = calibrated()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    ranges = {id(p) for q in quantizers(net).values() for p in q.parameters()}
    for step in range(2):
        first, second = [], []
        for rank in range(2):
            terms, handles = terms_of(net, 'mismatch', True)
            loss = net(images(seed=10 * step + rank)).abs().mean()
            params = list(net.parameters())
            first.append(torch.autograd.grad(loss, params, retain_graph=True))
            second.append(torch.autograd.grad(sum(terms), params, allow_unused=True))
            for handle in handles:
                handle.remove()
        for p, a, b, c, d in zip(params, *first, *second):
            p.grad = (a + b) / 2
            if id(p) not in ranges and c is not None:
                other = (c + d) / 2
                (sim,) = sims_by_hand([p.grad.numpy()], [other.numpy()], 'tensor', 'cosine')
                p.grad += WEIGHT * torch.from_numpy(sim) * other
        for p, found in zip(params, grads[step]):
            assert_close(found, p.grad, rtol=1e-4, atol=1e-6)
        optimizer.step()
        for q in quantizers(net).values():
            q.clamp_range()
    assert_close(torch.cat([v.flatten().float() for v in state.values()]),
                 torch.cat([v.flatten().float() for v in net.state_dict().values()]), rtol=1e-4, atol=1e-6)  # fmt: skip
