"""Calibration looks at the FP32 network and leaves no trace; training does not depend on the features' scale."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from helpers import BODY, Tiny, assert_close, images, plan_of, quantized, tiny
from torch import nn

from basicsr_quant.errors import QuantError
from basicsr_quant.methods import method_of, quantize
from basicsr_quant.network.calibration import REFERENCE_STD, feature_scale, observe, regularizer_weight
from basicsr_quant.network.planning import LayerRule
from basicsr_quant.network.surgery import quantizers
from basicsr_quant.quantizers import OBSERVERS, MSEObserver

METHODS = ['minmax', 'percentile', 'mse', 'lsq', 'pams', 'odm', 'odm_v1']


def method(name: str, bits: int = 4, **settings):
    return method_of(plan_of(tiny(), name, bits, BODY[1::2], **settings))


def inputs_of(net: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The inputs of the body's convolutions in the FP32 network."""
    seen = {}
    handles = [
        dict(net.named_modules())[n].register_forward_pre_hook(lambda _, i, n=n: seen.__setitem__(n, i[0].clone()))
        for n in BODY
    ]
    with torch.no_grad():
        net(x)
    for handle in handles:
        handle.remove()
    return seen


# --------------------------------------------------------------------------------------------------------- what it sees


@pytest.mark.parametrize('bits', [2, 8])
def test_every_layer_is_observed_at_its_fp32_input(bits):
    net, batches = quantized(bits=bits), [images(2, seed=s) for s in range(3)]
    seen = observe(net, batches, lambda name, quantizer: OBSERVERS['minmax']())
    wanted = [inputs_of(tiny().eval(), b) for b in batches]
    assert list(seen.observers) == BODY and seen.images == 6
    for name in BODY:
        values = [w[name] for w in wanted]
        lower, upper = seen.observers[name].range()
        assert lower == min(v.min() for v in values) and upper == max(v.max() for v in values)
        assert_close(seen.stds[name], sum(float(v.std(unbiased=False)) for v in values) / 3, rtol=1e-6)
    assert_close(seen.feature_scale, sorted(seen.stds.values())[1] / REFERENCE_STD, rtol=1e-6)  # the lower median


def test_layers_with_an_input_in_floating_point_are_not_observed():
    net = tiny()
    quantize(net, plan_of(net, layers={'body.0.conv1': LayerRule(4, 32)}))
    seen = observe(net, [images()], lambda name, quantizer: OBSERVERS['minmax']())
    assert list(seen.observers) == BODY[1:]


def test_batches_are_taken_one_after_another():
    alive = []

    def batches():
        for seed in range(3):
            alive.append(seed)
            yield images(seed=seed)
            assert alive[-1] == seed

    assert observe(quantized(), batches(), lambda *_: MSEObserver()).images == 6


def test_a_layer_called_twice_is_observed_twice():
    net = tiny()
    net.body[1] = net.body[0]
    quantize(net, plan_of(net))
    seen = observe(net, [images()], lambda *_: OBSERVERS['minmax']())
    lower, upper = seen.observers['body.0.conv1'].range()
    once = net.first(images())
    assert lower < once.min() or upper > once.max()


# ---------------------------------------------------------------------------------------------------- what it leaves be


