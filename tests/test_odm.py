"""ODM, both forms: where ranges start, what is learned from what, offsets, and every mix of options."""

from __future__ import annotations

import io
import itertools
import logging

import numpy as np
import pytest
import torch
from helpers import BODY, assert_close, images, plan_of, quantized, tiny
from torch import nn

from basicsr_quant.methods import method_of, settings_of
from basicsr_quant.methods.base import Training
from basicsr_quant.methods.cooperative import CooperativeTraining
from basicsr_quant.methods.odm import channel_spreads
from basicsr_quant.network.surgery import quant_layers, quantizers
from basicsr_quant.quantizers import (
    LearnedRange,
    OffsetRange,
    PercentileWeight,
    SymmetricRange,
    search_mse_range,
)

BATCHES = [images(4, seed=s) for s in range(3)]


def method(name='odm', bits=4, **settings):
    return method_of(plan_of(tiny(), name, bits, BODY[1::2], **settings))


def calibrated(name='odm', bits=4, **settings):
    net = quantized(name, bits, **settings)
    method(name, bits, **settings).calibrate(net, BATCHES)
    return net


def upper_of(quantizer, x=None):
    return quantizer.bounds(x)[1].detach()


# --------------------------------------------------------------------------------------------------------------- starts


@pytest.mark.parametrize('percent', [99.0, 95.0])
def test_activations_start_at_the_mean_percentiles(percent):
    net = calibrated(options={'percentile': percent})
    inputs = [tiny().first(b).detach().numpy() for b in BATCHES]
    for bound, p in zip(net.body[0].conv1.input_quantizer.bounds(None), (100 - percent, percent)):
        assert_close(float(bound.detach()), np.mean([np.percentile(x, p) for x in inputs]), rtol=1e-5)


@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
@pytest.mark.parametrize('init', ['percentile', 'mse', 'minmax'])
def test_weight_bounds_are_gamma_times_a_percentile_of_the_magnitudes(init, granularity):
    net = calibrated(options={'init': init}, w_granularity=granularity)
    for layer in quant_layers(net).values():
        weight, quantizer = layer.weight.detach(), layer.weight_quantizer
        assert isinstance(quantizer, PercentileWeight)
        rows = weight.reshape(4, -1) if granularity == 'channel' else weight.reshape(1, -1)
        if init == 'mse':  # gamma starts where the bound has the least squared error
            wanted = search_mse_range(rows, 4, symmetric=True)[1]
        else:
            assert (quantizer.gamma == 1).all()
            wanted = torch.from_numpy(np.percentile(rows.abs().numpy(), 99, axis=1)).float()
        assert_close(upper_of(quantizer, weight).reshape(-1), wanted, rtol=1e-4)
        assert_close(upper_of(quantizer, weight * 2), 2 * upper_of(quantizer, weight), rtol=1e-5)


def test_without_the_correction_the_bound_does_not_follow_the_weight():
    quantizer = calibrated(options={'weight_clipping': False}).body[0].conv1.weight_quantizer
    assert isinstance(quantizer, SymmetricRange)
    assert torch.equal(upper_of(quantizer, torch.ones(4)), upper_of(quantizer, torch.full((4,), 9.0)))


@pytest.mark.parametrize('zero_point', ['float', 'integer'])
@pytest.mark.parametrize('clipping', [True, False])
def test_grids(zero_point, clipping):
    """The papers' grid is mid-rise for weights; an integer zero point gives up one level to hold zero."""
    net = calibrated(bits=3, zero_point=zero_point, options={'weight_clipping': clipping})
    layer = net.body[0].conv1
    line = torch.linspace(-9, 9, 3000).reshape(4, 1, 1, -1)
    assert len(layer.input_quantizer(line).unique()) == 8
    assert (layer.input_quantizer(torch.zeros(1)) == 0) == (zero_point == 'integer')
    assert layer.weight_quantizer.narrow_range == (zero_point == 'integer')


# ------------------------------------------------------------------------------------------------ options and presets


