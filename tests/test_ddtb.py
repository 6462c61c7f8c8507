"""DDTB as a method: which layers get gates, where bounds start, the warm-up, what a network costs."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch
from helpers import BODY, assert_close, images, plan_of, tiny
from torch import nn
from torch.nn import functional

from basicsr_quant.config import read_config
from basicsr_quant.cost import cost
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import METHODS, method_of, quantize
from basicsr_quant.methods.ddtb import ExtremesObserver
from basicsr_quant.network.integer_tensors import tensors_of
from basicsr_quant.network.planning import LayerRule
from basicsr_quant.network.surgery import quant_layers
from basicsr_quant.network.trace import trace
from basicsr_quant.quantizers import GatedRange, LearnedRange, MinMaxObserver, PercentileBounds

BATCHES = [images(1, 12, seed) * (0.2 + seed) for seed in range(4)]


def started(bits: int = 2, net: nn.Module | None = None, batches=None, **settings):
    """A calibrated network, its method, what calibration saw."""
    settings = {'options': {'dynamic_ratio': 0.5, 'warm_up': 3}, **settings}
    plan = plan_of(net or tiny(), 'ddtb', bits, **settings)
    net, method = quantize(net or tiny(), plan), method_of(plan)
    seen = method.calibrate(net, batches or BATCHES)
    return net.train(), method, seen


def gates(net: nn.Module) -> list[str]:
    found = {name: layer.input_quantizer for name, layer in quant_layers(net).items()}
    return [name for name, q in found.items() if isinstance(q, GatedRange) and q.use_gate]


def inputs_of(name: str, batches) -> list[torch.Tensor]:
    """What the FP32 network gives a layer, batch by batch."""
    net, seen = tiny(), []
    net.get_submodule(name).register_forward_pre_hook(lambda module, given: seen.append(given[0].clone()))
    with torch.no_grad():
        for batch in batches:
            net(batch)
    return seen


# ---------------------------------------------------------------------------------------------------------------- start


@pytest.mark.parametrize('ratio', [0.1, 0.25, 0.5, 0.74, 1.0])
def test_the_layers_whose_extremes_vary_most_get_gates(ratio):
    net, _, seen = started(options={'dynamic_ratio': ratio})
    spreads = {}
    for name in BODY:
        extremes = [[float(x.max()), float(x.min())] for x in inputs_of(name, BATCHES)]
        spreads[name] = np.var(extremes, axis=0).sum()
    wanted = sorted(spreads, key=spreads.get, reverse=True)[: int(4 * ratio)]
    assert sorted(gates(net)) == sorted(wanted) and len(set(spreads.values())) == 4
    assert seen.choices.get('gates', []) == [name for name in BODY if name in wanted]
    assert seen.images == 4


def test_spread_is_the_variance_of_both_extremes():
    values = np.random.default_rng(0).normal(size=(50, 7)) * 100 + 1e4
    observer = ExtremesObserver(MinMaxObserver())
    for row in values:
        observer.update(torch.from_numpy(row))
    assert observer.spread == pytest.approx(np.var(values.max(1)) + np.var(values.min(1)), rel=1e-9)
    assert_close(torch.stack(observer.range()), [values.min(), values.max()])


@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_bounds_start_from_calibration_at_any_number_of_bits(bits):
    net, _, _ = started(bits)
    for name in BODY:
        rows = [x.flatten().double().numpy() for x in inputs_of(name, BATCHES)]
        wanted = [np.mean([np.percentile(r, p) for r in rows]) for p in (1, 99)]
        lower, upper = quant_layers(net)[name].input_quantizer.bounds(None)
        assert_close(torch.stack([lower, upper]).detach(), wanted, rtol=1e-4, atol=1e-5)
        assert isinstance(quant_layers(net)[name].weight_quantizer, PercentileBounds)


def test_layers_with_bits_of_their_own_get_no_gate():
    rules = {'body.0.conv1': LayerRule(8, 5), 'body.0.conv2': LayerRule(32, 32)}
    net, _, _ = started(layers=rules, options={'dynamic_ratio': 1.0})
    kinds = {name: type(layer.input_quantizer) for name, layer in quant_layers(net).items()}
    assert kinds == {'body.0.conv1': LearnedRange, 'body.1.conv1': GatedRange, 'body.1.conv2': GatedRange}
    assert gates(net) == ['body.1.conv1', 'body.1.conv2']


def test_calibrated_it_is_static_whatever_the_ratio():
    nets = [started(options={'dynamic_ratio': ratio})[0].eval() for ratio in (0.0, 0.5, 1.0)]
    with torch.no_grad():
        first, *others = [net(images(3, 16, 9)) for net in nets]
    assert all(torch.equal(first, other) for other in others)
    assert not gates(nets[0]) and not hasattr(nets[0], 'quant_measures')


def test_one_image_is_no_variation(said):
    started(batches=BATCHES[:1])
    assert any('one image says nothing' in line for line in said)


# ------------------------------------------------------------------------------------------------------------- training


def optimizer_of(net: nn.Module, method, lr: float = 1e-3) -> torch.optim.Optimizer:
    return torch.optim.Adam(method.parameter_groups(net, net.parameters(), lr), lr)


def gate_parameters(net: nn.Module) -> dict[str, torch.Tensor]:
    chosen = tuple(f'{name}.input_quantizer.gate.' for name in gates(net))
    return {n: p for n, p in net.named_parameters() if n.startswith(chosen)}


@pytest.mark.parametrize('weight', [1.0, 7.5])
def test_the_warm_up_draws_logits_to_zero_then_gates_come_into_force(weight):
    net, method, _ = started(options={'dynamic_ratio': 0.5, 'warm_up': 3, 'gate_weight': weight})
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    training = method.attach(net, optimizer, 1.0)
    batch, chosen = images(3, 12), gates(net)
    for step in range(5):
        optimizer.zero_grad()
        (0 * net(batch)).sum().backward()
        found = {n: p.grad.clone() for n, p in gate_parameters(net).items()}
        logits = {name: net._quant_context.gates[name].detach() for name in chosen}
        mean_square = float(torch.stack([v.square().mean() for v in logits.values()]).mean())
        wanted = weight / 255 * mean_square if step < 3 else 0.0
        assert training.log()['l_gate'] == pytest.approx(wanted, rel=1e-5)
        assert training.log()['gate'] == pytest.approx(mean_square**0.5, rel=1e-5)
        assert all(bool(g.abs().max() > 0) == (step < 3) for g in found.values())
        for name in chosen:
            quantizer = net.get_submodule(name).input_quantizer
            factors = quantizer.factors(inputs_of_pass(net, name, batch))
            bounds = 1.0 if step < 3 else 2 * torch.sigmoid(logits[name])
            assert_close(factors.detach(), torch.ones(3, 2) * bounds, rtol=1e-4)
        optimizer.step()
    assert int(training.warm_up.steps) == int(net.state_dict()['quant_measures.warm_up.steps']) == 5


def inputs_of_pass(net: nn.Module, name: str, batch: torch.Tensor) -> torch.Tensor:
    """The quantizer's input in a pass like the last one."""
    seen = []
    handle = net.get_submodule(name).input_quantizer.register_forward_pre_hook(lambda m, given: seen.append(given[0]))
    with torch.no_grad():
        net(batch)
    handle.remove()
    return seen[0]


