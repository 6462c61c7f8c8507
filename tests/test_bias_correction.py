"""Empirical bias correction: the means of every layer's output are the FP32 network's again."""

from __future__ import annotations

import importlib

import pytest
import torch
from helpers import assert_close, images, plan_of, tiny
from torch import nn

from basicsr_quant.methods import calibrate, needs_images, quantize
from basicsr_quant.network.bias_correction import correct_biases
from basicsr_quant.network.calibration import output_error
from basicsr_quant.network.planning import LayerRule
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
    channel = {name: -1 if isinstance(layers[name], nn.Linear) else 1 for name in names}
    rows = {name: [o.movedim(channel[name], 0).flatten(1) for o in seen[name]] for name in names}
    return {name: torch.cat(found, dim=1).double().mean(dim=1) for name, found in rows.items()}


def calibrated(net, method='minmax', bits=2, correct=False, **settings):
    plan = plan_of(net, method, bits, **settings)
    quantize(net, plan)
    calibrate(net, plan, BATCHES)
    return correct_biases(net, BATCHES) if correct else None


@pytest.mark.parametrize(('method', 'settings'), [
    ('minmax', {}), ('minmax', {'scope': 'all'}), ('mse', {'w_granularity': 'channel'}), ('daq', {}),
])  # fmt: skip
def test_means_are_those_of_floating_point(method, settings):
    net, plain = tiny(), tiny()
    assert calibrated(net, method, correct=True, **settings) == []
    calibrated(plain, method, **settings)
    names = list(quant_layers(net))
    wanted = means(tiny(), names)
    found, before = means(net, names), means(plain, names)
    for name in names:
        assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-6)
        assert not torch.allclose(before[name], wanted[name], rtol=1e-3, atol=1e-5)
    state, other = net.state_dict(), plain.state_dict()
    assert {k for k in state if not torch.equal(state[k], other[k])} == {f'{name}.bias' for name in names}


@pytest.mark.parametrize('kept', [True, False])
def test_a_correction_is_kept_if_the_output_comes_nearer(kept, said, monkeypatch):
    def spoil(net, images, follow):
        for layer in quant_layers(net).values():
            layer.bias += 1
        return []

    if not kept:
        monkeypatch.setattr(importlib.import_module('basicsr_quant.methods.calibrate'), 'correct_biases', spoil)
    net, stages = tiny(), Stages()
    # The mean of the last layer's output is the network's: setting it right lowers the error by its square.
    rules = {'last': LayerRule(2, 2), '*': LayerRule(32, 32)}
    plan = plan_of(net, 'minmax', layers=rules, bias_correction='empirical')
    found = calibrate(quantize(net, plan), plan, BATCHES, stages).choices['bias_correction']
    assert found['kept'] == kept == (found['output_mse_after'] < found['output_mse_before'])
    with torch.no_grad():
        now = output_error(net, BATCHES, [tiny()(batch) for batch in BATCHES])
    assert_close(now, found['output_mse_after' if kept else 'output_mse_before'])
    assert any(line.endswith('; kept.' if kept else '; undone.') for line in said)
    assert list(stages.seconds)[:3] == ['observing activations', 'setting ranges', 'comparing outputs']
    assert torch.equal(net.last.bias, tiny().last.bias) != kept


def test_modes_quantizers_and_hooks_are_as_they_were():
    net = tiny()
    calibrated(net)
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
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Mixed()
    calibrated(net, correct=True, scope='all')
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
