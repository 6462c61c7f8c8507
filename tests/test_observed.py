"""Min-max, percentile and MSE: ranges from observers, fixed or learned."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import BODY, assert_close, images, plan_of, quantized, tiny

from basicsr_quant.methods import method_of, quantize, settings_of
from basicsr_quant.network.planning import PlanRequest, make_plan
from basicsr_quant.network.surgery import quant_layers
from basicsr_quant.quantizers import OBSERVERS, percentile_of, search_mse_range

METHODS = ['minmax', 'percentile', 'mse']
BATCHES = [images(4, seed=s) for s in range(3)]


def calibrated(method, bits=4, **settings):
    net = quantized(method, bits, **settings)
    method_of(plan_of(tiny(), method, bits, BODY[1::2], **settings)).calibrate(net, BATCHES)
    return net


def first_inputs():
    with torch.no_grad():
        return [tiny().first(b) for b in BATCHES]


PERCENT = {2: 99.0, 4: 99.0, 8: 99.99}


def wanted_range(method, options, bits, values, **kwargs):
    """The range of a list of tensors, by NumPy or the tested search."""
    if method == 'mse':
        return search_mse_range(torch.cat([v.reshape(-1) for v in values])[None], bits, **kwargs)
    if options.get('init') == 'ema_minmax':
        extremes = [(float(v.min()), float(v.max())) for v in values]
        low, high = extremes[0]
        for lo, hi in extremes[1:]:
            low, high = 0.9 * low + 0.1 * lo, 0.9 * high + 0.1 * hi
        return low, high
    if method == 'minmax':
        return min(float(v.min()) for v in values), max(float(v.max()) for v in values)
    p = options.get('percentile', PERCENT[bits])
    return tuple(np.mean([np.percentile(v.numpy(), q) for v in values]) for q in (100 - p, p))


OPTIONS = [('minmax', {}), ('minmax', {'init': 'ema_minmax'}), ('percentile', {}), ('percentile', {'percentile': 99.9}),
           ('mse', {})]  # fmt: skip


@pytest.mark.parametrize('zero_point', ['integer', 'float'])
@pytest.mark.parametrize('bits', [2, 8])
@pytest.mark.parametrize(('method', 'options'), OPTIONS)
def test_activation_ranges(method, options, bits, zero_point):
    net = calibrated(method, bits, options=options, zero_point=zero_point)
    quantizer = net.body[0].conv1.input_quantizer
    found = [float(b.detach()) for b in quantizer.bounds(None)]
    lower, upper = wanted_range(method, options, bits, first_inputs(), zero_point=zero_point)
    # The observer of the MSE search keeps its values in a random order, so that sums differ in their last digits.
    assert_close(found, [float(lower), float(upper)], rtol=2e-2 if method == 'mse' else 1e-5)
    assert quantizer.zero_point == zero_point


@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
@pytest.mark.parametrize('zero_point', ['integer', 'float'])
@pytest.mark.parametrize(('method', 'options'), OPTIONS)
def test_weight_ranges_are_symmetric(method, options, zero_point, granularity):
    net = calibrated(method, 4, options=options, w_granularity=granularity, zero_point=zero_point)
    for layer in quant_layers(net).values():
        weight = layer.weight.detach()
        rows = [weight] if granularity == 'tensor' else list(weight)
        narrow = zero_point == 'integer'
        wanted = []
        for row in rows:
            extra = {'symmetric': True, 'narrow_range': narrow} if method == 'mse' else {}
            lower, upper = wanted_range(method, options, 4, [row], **extra)
            wanted.append(max(abs(float(lower)), abs(float(upper))))
        lower, upper = (b.detach() for b in layer.weight_quantizer.bounds(weight))
        assert upper.shape == (() if granularity == 'tensor' else (4, 1, 1, 1))
        assert_close(upper.reshape(-1), torch.tensor(wanted), rtol=2e-2 if method == 'mse' else 1e-5)
        assert torch.equal(lower, -upper)
        codes = layer.weight_quantizer(torch.linspace(-9, 9, 4001).expand(4, 1, 1, -1))[0].unique()
        assert len(codes) == (15 if narrow else 16) and (codes == 0).any() == narrow


@pytest.mark.parametrize('bits', [(2, 8), (8, 2), (3, 5), (4, 4), (4, 32), (32, 6)], ids='W{0[0]}A{0[1]}'.format)
@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
@pytest.mark.parametrize('w_init', [None, 'minmax', 'percentile', 'mse'])
@pytest.mark.parametrize('method', METHODS)
def test_every_mix_of_bits_granularity_and_observers(method, w_init, granularity, bits):
    """Weights and inputs have bits, and observers, of their own; a layer's grid never has more codes than its bits."""
    w_bits, a_bits = bits
    net, x = tiny(), images(4)
    settings = settings_of(method, w_granularity=granularity, options={'w_init': w_init})
    plan = make_plan(net, PlanRequest(method, w_bits, a_bits, settings=settings))
    quantize(net, plan)
    method_of(plan).calibrate(net, [x])
    seen = {}
    for name, layer in quant_layers(net).items():
        layer.input_quantizer.register_forward_hook(lambda _, i, o, name=name: seen.__setitem__(name, o))
    with torch.no_grad():
        net(x)
    for name, layer in quant_layers(net).items():
        weight = layer.weight_quantizer(layer.weight).detach()
        if w_bits == 32:
            assert torch.equal(weight, layer.weight)
        else:
            rows = weight.reshape(4, -1) if granularity == 'channel' else weight.reshape(1, -1)
            assert all(len(row.unique()) <= 2**w_bits - 1 for row in rows) and (weight != layer.weight).any()
            wanted = observed_weight(w_init or method, layer.weight.detach(), w_bits, granularity == 'channel')
            assert_close(layer.weight_quantizer.bounds(weight)[1].detach(), wanted)
        if a_bits < 32:
            assert len(seen[name].unique()) <= 2**a_bits