@pytest.mark.parametrize(
    ('name', 'wanted'),
    [
        ('odm', {'regularizer': 'mismatch', 'gate': 'cosine', 'granularity': 'tensor', 'weight_clipping': True,
                 'offsets': False, 'mismatch_weight': 1e-5, 'range_lr': 10.0, 'init': 'percentile', 'percentile': 99.0,
                 'detach_target': True}),
        ('odm_v1', {'regularizer': 'variance', 'gate': 'sign', 'weight_clipping': False, 'offsets': True,
                    'offsets_ratio': 0.3}),
    ],
)  # fmt: skip
def test_the_papers_are_the_defaults(name, wanted):
    settings = settings_of(name)
    assert settings['zero_point'] == 'float' and settings['w_granularity'] == 'tensor'
    assert {k: settings['options'][k] for k in wanted} == wanted


@pytest.mark.parametrize('range_lr', [1.0, 10.0, 0.1])
@pytest.mark.parametrize('kind', ['odm', 'odm_v1'])
def test_ranges_have_a_learning_rate_of_their_own(kind, range_lr):
    net, run = calibrated(kind, options={'range_lr': range_lr}), method(kind, options={'range_lr': range_lr})
    ranges = {id(p) for q in quantizers(net).values() for p in q.parameters()}
    first = net.first.weight
    given = [{'params': [first], 'lr': 5e-4}, {'params': [p for p in net.parameters() if p is not first]}]
    groups = run.parameter_groups(net, given, lr=1e-4)
    assert [g.get('lr') for g in groups] == [5e-4, None, pytest.approx(1e-4 * range_lr)]
    assert {id(p) for p in groups[2]['params']} == ranges
    assert sorted(id(p) for g in groups for p in g['params']) == sorted(map(id, net.parameters()))


def test_published_weight_is_converted_to_the_network(caplog):
    net, run = calibrated(), method()
    optimizer = torch.optim.Adam(net.parameters())
    with caplog.at_level(logging.INFO, 'basicsr'):
        training = run.attach(net, optimizer, feature_scale=0.5)
    assert isinstance(training, CooperativeTraining)
    assert_close(training.weight, 1e-5 / 255 / 0.5, rtol=1e-6, atol=0)
    assert 'c = 0.5' in caplog.text


def test_without_a_regularizer_training_is_plain():
    net, run = calibrated(options={'regularizer': 'none'}), method(options={'regularizer': 'none'})
    assert type(run.attach(net, torch.optim.Adam(net.parameters()), 1.0)) is Training


def test_gamma_and_ranges_learn_from_the_reconstruction_alone():
    nets = [calibrated(), calibrated()]
    steps = []
    for net, weight in zip(nets, (0.0, 10.0)):
        run = method(options={'mismatch_weight': weight})
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        run.attach(net, optimizer, 0.01)
        net(images()).abs().mean().backward()
        optimizer.step()
        steps.append({n: p.detach() for n, p in net.named_parameters()})
    for name, plain in steps[0].items():
        same = torch.equal(plain, steps[1][name])
        assert same if 'quantizer' in name or 'last' in name else True, name
    assert not torch.equal(steps[0]['first.weight'], steps[1]['first.weight'])


def test_training_keeps_ranges_open():
    net, run = calibrated(), method()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    run.attach(net, optimizer, 1.0)
    with torch.no_grad():
        for q in quantizers(net).values():
            for p in q.parameters():
                p.fill_(-1.0)
    net(images()).mean().backward()
    optimizer.step()
    for layer in quant_layers(net).values():
        lower, upper = layer.input_quantizer.bounds(None)
        assert upper > lower
        assert (layer.weight_quantizer.gamma > 0).all()


# -------------------------------------------------------------------------------------------------------------- offsets


@pytest.mark.parametrize(('ratio', 'count'), [(0.0, 0), (0.3, 1), (0.5, 2), (1.0, 4)])
def test_the_layers_with_the_largest_spread_get_offsets(ratio, count):
    net = calibrated('odm_v1', options={'offsets_ratio': ratio})
    spreads = channel_spreads(quantized('odm_v1'), BATCHES)
    assert list(spreads) == BODY
    for index, attribute in enumerate(('use_shift', 'use_scale')):
        wanted = sorted(BODY, key=lambda n, i=index: -spreads[n][i])[:count]
        found = [n for n, layer in quant_layers(net).items() if getattr(layer.input_quantizer, attribute)]
        assert sorted(found) == sorted(wanted)


