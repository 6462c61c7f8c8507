"""The teacher beside a training: its losses, its gradients, what it leaves alone, what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, images, plan_of, quantized, tiny
from torch import nn
from torch.nn import functional

from basicsr_quant.config import read_config
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import method_of, quantize
from basicsr_quant.methods.distillation import (
    Distillation,
    attention,
    attention_distance,
    feature_distance,
    layer_weights,
)

WEIGHTS = {'body.0': 100.0, 'body.1.conv2': 1000.0}


def test_attention_is_its_formula():
    feature = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    for found, image in zip(attention(feature), feature):
        squares = sum(channel**2 for channel in image) / 3
        assert_close(found, (squares / (squares**2).sum().sqrt()).reshape(-1), rtol=1e-5)
    tokens = feature.flatten(2).transpose(1, 2)
    assert_close(attention(tokens), attention(feature))


@pytest.mark.parametrize('distance', [attention_distance, feature_distance])
def test_distances_ignore_the_scale_of_features(distance):
    a, b = (torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert float(distance(a, 3 * a)) == pytest.approx(0.0, abs=1e-6)
    assert_close(distance(2 * a, b), distance(a, 0.1 * b), rtol=1e-4)
    assert float(distance(a, b)) > 1e-4


def outputs_of(net: nn.Module, names, batch):
    found = []
    handles = [net.get_submodule(n).register_forward_hook(lambda m, i, o: found.append(o)) for n in names]
    net(batch)
    for handle in handles:
        handle.remove()
    return found


@pytest.mark.parametrize('loss', ['attention', 'feature'])
@pytest.mark.parametrize('method', ['pams', 'odm', 'cadyq', 'lsq', 'daq'])
def test_adds_the_weighted_loss_and_its_gradient_to_any_method(method, loss):
    distance = {'attention': attention_distance, 'feature': feature_distance}[loss]
    batch, names, grads, wanted = images(2, 12), list(WEIGHTS), [], tiny(seed=5)
    for by_hand in (True, False):
        plan = plan_of(tiny(), method, 8)
        net = quantize(tiny(), plan)
        method_of(plan).calibrate(net, [images(2, 16)])
        net.train()
        if by_hand:
            student, teacher = outputs_of(net, names, batch), outputs_of(wanted, names, batch)
            total = sum(w * distance(a, b.detach()) for w, a, b in zip(WEIGHTS.values(), student, teacher)) / 255
            total.backward()
        else:
            service = Distillation(net, tiny(seed=5), WEIGHTS, loss)
            (0 * net(batch)).sum().backward()
            assert service.log()['l_distill'] == pytest.approx(float(total.detach()), rel=1e-4)
        grads.append({n: p.grad for n, p in net.named_parameters()})
    for name, grad in grads[0].items():
        if grad is not None:
            assert_close(grads[1][name], grad, rtol=1e-3, atol=1e-4 * float(grad.abs().max()) + 1e-12)
    assert float(grads[0]['first.weight'].abs().max()) > 0


def test_teacher_is_frozen_stops_early_and_is_no_part_of_the_network():
    net, teacher = quantized('pams', 8), tiny(seed=5)
    method_of(plan_of(tiny(), 'pams', 8)).calibrate(net, [images(2, 16)])
    names = list(net.state_dict())
    Distillation(net, teacher, WEIGHTS, 'attention')
    ran = []
    teacher.last.register_forward_hook(lambda *_: ran.append('last'))
    teacher.first.register_forward_hook(lambda *_: ran.append('first'))
    net.train()(images()).sum().backward()
    assert ran == ['first'] and list(net.state_dict()) == names
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())
    net.eval()(images())
    with torch.no_grad():
        net.train()(images())
    assert ran == ['first']  # neither in validation


def test_a_quantized_teacher_rounds_its_weights_once():
    net, teacher, other = quantized('pams', 4), quantized('pams', 8, seed=5), quantized('pams', 8, seed=5)
    for q in (net, teacher, other):
        method_of(plan_of(tiny(), 'pams', 8)).calibrate(q, [images(2, 16)])
    Distillation(net, teacher, WEIGHTS, 'attention')
    with torch.no_grad():
        for name in ('body.0.conv1', 'body.1.conv2'):
            a, b = teacher.get_submodule(name), other.get_submodule(name)
            assert torch.equal(a.weight, b.weight_quantizer(b.weight)) and isinstance(a.weight_quantizer, nn.Identity)


def test_training_towards_the_teacher_lowers_the_loss():
    net = quantized('pams', 8)
    method_of(plan_of(tiny(), 'pams', 8)).calibrate(net, [images(2, 16)])
    service = Distillation(net, tiny(seed=5), layer_weights(net, {'body.*': 1e4}, 0.0), 'attention')
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        (0 * functional.l1_loss(net.train()(images(2, 12)), torch.zeros(()))).backward()
        optimizer.step()
        losses.append(service.log()['l_distill'])
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ('layers', 'found'),
    [
        (None, {'body.1': 7.0}),
        ({'body.?': 3.0}, {'body.0': 3.0, 'body.1': 3.0}),
        ({'body.0.*1': 2.0, 'body.*.conv?': 5.0}, {
            'body.0.conv1': 2.0, 'body.0.conv2': 5.0, 'body.1.conv1': 5.0, 'body.1.conv2': 5.0,
        }),
    ],
)  # fmt: skip
def test_globs_name_modules_and_the_first_match_wins(layers, found):
    assert layer_weights(tiny(), layers, 7.0) == found


def test_what_does_not_fit_is_refused():
    with pytest.raises(QuantError, match=r"quant.distill.layers: 'bodi.0' matches no module .*did you mean 'body.0'"):
        layer_weights(tiny(), {'bodi.0': 1.0}, 1.0)
    with pytest.raises(QuantError, match=r'quant.distill.layers is missing; this network has no repeated blocks'):
        layer_weights(nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)), None, 1.0)
    for given, said in (
        ({'loss': 'attenton'}, r"quant.distill.loss: 'attenton' given \(did you mean 'attention'\?\)"),
        ({'layers': {'body': -1}}, r"quant.distill.layers.'body': -1 given, a number of at least 0 needed"),
        ({'layers': 'body'}, "quant.distill.layers: 'body' given"),
        ({'teachr': 'fp32'}, 'quant.distill.teachr is not an option'),
    ):
        with pytest.raises(QuantError, match=said):
            read_config({'method': 'pams', 'distill': given})


def test_layers_may_be_a_list():
    config = read_config({'method': 'pams', 'distill': {'layers': ['body.0', 'body.1'], 'weight': 10}})
    assert config.distill.layer_weights() == {'body.0': 10.0, 'body.1': 10.0}
