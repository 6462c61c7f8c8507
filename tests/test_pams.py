"""PAMS against the published modules and its formulas."""

from __future__ import annotations

import pytest
import torch
from helpers import BODY, assert_close, images, plan_of, quantized, reference, tiny

from basicsr_quant.methods import method_of
from basicsr_quant.network.surgery import floating_point, quant_layers
from basicsr_quant.quantizers import MaxAbsWeight, SymmetricRange


@pytest.mark.parametrize('bits', [3, 8])
def test_weights_equal_the_published_module(bits):
    data = reference()
    assert_close(MaxAbsWeight(bits)(torch.from_numpy(data['w'])), data[f'pams_w{bits}'], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('bits', [3, 8])
def test_activations_and_both_gradients_equal_the_published_module(bits):
    data = reference()
    x = torch.from_numpy(data['x']).requires_grad_()
    quantizer = SymmetricRange(bits)
    quantizer.set_range(torch.tensor(-2.5), torch.tensor(2.5))
    q = quantizer(x)
    q.square().sum().backward()
    assert_close(q, data[f'pams_a{bits}'], rtol=1e-6, atol=1e-6)
    assert_close(x.grad, data[f'pams_a{bits}_gx'], rtol=1e-5, atol=1e-5)
    # The parameter is alpha over its calibrated value 2.5, so its gradient is 2.5 times that of alpha.
    assert_close(quantizer.alpha.grad / 2.5, data[f'pams_a{bits}_galpha'].item(), rtol=1e-4)


@pytest.mark.parametrize(
    ('init', 'alpha'),
    [
        ('ema_minmax', lambda m: 0.9 * (0.9 * m[0] + 0.1 * m[1]) + 0.1 * m[2]),
        ('minmax', max),
    ],
)
def test_alpha_starts_from_the_largest_magnitudes(init, alpha):
    net, batches = quantized('pams', options={'init': init}), [images(seed=s) for s in range(3)]
    method_of(plan_of(tiny(), 'pams', 4, BODY[1::2], options={'init': init})).calibrate(net, batches)
    maxima = []
    with torch.no_grad(), floating_point(net):
        for batch in batches:
            x = net.body[0].relu(net.body[0].conv1(net.first(batch)))  # not negative: the largest is the upper extreme
            maxima.append(float(x.max()))
    assert_close(net.body[0].conv2.input_quantizer.bounds(None)[1], alpha(maxima), rtol=1e-5)


@pytest.mark.parametrize('unsigned', [False, True])
def test_unsigned_ranges_stand_behind_a_relu_only(unsigned):
    net = quantized('pams', bits=2, options={'unsigned': unsigned})
    method_of(plan_of(tiny(), 'pams', 2, BODY[1::2], options={'unsigned': unsigned})).calibrate(net, [images()])
    for name, layer in quant_layers(net).items():
        quantizer = layer.input_quantizer
        x = torch.linspace(-1, 1, 1001) * float(quantizer.bounds(None)[1].detach())
        codes = 4 if unsigned and name in BODY[1::2] else 3
        q = quantizer(x).unique()
        assert len(q) == codes and (q == 0).any() and (q.min() == 0) == (codes == 4)
        assert isinstance(layer.weight_quantizer, MaxAbsWeight)


def test_weights_have_no_range_to_learn():
    net = quantized('pams')
    names = [n for n, _ in net.named_parameters() if 'quantizer' in n]
    assert names == [f'{n}.input_quantizer.alpha' for n in BODY]