def test_the_gate_loss_is_no_loss_of_other_parameters():
    grads = []
    for weight in (0.0, 1e3):
        net, method, _ = started(options={'dynamic_ratio': 0.5, 'gate_weight': weight})
        method.attach(net, torch.optim.SGD(net.parameters(), 0.0), 1.0)
        net(images(3, 12)).square().sum().backward()
        grads.append({n: p.grad for n, p in net.named_parameters()})
    unused = {n for n, g in grads[0].items() if g is None}
    assert unused == {n for n in grads[0] if '.gate.' in n} - set(gate_parameters(net))
    for name in set(grads[0]) - unused:
        assert torch.equal(grads[0][name], grads[1][name]) != ('.gate.' in name), name


def test_training_moves_bounds_gates_and_weights_and_goes_on_from_its_state():
    net, method, _ = started(bits=4, options={'dynamic_ratio': 0.5, 'warm_up': 2})
    optimizer = optimizer_of(net, method)
    rates = {id(p): group['lr'] for group in optimizer.param_groups for p in group['params']}
    assert rates.keys() == {id(p) for p in net.parameters()}
    for name, p in net.named_parameters():
        assert rates[id(p)] == pytest.approx(5e-3 if name.endswith(('.lower', '.upper')) else 1e-3)
    method.attach(net, optimizer, 1.0)
    before = {n: p.clone() for n, p in net.named_parameters()}
    target = tiny(seed=5).eval()

    def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> float:
        loss = torch.zeros(())
        for step in steps:
            optimizer.zero_grad()
            batch = images(4, 12, 100 + step)
            loss = functional.l1_loss(net(batch), target(batch).detach())
            loss.backward()
            optimizer.step()
        return float(loss.detach())

    first = train(net, optimizer, range(1))
    train(net, optimizer, range(1, 10))
    state, steps = copy.deepcopy(net.state_dict()), copy.deepcopy(optimizer.state_dict())
    last = train(net, optimizer, range(10, 40))
    assert last < 0.7 * first
    moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
    assert set(before) - moved == {n for n in before if '.gate.' in n} - set(gate_parameters(net))

    resumed = quantize(tiny(seed=9), plan_of(tiny(), 'ddtb', 4, options={'dynamic_ratio': 0.5, 'warm_up': 2})).train()
    resumed.load_state_dict(state)
    other = optimizer_of(resumed, method)
    other.load_state_dict(steps)
    method.attach(resumed, other, 1.0)
    train(resumed, other, range(10, 40))
    assert all(torch.equal(v, resumed.state_dict()[k]) for k, v in net.state_dict().items())