def test_spreads_by_numpy():
    net = quantized('odm_v1')
    found = channel_spreads(net, BATCHES)
    wanted = []
    for batch in BATCHES:
        x = tiny().first(batch).detach().double().numpy()
        means, deviations = x.mean(axis=(0, 2, 3)), x.std(axis=(0, 2, 3))
        wanted.append((means.std() / x.std(), deviations.std() / x.std()))
    assert_close(found['body.0.conv1'], np.mean(wanted, axis=0).tolist(), rtol=1e-4)


def test_a_layer_of_one_channel_has_no_spread():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.body, self.last = nn.Conv2d(3, 1, 1), nn.Conv2d(1, 1, 1), nn.Conv2d(1, 3, 1)

        def forward(self, x):
            return self.last(self.body(self.first(x)))

    from basicsr_quant.methods import quantize

    net = One()
    quantize(net, plan_of(net, 'odm_v1'))
    assert channel_spreads(net, BATCHES)['body'] == (0.0, 0.0)
    method('odm_v1').calibrate(net, BATCHES)


@pytest.mark.parametrize('name', ['odm', 'odm_v1'])
def test_selecting_changes_nothing_at_first_and_all_offsets_train(name):
    options = {'offsets': True, 'offsets_ratio': 1.0}
    net, plain = calibrated(name, options=options), calibrated(name, options={'offsets': False})
    assert torch.equal(net(images()), plain(images()))
    run = method(name, options=options)
    assert run.leaves_parameters_unused
    optimizer = torch.optim.Adam(run.parameter_groups(net, net.parameters(), 1e-3), lr=1e-3)
    run.attach(net, optimizer, 1.0)
    net(images()).square().mean().backward()
    optimizer.step()
    for layer in quant_layers(net).values():
        assert isinstance(layer.input_quantizer, OffsetRange)
        assert layer.input_quantizer.shift.abs().max() > 0 and (layer.input_quantizer.scale != 1).any()


def test_linear_layers_have_no_offsets():
    from basicsr_quant.methods import quantize

    net = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    plan = plan_of(net, 'odm_v1')
    quantize(net, plan)
    assert type(net[1].input_quantizer) is LearnedRange
    method('odm_v1').calibrate(net, [torch.randn(5, 3)])
    assert net(torch.randn(2, 3)).isfinite().all()


# -------------------------------------------------------------------------------------------------------- every mixture

MIXES = list(
    itertools.product(
        [  # a granularity is a cosine's alone
            ('none', 'none', 'tensor'),
            *itertools.product(['mismatch', 'variance'], ['cosine'], ['element', 'tensor', 'global']),
            *itertools.product(['mismatch', 'variance'], ['sign', 'none'], ['tensor']),
        ],
        [True, False],
        [True, False],
        [('float', 'tensor'), ('integer', 'channel')],
    )
)


@pytest.mark.parametrize(('regularized', 'clipping', 'offsets', 'grid'), MIXES)
def test_every_mix_builds_calibrates_trains_and_loads(regularized, clipping, offsets, grid, bits=2):
    regularizer, gate, granularity = regularized
    options = {'regularizer': regularizer, 'gate': gate, 'granularity': granularity, 'weight_clipping': clipping,
               'offsets': offsets, 'mismatch_weight': 1.0}  # fmt: skip
    settings = {'options': options, 'zero_point': grid[0], 'w_granularity': grid[1]}
    net, run = quantized('odm', bits, **settings), method('odm', bits, **settings)
    seen = run.calibrate(net, [images(1, 6)])
    start = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = torch.optim.Adam(run.parameter_groups(net, net.parameters(), 1e-3), lr=1e-3)
    training = run.attach(net, optimizer, seen.feature_scale)
    for step in range(3):
        optimizer.zero_grad()
        (net(images(1, 6, seed=step)) - 0.5).abs().mean().backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in net.parameters())
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, start[n])}
    unused = {f'{n}.input_quantizer.{o}' for n, layer in quant_layers(net).items() for o in ('shift', 'scale')
              if offsets and not getattr(layer.input_quantizer, f'use_{o}')}  # fmt: skip
    assert moved == set(start) - unused
    log = training.log()
    assert log['bits'] == bits and ('ratio' in log) == (regularizer != 'none')
    assert all(np.isfinite(v) for v in log.values())

    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    loaded = quantized('odm', bits, seed=1, **settings)
    loaded.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert torch.equal(loaded(images()), net(images()))