class Frozen(Tiny):
    """A batch normalization that its owner keeps in evaluation mode, as is usual in fine-tuning."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.free = nn.BatchNorm2d(4), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.last(self.free(self.norm(self.body(self.first(x)))))


@pytest.mark.parametrize('fails', [False, True], ids=['', 'after an exception'])
@pytest.mark.parametrize('training', [True, False])
def test_mode_hooks_buffers_and_weights_are_put_back(training, fails):
    net = Frozen()
    quantize(net, plan_of(net))
    net.train(training)
    net.norm.eval()
    modes = {n: m.training for n, m in net.named_modules()}
    before = {k: v.clone() for k, v in net.state_dict().items()}
    hooks = {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in net.named_modules()}

    def batches():
        yield images()
        assert not net.norm.training and not net.free.training and not torch.is_grad_enabled()
        assert not any(q.enabled for q in quantizers(net).values())
        if fails:
            raise OSError('the data set broke off')
        yield images(seed=2)

    state = torch.get_rng_state()
    if fails:
        with pytest.raises(OSError, match='broke off'):
            method('odm').calibrate(net, batches())
    else:
        observe(net, batches(), lambda *_: MSEObserver())
    assert torch.equal(torch.get_rng_state(), state) and torch.is_grad_enabled()
    assert {n: m.training for n, m in net.named_modules()} == modes
    assert hooks == {n: (len(m._forward_hooks), len(m._forward_pre_hooks)) for n, m in net.named_modules()}
    assert all(q.enabled for q in quantizers(net).values())
    after = net.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(v, before[k]) for k, v in after.items())


@pytest.mark.parametrize('name', METHODS)
def test_calibrating_touches_quantizers_only_and_all_of_them(name):
    net = quantized(name)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    identities = {n: id(p) for n, p in net.named_parameters()}
    method(name).calibrate(net, [images()])
    assert {n: id(p) for n, p in net.named_parameters()} == identities
    for key, value in net.state_dict().items():
        if 'quantizer' not in key:
            assert torch.equal(value, before[key]), key
    assert all(bool(q.calibrated) for q in quantizers(net).values())
    assert all(v.isfinite().all() for v in net.state_dict().values())
    assert not any(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize('name', METHODS)
def test_calibrating_twice_is_calibrating_once(name):
    """The second time the ranges differ already; they must not be looked at."""
    net, batches = quantized(name), [images(), images(seed=4)]
    method(name).calibrate(net, batches)
    once = copy.deepcopy(net.state_dict())
    method(name).calibrate(net, batches)
    assert all(torch.equal(v, once[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize('name', METHODS)
def test_an_empty_data_set_is_refused(name):
    net = quantized(name)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(QuantError, match=r'quant\.calibration: the data set gave no image'):
        method(name).calibrate(net, [])
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize('name', METHODS)
def test_a_layer_that_is_never_reached_is_named_and_harms_nothing(name, caplog):
    net = tiny()
    net.body[1].forward = lambda x: x + net.body[1].conv1(x)
    quantize(net, plan_of(net, name, 4, BODY[1::2]))
    with caplog.at_level(logging.WARNING, 'basicsr'):
        method(name).calibrate(net, [images()])
    assert 'body.1.conv2' in caplog.text and 'body.1.conv1' not in caplog.text
    assert bool(net.body[1].conv1.input_quantizer.calibrated)
    assert net(images()).isfinite().all()


# -------------------------------------------------------------------------------------------------------- feature scale


@pytest.mark.parametrize(
    ('stds', 'scale'),
    [
        ([], 1.0),
        ([0.0, 0.0], 1.0),
        ([REFERENCE_STD], 1.0),
        ([REFERENCE_STD * 2, 0.0, 0.0], 2.0),
        ([1.0, 2.0, 300.0], 2.0 / REFERENCE_STD),
    ],
)
def test_feature_scale_is_a_median_over_living_layers(stds, scale):
    assert_close(feature_scale(stds), scale, rtol=1e-6)


@pytest.mark.parametrize(
    ('published', 'scale', 'loss_range', 'weight'),
    [
        (1e-5, 1.0, 255.0, 1e-5),  # EDSR-PyTorch itself
        (1e-5, 1.0, 1.0, 1e-5 / 255),  # features in 0-255, loss in 0-1: BasicSR's EDSR with img_range 255
        (1e-5, 1 / 255, 1.0, 1e-5),  # both in 0-1
        (1e-5, 1 / 127.5, 1.0, 5e-6),
    ],
)
def test_weight_of_a_feature_term(published, scale, loss_range, weight):
    assert_close(regularizer_weight(published, scale, loss_range), weight, rtol=1e-6, atol=0)


def scaled(k: float, method_name: str, **settings) -> Tiny:
    """The same function with features k times as large, and layers of another bias between."""
    net = tiny()
    with torch.no_grad():
        net.first.weight.mul_(k)
        for layer in [net.first, *(getattr(block, c) for block in net.body for c in ('conv1', 'conv2'))]:
            layer.bias.mul_(k)
        net.last.weight.div_(k)
    quantize(net, plan_of(net, method_name, 3, BODY[1::2], **settings))
    return net


@pytest.mark.parametrize('k', [0.5, 2.0, 100.0])
def test_feature_scale_follows_the_features(k):
    scales = [method('odm').calibrate(scaled(f, 'odm'), [images()]).feature_scale for f in (1.0, k)]
    assert_close(scales[1] / scales[0], k, rtol=1e-5)


OPTIONS = [
    pytest.param('odm', {}, id='odm'),
    pytest.param('odm', {'granularity': 'global'}, id='odm, global'),
    pytest.param('odm', {'granularity': 'element'}, id='odm, element'),
    pytest.param('odm', {'weight_clipping': False, 'init': 'mse'}, id='odm, learned weight ranges from MSE'),
    pytest.param('odm', {'detach_target': False}, id='odm, target not detached'),
    pytest.param('odm_v1', {}, id='odm_v1'),
    pytest.param('lsq', {}, id='lsq'),
    pytest.param('pams', {}, id='pams'),
    pytest.param('mse', {'learn': True}, id='mse'),
]


@pytest.mark.parametrize(('name', 'options'), OPTIONS)
def test_training_does_not_depend_on_the_scale_of_the_features(name, options):
    """Decision 6: outputs, body weights and relative ranges evolve the same. A power of two changes exponents only."""
    if name.startswith('odm'):
        options = {**options, 'mismatch_weight': 0.5}  # large enough to be seen
    runs = [train(factor, name, options, steps) for factor, steps in ((1.0, 4), (128.0, 4), (1 / 128, 4), (1.0, 0))]
    (first, output, log), *others, (start, *_) = runs
    for net, other_output, other_log in others:
        assert_close(other_output, output, rtol=1e-3, atol=1e-5)
        assert_close(list(other_log.values()), list(log.values()), rtol=1e-3, atol=1e-5)
        for key, value in first.items():
            assert_close(net[key], value, rtol=1e-3, atol=1e-5)
    assert sum(not torch.equal(value, start[key]) for key, value in first.items()) > len(BODY), 'nothing trained'


def train(factor: float, name: str, options: dict, steps: int):
    """Trained parameters by name, output and log after some steps on body weights and ranges."""
    net = scaled(factor, name, options=options)
    run = method(name, 3, options=options)
    seen = run.calibrate(net, [images(2, 6), images(2, 6, seed=5)])
    for key, parameter in net.named_parameters():
        parameter.requires_grad_('body' in key and 'bias' not in key and parameter.requires_grad)
    trained = {n: p for n, p in net.named_parameters() if p.requires_grad}
    optimizer = torch.optim.Adam(run.parameter_groups(net, trained.values(), 1e-3), lr=1e-3, eps=1e-12)
    training = run.attach(net, optimizer, seen.feature_scale)
    for step in range(steps):
        optimizer.zero_grad()
        (net(images(2, 6, seed=step)) - images(2, 6, seed=step)).abs().mean().backward()
        optimizer.step()
    return {n: p.detach().clone() for n, p in trained.items()}, net(images(2, 6)), training.log()


@pytest.mark.parametrize(('bits', 'percent'), [(2, 99.0), (4, 99.0), (8, 99.99)])
def test_percentile_cuts_off_less_at_more_bits(bits, percent):
    batches = [images(2, seed=s) for s in range(3)]
    net, plan = tiny(), plan_of(tiny(), 'percentile', bits, BODY[1::2])
    quantize(net, plan)
    method_of(plan).calibrate(net, batches)
    seen = observe(net, batches, lambda name, quantizer: OBSERVERS['percentile'](percent=percent))
    for name, quantizer in quantizers(net).items():
        if name.endswith('input_quantizer'):
            for found, wanted in zip(quantizer.bounds(batches[0]), seen.observers[name.rpartition('.')[0]].range()):
                assert_close(found, wanted.clamp(max=0) if found <= 0 else wanted, rtol=0.2, atol=1e-6)