def test_an_averaged_copy_with_the_same_buffers_is_gated_alike():
    net, method, _ = started(options={'dynamic_ratio': 1.0, 'warm_up': 1})
    twin = copy.deepcopy(net)  # before the warm-up is over, as a host's copy
    method.attach(net, torch.optim.SGD(net.parameters(), 0.0), 1.0).warm_up.steps += 1
    for mine, theirs in zip(net.buffers(), twin.buffers()):
        theirs.copy_(mine)
    with torch.no_grad():
        assert torch.equal(net.eval()(images(2, 12)), twin.eval()(images(2, 12)))
        twin.quant_measures.warm_up.steps.fill_(0)
        assert not torch.equal(net(images(2, 12)), twin(images(2, 12)))


def test_an_image_has_the_same_output_in_any_batch():
    net, _, _ = started(bits=4, options={'dynamic_ratio': 1.0, 'warm_up': 0})
    net, batch = net.eval().double(), torch.cat(BATCHES).double()  # in float32 a code may flip for no reason
    draw = torch.Generator().manual_seed(0)
    for name in BODY:  # statistics that training would have given: with fresh ones codes lie between two levels
        gate = net.get_submodule(name).input_quantizer.gate
        gate.mean.copy_(torch.randn(32, generator=draw) * 0.1)
        gate.variance.copy_(torch.rand(32, generator=draw) * 0.1 + 0.01)
    with torch.no_grad():
        together = net(batch)
        for index in range(len(batch)):
            assert_close(net(batch[index : index + 1]), together[index : index + 1], rtol=1e-9)


@pytest.mark.parametrize('ratio', [0.0, 1.0])
def test_quantized_skips_stay_at_eight_bits_beside_gates(ratio):
    plan = plan_of(tiny(), 'ddtb', 2, options={'dynamic_ratio': ratio, 'warm_up': 0})
    plan = dataclasses.replace(plan, tensors=tensors_of(tiny(), (1, 3, 8, 8), plan))
    net, method = quantize(tiny(), plan), method_of(plan)
    method.calibrate(net, BATCHES)
    held = {name: q.num_bits for name, q in net.tensor_quantizers.items() if q.num_bits == 8}
    assert list(held) == [t.tensor.replace('.', '-') for t in plan.tensors if t.bits == 8] != []
    net.train()(images(3, 12)).square().sum().backward()
    assert all(layer.input_quantizer.upper.grad is not None for layer in quant_layers(net).values())
    assert len(gates(net)) == 4 * ratio


class WithLinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 1)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.GELU()) for _ in range(2))
        self.last = nn.Conv2d(6, 3, 1)

    def forward(self, x):
        x = self.first(x).permute(0, 2, 3, 1)
        for layer in self.layers:
            x = layer(x)
        return self.last(x.permute(0, 3, 1, 2))


def test_linear_layers_have_gates_and_train():
    net, method, _ = started(
        net=WithLinear(), scope='all', layers={'first': LayerRule(32, 32), 'last': LayerRule(32, 32)},
        options={'dynamic_ratio': 1.0, 'warm_up': 0},
    )  # fmt: skip
    assert gates(net) == ['layers.0.0', 'layers.1.0']
    optimizer = optimizer_of(net, method)
    method.attach(net, optimizer, 1.0)
    net(images(2, 8)).square().mean().backward()
    optimizer.step()
    assert all(p.grad.abs().max() > 0 for n, p in net.named_parameters() if n.endswith('gate.first'))


# ----------------------------------------------------------------------------------------------------------------- cost


def test_cost_counts_the_gates_in_use_and_states_their_macs():
    plan = plan_of(tiny(), 'ddtb', 2, options={'dynamic_ratio': 0.5})
    net, _, _ = started()
    plain = started(options={'dynamic_ratio': 0.0})[0]
    one = -(-32 * 4 // 4) + -(-2 * 32 // 4) + 4 * 4 * 32  # 2-bit weights of 4 -> 32 -> 2, BatchNorm in float32
    assert trace(net).range_bytes == trace(plain).range_bytes + 2 * one
    found, without = (cost(n, plan, scale=1, output_size=(32, 32)) for n in (net, plain))
    assert (found.macs, found.bitops, found.fab) == (without.macs, without.bitops, 2.0)
    assert found.weight_bytes == without.weight_bytes + 2 * one
    note = 'quantizers spend 384 more MACs on the ranges of each image, which no number holds'
    assert found.notes == (*without.notes, note)
    assert all(layer.type.endswith('Conv2d') for layer in trace(net).layers) and not trace(net).unused


# -------------------------------------------------------------------------------------------------------------- options


def test_defaults_are_the_published_ones():
    options = METHODS['ddtb'].Options()
    assert (options.dynamic_ratio, options.warm_up, options.gate_weight) == (0.3, 4000, 1.0)
    assert (options.init, options.percentile, options.range_lr) == ('percentile', 99.0, 5.0)


@pytest.mark.parametrize(
    ('block', 'said'),
    [
        ({'ddtb': {'dynamic_ratio': 1.5}}, 'quant.ddtb.dynamic_ratio: 1.5 given, a number from 0 to 1 needed'),
        ({'ddtb': {'warm_up': -1}}, 'quant.ddtb.warm_up: -1 given'),
        ({'ddtb': {'gate': 'cosine'}}, 'quant.ddtb.gate is not an option'),
        ({'zero_point': 'float'}, "quant.zero_point: 'float' given, allowed with method 'ddtb': integer"),
        ({'reference_compat': True}, 'quant.reference_compat: true given'),
    ],
)
def test_what_it_cannot_do_is_refused(block, said):
    with pytest.raises(QuantError) as refused:
        read_config({'method': 'ddtb', **block})
    assert str(refused.value).startswith(said)


def test_without_gates_it_is_static_and_uses_every_parameter():
    ratios = {0.0: (True, False), 0.3: (False, True)}
    for ratio, wanted in ratios.items():
        method = method_of(plan_of(tiny(), 'ddtb', 2, options={'dynamic_ratio': ratio}))
        assert (method.is_static, method.leaves_parameters_unused) == wanted
