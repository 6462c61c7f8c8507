"""Weights of their own for each image of a batch: one grouped convolution, and gradients as in a loop over images."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close, images, plan_of, tiny
from torch import nn

from basicsr_quant.cost import BitMeter, cost_of, trace_at
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import method_of, quantize
from basicsr_quant.nn import conv_per_sample
from basicsr_quant.quantizers import QuantContext, SelectedWeight, fake_quantize


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize(
    'options',
    [
        {'padding': 1}, {'padding': 'same'}, {'stride': 2, 'padding': 1}, {'groups': 2, 'dilation': 2},
        {'padding': 1, 'padding_mode': 'reflect'}, {'padding': 1, 'padding_mode': 'circular', 'groups': 4},
    ],
)  # fmt: skip
def test_a_weight_for_each_sample_is_a_loop_over_samples(options, bias):
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 3, bias=bias, **options)
    x, weight = torch.randn(3, 4, 9, 7), torch.randn(3, *layer.weight.shape)
    each = [layer._conv_forward(x[i : i + 1], weight[i], layer.bias) for i in range(3)]
    assert_close(conv_per_sample(layer, x, weight, layer.bias), torch.cat(each), atol=1e-5)


def test_weights_and_gradients_are_those_of_every_candidate():
    torch.manual_seed(0)
    q = SelectedWeight((2, 4, 8), 'layer')
    q.context = QuantContext()
    weight = torch.randn(5, 3, 3, 3, requires_grad=True)
    m = weight.detach().abs().amax()
    each = [fake_quantize(weight.detach(), -m, m, bits, narrow_range=True) for bits in (2, 4, 8)]
    assert torch.equal(q(weight), each[2])  # nothing chosen: the most bits
    choice = torch.eye(3)[[2, 0, 1, 0]].requires_grad_()
    q.context.choices['layer'] = choice
    found = q(weight)
    assert torch.equal(found, torch.stack([each[k] for k in (2, 0, 1, 0)]))
    assert q.context.weight_bits['layer'].tolist() == [8.0, 2.0, 4.0, 2.0]
    grad = torch.randn_like(found)
    found.backward(grad)
    assert_close(choice.grad, torch.stack([torch.stack([(g * e).sum() for e in each]) for g in grad]), atol=1e-4)
    assert_close(weight.grad, grad.sum(0), atol=1e-5)  # straight through, none is clipped
    q.context.choices['layer'] = choice.detach()[1:2]
    assert torch.equal(q(weight), each[0])  # of one image, for the ordinary convolution


def started():
    plan = plan_of(tiny(), 'cadyq', 8, options={'select_weights': True})
    net = quantize(tiny(), plan)
    method_of(plan).calibrate(net, [images(2, 16)])
    with torch.no_grad():
        for index, name in enumerate(['body.0.conv1', 'body.0.conv2', 'body.1.conv1', 'body.1.conv2']):
            selector = net.get_submodule(name).input_quantizer.selector
            selector.bias.copy_(torch.tensor([-9.0, 0.0, 9.0]) * (1 if index % 2 else 0))
            selector.weight[:, :2] = torch.tensor([[-1.0, -1.0], [0.0, 0.0], [0.0, 0.0]]) * (0 if index % 2 else 1)
            selector.weight[:, 2:] = 0
            if index % 2 == 0:  # 4 bits below a gradient of about 20, else 6
                selector.bias.copy_(torch.tensor([40.0, 0.0, -9.0]))
    return plan, net


def batch() -> torch.Tensor:
    rough = images(1, 16, 3)
    return torch.cat([rough, 0.5 + 0.01 * rough, 0.5 + 0.02 * images(1, 16, 4)])


def test_a_batch_gives_each_image_what_it_gets_alone():
    _, net = started()
    with torch.no_grad():
        whole = net.eval()(batch())
        assert net._quant_context.weight_bits['body.0.conv1'].tolist() == [6.0, 4.0, 4.0]
        assert net._quant_context.weight_bits['body.0.conv2'].tolist() == [8.0, 8.0, 8.0]
        for index, image in enumerate(batch()):
            assert_close(net(image[None])[0], whole[index], atol=1e-5)
        fixed = copy.deepcopy(net)
        for name in ('body.0.conv1', 'body.1.conv1'):
            fixed.get_submodule(name).input_quantizer.tells = False
        assert (fixed(batch())[1] - whole[1]).abs().max() > 1e-4  # the weights at 8 bits give something else


def test_bitops_count_weights_at_the_bits_they_had():
    plan, net = started()
    sized = trace_at(net, scale=1, output_size=(32, 32))
    meter = BitMeter(net, plan, sized)
    with torch.no_grad():
        for image in batch():
            net.eval()(image[None])
            meter.image()
    found = cost_of(sized, plan, meter.mean_bits(), meter.mean_products())
    row = {r.layer: r for r in found.layers}['body.0.conv1']
    assert row.bitops == round(row.macs * (36 + 16 + 16) / 3)
    assert (row.w_bits, row.a_bits) == (pytest.approx(14 / 3), pytest.approx(14 / 3))
    assert row.weight_bytes == 4 * 4 * 9  # as stored, at 8 bits


def test_it_trains_and_selectors_learn_from_the_weights_too():
    plan, net = started()
    method_of(plan).attach(net, torch.optim.SGD(net.parameters(), 0.0), 1.0)
    net.train()(batch()).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for n, p in net.named_parameters() if 'body' in n)


def test_other_weight_bits_are_refused():
    plan = plan_of(tiny(), 'cadyq', 8, options={'select_weights': True, 'bits': [2, 4]})
    with pytest.raises(QuantError, match='make them equal'):
        method_of(plan).check(plan)
