"""CADyQ as a method: what it makes of a network, its bit loss, its two stages."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from helpers import assert_close, images, plan_of, quantized, tiny
from torch import nn
from torch.nn import functional

from basicsr_quant.cost import BitMeter, trace_at
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import method_of, quantize
from basicsr_quant.methods.extra_loss import with_loss
from basicsr_quant.network.integer_tensors import tensors_of
from basicsr_quant.network.planning import LayerRule
from basicsr_quant.network.surgery import quant_layers
from basicsr_quant.quantizers import MaxAbsWeight, SelectedRange, SymmetricRange, fake_quantize


def started(**settings):
    """A calibrated network, its method, its optimizer."""
    plan = plan_of(tiny(), 'cadyq', 8, **settings)
    net, method = quantize(tiny(), plan), method_of(plan)
    seen = method.calibrate(net, [images(2, 16)])
    return net.train(), method, seen


def selected(net: nn.Module) -> list[SelectedRange]:
    return [m for m in net.modules() if isinstance(m, SelectedRange)]


def test_layers_choose_but_those_with_bits_of_their_own():
    net, _, seen = started(layers={'body.0.conv1': LayerRule(8, 5), 'body.0.conv2': LayerRule(32, 32)})
    kinds = {name: type(layer.input_quantizer) for name, layer in quant_layers(net).items()}
    assert kinds == {'body.0.conv1': SymmetricRange, 'body.1.conv1': SelectedRange, 'body.1.conv2': SelectedRange}
    assert all(isinstance(layer.weight_quantizer, MaxAbsWeight) for layer in quant_layers(net).values())
    assert all(float(q.std_scale) == pytest.approx(1 / seen.feature_scale) for q in selected(net))
    assert all((q.alphas == 1).all() and q.unit > 0 for q in selected(net))


def test_starts_as_pams_with_the_highest_bits():
    net, _, _ = started()
    pams = quantized('pams', 8)
    method_of(plan_of(tiny(), 'pams', 8)).calibrate(pams, [images(2, 16)])
    with torch.no_grad():
        assert torch.equal(net.eval()(images(2, 16, 5)), pams(images(2, 16, 5)))


@pytest.mark.parametrize('compat', [False, True])
def test_bit_loss_is_its_formula_and_has_the_gradient_of_log_bits(compat):
    net, method, _ = started(reference_compat=compat, options={'bit_weight': 0.5, 'bit_growth': 0.25})
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    training = method.attach(net, optimizer, 1.0)
    batch = images(3, 12)
    for steps, weight in ((0, 0.5), (999, 0.5), (1000, 0.75), (3456, 1.25)):
        training.progress.steps.fill_(steps)
        net.zero_grad()
        (0 * net(batch)).sum().backward()
        found = [q.selector.bias.grad.clone() for q in selected(net)]
        net.eval()  # the same pass without the loss
        net.zero_grad()
        net(batch)
        expected = list(net._quant_context.expected_bits.values())
        factor = weight / 255 * (1 if compat else 16 / 3)
        (factor * torch.stack(expected).log().sum()).backward()
        for grad, q in zip(found, selected(net)):
            assert_close(grad, q.selector.bias.grad, rtol=1e-4)
        ratios = [net._quant_context.bits[q.name] / e.detach() for q, e in zip(selected(net), expected)]
        assert training.log()['l_bits'] == pytest.approx(factor * float(torch.stack(ratios).sum()), rel=1e-4)
        net.train()
    assert training.log()['bits'] == 8.0


def test_other_parameters_learn_from_the_hosts_loss_alone():
    grads = []
    for weight in (0.0, 1e3):
        net, method, _ = started(options={'bit_weight': weight})
        method.attach(net, torch.optim.SGD(net.parameters(), 0.0), 1.0)
        net(images(2, 12)).square().sum().backward()
        grads.append({n: p.grad for n, p in net.named_parameters()})
    for name in grads[0]:
        assert torch.equal(grads[0][name], grads[1][name]) != ('selector' in name), name


def test_a_heavy_bit_loss_lowers_the_bits_and_counts_its_steps():
    net, method, _ = started(options={'bit_weight': 1e4, 'selector_lr': 50.0})
    optimizer = torch.optim.Adam(method.parameter_groups(net, net.parameters(), 1e-3), 1e-3)
    rates = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
    assert rates[id(net.first.weight)] == 1e-3
    for q in selected(net):
        assert rates[id(q.alphas)] == pytest.approx(1e-2) and rates[id(q.selector.weight)] == pytest.approx(5e-2)
    training = method.attach(net, optimizer, 1.0)
    batch = images(4, 12)
    meter = BitMeter(net, plan_of(tiny(), 'cadyq', 8), trace_at(net, scale=1, output_size=(32, 32)))
    for _ in range(30):
        optimizer.zero_grad()
        functional.l1_loss(net(batch), batch).backward()
        optimizer.step()
    assert training.log()['bits'] == 4.0 and int(training.progress.steps) == 30
    assert int(net.state_dict()['quant_measures.progress.steps']) == 30
    meter._passes.clear()
    with torch.no_grad():
        net.eval()(batch[:1])
    assert meter.image().fab == 4.0


def test_a_network_of_pams_is_taken_over():
    plan = plan_of(tiny(), 'pams', 8)
    pams = quantize(tiny(seed=7), plan)
    scale = method_of(plan).calibrate(pams, [images(2, 16)]).feature_scale
    net = quantize(tiny(), plan_of(tiny(), 'cadyq', 8, options={'bits': [3, 8]}))
    method = method_of(plan_of(tiny(), 'cadyq', 8, options={'bits': [3, 8]}))
    net.load_state_dict(method.adopt(pams.state_dict(), net.state_dict(), scale))
    with torch.no_grad():
        assert torch.equal(net.eval()(images(2, 16, 5)), pams(images(2, 16, 5)))
    for name, layer in quant_layers(net).items():
        bound = pams.get_submodule(name).input_quantizer.bounds(None)[1]
        assert_close(layer.input_quantizer.bounds(None)[1], torch.stack([bound, bound]).detach())
        assert float(layer.input_quantizer.std_scale) == pytest.approx(1 / scale)


def test_normalized_features_have_mean_zero_and_deviation_one():
    net, method, _ = started()
    plain = {q.name: (q.feature_mean.clone(), q.feature_std.clone()) for q in selected(net)}
    assert all((mean == 0).all() and (std == 1).all() for mean, std in plain.values())
    batches = [images(3, 12, seed) for seed in range(4)]
    method = method_of(plan_of(tiny(), 'cadyq', 8, options={'normalize': True}))
    net = quantize(tiny(), plan_of(tiny(), 'cadyq', 8, options={'normalize': True}))
    method.calibrate(net, batches)
    read: dict[str, list] = {}
    for q in selected(net):
        q.selector.register_forward_pre_hook(lambda m, x, name=q.name: read.setdefault(name, []).append(x[0]))
    with torch.no_grad():
        for batch in batches:
            net.eval()(batch)
    for q in selected(net):
        rows = torch.cat(read[q.name])
        assert_close(rows.mean(0), torch.zeros(rows.shape[1]), atol=1e-4)
        assert_close(rows.std(0, correction=0), torch.ones(rows.shape[1]), atol=1e-4)
        assert net._quant_context.bits[q.name].tolist() == [8.0] * 3  # weights are alike for all candidates
    q.normalize(torch.ones(3, 6))
    assert q.feature_std.tolist() == [1.0] * 6


def test_candidates_may_start_where_their_rounding_errs_least():
    settings = {'candidate_init': 'mse'}
    method = method_of(plan_of(tiny(), 'cadyq', 8, options=settings))
    net = quantize(tiny(), plan_of(tiny(), 'cadyq', 8, options=settings))
    batches = [images(3, 12, seed) for seed in range(3)]
    inputs: dict[str, list] = {}
    method.calibrate(net, batches)
    for q in selected(net):
        q.register_forward_pre_hook(lambda q, x: inputs.setdefault(q.name, []).append(x[0]))
    with torch.no_grad():
        for batch in batches:
            net.eval()(batch)
    for q in selected(net):
        x, bounds = torch.cat(inputs[q.name]), q.bounds(None)[1].detach()
        assert bounds[0] < bounds[2] and q.alphas[2] == 1  # the highest keeps the calibrated one

        def error(bound, bits, x=x):
            grid = fake_quantize(x, -bound, bound, bits, zero_point='integer', narrow_range=True)
            return float((grid - x).square().mean())

        for bound, bits in zip(bounds[:2], (4, 6)):
            least = min(error(share * bounds[2], bits) for share in torch.linspace(0.2, 1, 41))
            assert error(bound, bits) <= 1.02 * least


def with_tensors(method: str) -> tuple:
    plan = plan_of(tiny(), method, 8)
    plan = dataclasses.replace(plan, tensors=tensors_of(tiny(), (1, 3, 8, 8), plan))
    return plan, method_of(plan), quantize(tiny(), plan)


def test_quantized_skips_stay_at_eight_bits_while_layers_choose():
    plan, method, net = with_tensors('cadyq')
    method.calibrate(net, [images(2, 16)])
    held = {t.tensor: net.tensor_quantizers[t.tensor.replace('.', '-')] for t in plan.tensors}
    assert list(held) == ['first', 'body.0.conv2', 'body.0/add.0']
    assert not any(isinstance(q, SelectedRange) for q in held.values())
    assert {q.num_bits for q in held.values()} == {8}
    seen = []
    net.body[1].register_forward_pre_hook(lambda m, inputs: seen.append(inputs[0].detach()))
    chosen = selected(net)
    with torch.no_grad():
        for q, highest in zip(chosen, (False, True, False, True)):
            q.selector.bias.copy_(torch.tensor([0.0, 0.0, 9.0] if highest else [9.0, 0.0, 0.0]))
        net.eval()(images(1, 12))
    assert [float(net._quant_context.bits[q.name]) for q in chosen] == [4.0, 8.0, 4.0, 8.0]
    assert 15 < len(seen[0].unique()) <= 255  # the sum that body.1 takes and skips
    method.attach(net, torch.optim.SGD(net.parameters(), 0.0), 1.0)
    net.train()(images(2, 12)).square().sum().backward()
    learned = [q for q in held.values() if isinstance(q, SymmetricRange)]
    assert learned and all(q.alpha.grad is not None for q in learned)


def test_a_network_of_pams_with_quantized_skips_is_taken_over():
    _, before, pams = with_tensors('pams')
    scale = before.calibrate(pams, [images(2, 16)]).feature_scale
    _, method, net = with_tensors('cadyq')
    net.load_state_dict(method.adopt(pams.state_dict(), net.state_dict(), scale))
    with torch.no_grad():
        assert_close(net.eval()(images(2, 16, 5)), pams(images(2, 16, 5)), atol=1e-6)


def test_a_copy_made_between_passes_chooses_the_same():
    net, _, _ = started()
    net(images(2, 12))
    twin = copy.deepcopy(net)
    assert torch.equal(twin(images(2, 12)), net(images(2, 12)))


@pytest.mark.parametrize('bits', [[], [4, 4], [8, 4], [4, 9], [1, 8], [4.5, 8], ['a']])
def test_candidates_out_of_range_are_refused(bits):
    with pytest.raises(QuantError, match=r'quant\.cadyq\.bits: .* given, a rising list of different whole numbers'):
        method_of(plan_of(tiny(), 'cadyq', 8, options={'bits': bits}))


class WithLinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Linear(4, 4), nn.Conv2d(4, 3, 1))


def test_what_it_cannot_take_is_refused():
    method = method_of(plan_of(tiny(), 'cadyq', 8))
    with pytest.raises(QuantError, match=r"layer 'layers.2' is a Linear; .* quant.layers: \{'layers.2': fp\}"):
        method.check(plan_of(WithLinear(), 'cadyq', 8))
    with pytest.raises(QuantError, match=r'quant.a_bits: 4 given, but the highest of quant.cadyq.bits is 8'):
        method.check(plan_of(tiny(), 'cadyq', 4))
    method.check(plan_of(WithLinear(), 'cadyq', 8, layers={'layers.2': LayerRule(32, 32)}))


def test_an_extra_loss_changes_no_value_and_adds_its_gradient_once():
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    other = torch.tensor(3.0, requires_grad=True)
    constant = torch.zeros(1)
    out = with_loss({'none': None, 'fixed': constant, 'y': (2 * x,)}, 5 * other)
    assert out['fixed'] is constant and torch.equal(out['y'][0], 2 * x)
    (out['y'][0].sum() * 7).backward()
    assert x.grad.tolist() == [14.0, 14.0] and float(other.grad) == 5.0
    assert with_loss(constant, other) is constant
