"""Empirical bias correction: the means of every layer's output are the FP32 network's again."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, images, plan_of, tiny
from torch import nn

from basicsr_quant.methods import calibrate, needs_images, quantize
from basicsr_quant.network.bias_correction import correct_biases
from basicsr_quant.network.stages import Stages
from basicsr_quant.network.surgery import quant_layers

BATCHES = [images(4, seed=s) for s in range(3)]


def means(net, names):
    """Mean of each output channel of the layers over all batches."""
    seen = {name: [] for name in names}
    layers = dict(net.named_modules())
    handles = [layers[n].register_forward_hook(lambda _, i, o, n=n: seen[n].append(o.clone())) for n in names]
    with torch.no_grad():
        for batch in BATCHES:
            net(batch)
    for handle in handles:
        handle.remove()
    return {
        name: torch.cat([o.movedim(-1 if isinstance(layers[name], nn.Linear) else 1, 0).flatten(1) for o in seen[name]], 1)
        .double().mean(dim=1) for name in names
    }  # fmt: skip


def calibrated(net, method='minmax', bits=2, **settings):
    plan = plan_of(net, method, bits, **settings)
    quantize(net, plan)
    stages = Stages()
    calibrate(net, plan, BATCHES, stages)
    return net, stages


@pytest.mark.parametrize(('method', 'settings'), [
    ('minmax', {}), ('minmax', {'scope': 'all'}), ('mse', {'w_granularity': 'channel'}), ('daq', {}),
])  # fmt: skip
def test_means_are_those_of_floating_point(method, settings):
    net, stages = calibrated(tiny(), method, bias_correction='empirical', **settings)
    plain, _ = calibrated(tiny(), method, **settings)
    names = list(quant_layers(net))
    wanted = means(tiny(), names)
    found, before = means(net, names), means(plain, names)
    for name in names:
        assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(before[name], wanted[name], rtol=1e-3, atol=1e-5)
    assert 'correcting biases' in stages.seconds
    state, other = net.state_dict(), plain.state_dict()
    assert {k for k in state if not torch.equal(state[k], other[k])} == {f'{name}.bias' for name in names}


def test_modes_quantizers_and_hooks_are_as_they_were():
    net, _ = calibrated(tiny())
    net.train()
    correct_biases(net, BATCHES)
    assert all(m.training for m in net.modules()) and all(q.enabled for q in net.modules() if hasattr(q, 'num_bits'))
    assert not any(layer._forward_hooks for layer in quant_layers(net).values())
    assert not any(p.grad_fn for p in net.parameters())


class Mixed(nn.Module):
    """A layer that runs twice, a linear layer, one without a bias, one that never runs; called out of order."""

    def __init__(self):
        super().__init__()
        self.last = nn.Conv2d(4, 3, 3, padding=1)
        self.bare = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.twice = nn.Conv2d(4, 4, 3, padding=1)
        self.linear = nn.Linear(4, 4)
        self.idle = nn.Conv2d(4, 4, 1)
        self.first = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x):
        x = self.twice(self.twice(self.first(x)).relu())
        return self.last(self.bare(self.linear(x.movedim(1, -1)).movedim(-1, 1)))


def test_layers_that_run_twice_linear_layers_and_layers_without_a_bias(said):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Mixed()
    plan = plan_of(net, 'minmax', 2, bias_correction='empirical', scope='all')
    quantize(net, plan)
    calibrate(net, plan, BATCHES)
    assert any("1 layers have no bias and stay as they are: ['bare']" in line for line in said)
    names = ['first', 'linear', 'last']  # a layer that reads its own output settles only in part
    found = means(net, names)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wanted = means(Mixed(), names)
    for name in names:
        assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(('method', 'settings', 'needed'), [
    ('minmax', {}, True), ('none', {}, False),
    ('daq', {'options': {'step_table': 'optimal'}}, False),
    ('daq', {'options': {'step_table': 'optimal'}, 'bias_correction': 'empirical'}, True),
])  # fmt: skip
def test_it_needs_images(method, settings, needed):
    assert needs_images(plan_of(tiny(), method, **settings)) == needed