def observed_weight(name, weight, bits, per_channel):
    options = {
        'mse': {'bits': bits, 'symmetric': True, 'narrow_range': True, 'zero_point': 'integer'},
        'percentile': {'percent': percentile_of(bits)},
    }.get(name, {})
    observer = OBSERVERS[name](per_channel=per_channel, **options)
    observer.update(weight)
    lower, upper = observer.range()
    return torch.maximum(lower.abs(), upper.abs())


@pytest.mark.parametrize('learn', [False, True])
@pytest.mark.parametrize('method', METHODS)
def test_ranges_train_only_if_asked(method, learn):
    net = calibrated(method, options={'learn': learn})
    run = method_of(plan_of(tiny(), method, 4, BODY[1::2], options={'learn': learn}))
    ranges = {n: p for n, p in net.named_parameters() if 'quantizer' in n}
    assert ranges and all(p.requires_grad == learn for p in ranges.values())
    wanted = [p for p in net.parameters() if p.requires_grad]
    groups = run.parameter_groups(net, wanted, lr=1e-3)
    assert [round(g.get('lr', 1e-3), 9) for g in groups] == ([1e-3, 1e-2] if learn else [1e-3])
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    run.attach(net, optimizer, 1.0)
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    for _ in range(3):
        optimizer.zero_grad()
        (net(images()) - 0.5).abs().mean().backward()
        optimizer.step()
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert set(ranges) <= moved if learn else not set(ranges) & moved
    assert {'first.weight', 'body.0.conv1.weight', 'last.weight'} <= moved


def test_mse_is_the_best_of_the_three_at_two_bits():
    x, wanted = images(4), tiny()(images(4)).detach()
    errors = {m: float((calibrated(m, 2)(x) - wanted).detach().square().mean()) for m in METHODS}
    assert min(errors, key=errors.get) == 'mse'
