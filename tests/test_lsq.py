"""LSQ: where steps start, which grid an input takes."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import BODY, assert_close, images, plan_of, quantize_rows, quantized, tiny

from basicsr_quant.methods import method_of
from basicsr_quant.network.surgery import quant_layers
from basicsr_quant.quantizers import LearnedStep, search_mse_range


def calibrated(bits=4, batches=None, **settings):
    net = quantized('lsq', bits, **settings)
    method_of(plan_of(tiny(), 'lsq', bits, BODY[1::2], **settings)).calibrate(net, batches or [images()])
    return net


def step_of(quantizer):
    return (quantizer.step * quantizer.unit).detach()


@pytest.mark.parametrize('bits', [2, 4, 8])
def test_steps_start_at_twice_the_mean_magnitude_over_the_root_of_the_largest_code(bits):
    batches = [images(seed=s) for s in range(3)]
    net, original = calibrated(bits, batches), tiny()
    with torch.no_grad():
        first = [original.first(b) for b in batches]
        second = [original.body[0].relu(original.body[0].conv1(x)) for x in first]
    for name, inputs, top in (
        ('body.0.conv1', first, 2 ** (bits - 1) - 1),
        ('body.0.conv2', second, 2**bits - 1),  # behind a ReLU: unsigned
    ):
        layer = quant_layers(net)[name]
        magnitude = sum(float(x.abs().mean()) for x in inputs) / 3
        assert_close(step_of(layer.input_quantizer), 2 * magnitude / math.sqrt(top), rtol=1e-5)
        weight = float(layer.weight.abs().mean())
        assert_close(step_of(layer.weight_quantizer), 2 * weight / math.sqrt(2 ** (bits - 1) - 1), rtol=1e-5)


def test_steps_per_channel_start_from_their_channel():
    net = calibrated(w_granularity='channel')
    for layer in quant_layers(net).values():
        wanted = 2 * layer.weight.abs().mean(dim=(1, 2, 3), keepdim=True) / math.sqrt(7)
        assert_close(step_of(layer.weight_quantizer), wanted.detach(), rtol=1e-5)
        assert layer.input_quantizer.step.shape == ()


def test_sign_follows_the_plan_and_g_counts_what_shares_a_step():
    for name, layer in quant_layers(calibrated()).items():
        assert layer.input_quantizer.signed == (name not in BODY[1::2])
        assert layer.weight_quantizer.signed
        assert layer.input_quantizer.batched and not layer.weight_quantizer.batched


@pytest.mark.parametrize('batch', [1, 2, 8])
def test_the_gradient_factor_of_an_input_does_not_depend_on_the_batch(batch):
    quantizer = quant_layers(calibrated())['body.0.conv1'].input_quantizer
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)).expand(batch, -1, -1, -1)
    quantizer(x).sum().div(batch).backward()
    one = LearnedStep(4, batched=True)
    one.load_state_dict(quantizer.state_dict())
    one(x[:1]).sum().backward()
    assert_close(quantizer.step.grad, one.step.grad, rtol=1e-4)


@pytest.mark.parametrize('bits', [2, 3, 4])
@pytest.mark.parametrize('signed', [True, False])
def test_an_mse_start_is_the_best_step_of_lsqs_own_grid(bits, signed):
    """[-Q_N s, Q_P s] is lopsided: the best symmetric range is not its best step (two bits: 1.5 times too wide)."""
    method = method_of(plan_of(tiny(), 'lsq', bits, options={'init': 'mse'}))
    quantizer = LearnedStep(bits, signed=signed, batched=True)
    x = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0))
    x = x if signed else x.relu()
    observer = method.make_observer('layer', quantizer)
    observer.update(x)
    method.start_input(quantizer, observer)

    values, low, high = x.reshape(-1).double().numpy(), -quantizer.negative_steps, quantizer.positive_steps
    errors = {}
    for s in torch.linspace(0.02, 2.5, 800).tolist():
        errors[s] = ((quantize_rows(values, low * s, high * s, bits) - values) ** 2).mean()
    found = ((quantizer(x) - x) ** 2).mean()
    assert float(found) <= 1.02 * min(errors.values())


@pytest.mark.parametrize('bits', [2, 4])
def test_a_covering_start_reaches_the_symmetric_range_on_both_sides(bits):
    method = method_of(plan_of(tiny(), 'lsq', bits, options={'init': 'mse_cover'}))
    quantizer = LearnedStep(bits, signed=True, batched=True)
    x = torch.randn(4, 2000, generator=torch.Generator().manual_seed(0))
    observer = method.make_observer('layer', quantizer)
    observer.update(x)
    upper = search_mse_range(x.reshape(1, -1), bits, symmetric=True)[1]
    method.start_input(quantizer, observer)
    assert float(quantizer.bounds(x)[1]) == pytest.approx(float(upper), rel=0.02)


@pytest.mark.parametrize('init', ['lsq', 'mse', 'mse_cover', 'percentile', 'minmax'])
@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
def test_every_start_gives_positive_steps_and_zero_as_a_code(init, granularity):
    net = calibrated(2, options={'init': init}, w_granularity=granularity)
    for layer in quant_layers(net).values():
        for quantizer, x in ((layer.input_quantizer, images()), (layer.weight_quantizer, layer.weight)):
            assert (step_of(quantizer) > 0).all()
            assert (quantizer(torch.zeros_like(x)) == 0).all()


def test_min_max_start_covers_the_extremes():
    net, x = calibrated(4, [images()], options={'init': 'minmax'}), tiny().first(images())
    lower, upper = quant_layers(net)['body.0.conv1'].input_quantizer.bounds(x)
    assert lower <= x.min() * 0.999 and upper >= x.max() * 0.999
