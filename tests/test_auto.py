"""``auto``: bits of layers, compensated rounding, and what a budget does."""

from __future__ import annotations

import copy
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from helpers import images
from torch import nn

from basicsr_quant.methods import method_of, quantize, settings_of
from basicsr_quant.network.bit_allocation import allocate_bits
from basicsr_quant.network.input_moments import columns, input_moments, moment_groups
from basicsr_quant.network.planning import PlanRequest, make_plan
from basicsr_quant.network.stages import Stages
from basicsr_quant.network.surgery import floating_point, plan_in_force, quant_layers
from basicsr_quant.quantizers.compensated_rounding import InputMoments, compensate_input, damped, round_compensated

BATCHES = [images(1, seed=s) for s in range(12)]


class Net(nn.Module):
    """Layers of every kind that the rounding knows: biases or none, groups, stride, dilation, padding, linear."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(5)
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.layers = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=2, dilation=2, bias=False),
            nn.Conv2d(8, 8, 3, padding=1, groups=4), nn.ReLU(),
            nn.Conv2d(8, 8, 3, padding=1, padding_mode='reflect'),
        )  # fmt: skip
        self.mix = nn.Linear(8, 8)
        self.last = nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x):
        x = self.layers(self.first(x))
        x = self.mix(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.last(x)


def auto(bits=4, batches=BATCHES, stages=None, w_bits=None, **options):
    net = Net()
    settings = settings_of('auto', options=options or None)
    plan = make_plan(net, PlanRequest('auto', w_bits or bits, bits, 'body', {}, settings))
    quantize(net, plan)
    seen = method_of(plan).calibrate(net, batches, stages)
    return net.eval(), plan, seen


def output_error(net, batches=BATCHES):
    with torch.no_grad():
        total = 0.0
        for batch in batches:
            q = net(batch)
            with floating_point(net):
                total += float((q - Net().eval()(batch)).square().mean())
    return total / len(batches)


# ------------------------------------------------------------------------------------------------------ rounding


def moments_of(x, q):
    return InputMoments.of(x[None], q[None])


def correlated(k, count=400, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(k, k, generator=g).double() @ torch.randn(k, count, generator=g).double() + 1.0


def to_grid(column):
    return column.round().clamp(-3, 3)


def test_moments_of_parts_add_up():
    x, q = correlated(5), correlated(5, seed=1)
    parts = InputMoments.of(x[None, :, :100], q[None, :, :100])
    parts.add(x[None, :, 100:], q[None, :, 100:])
    for centred in (True, False):
        for a, b in zip(parts.covariances(centred), moments_of(x, q).covariances(centred)):
            torch.testing.assert_close(a, b)
    both = torch.cov(torch.cat([x, q]), correction=0)
    xq, qq = moments_of(x, q).covariances(centred=True)
    torch.testing.assert_close(xq[0], both[:5, 5:])
    torch.testing.assert_close(qq[0], both[5:, 5:])


def test_compensated_weight_is_the_least_squares_solution():
    x = correlated(6)
    q = (x / 2).round() * 2
    weight = torch.randn(1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    xq, qq = moments_of(x, q).covariances(centred=False)
    found = compensate_input(weight, xq, qq, damping=1e-9)
    wanted = torch.linalg.lstsq(q.T, (weight[0] @ x).T).solution.T
    torch.testing.assert_close(found[0], wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(compensate_input(weight, qq, qq), weight)  # inputs that are not quantized ask for nothing


def test_compensated_rounding_is_near_the_best_of_all_and_ahead_of_plain_rounding():
    every = torch.tensor(list(itertools.product(range(-3, 4), repeat=4)), dtype=torch.float64)
    best, found, plain = 0.0, 0.0, 0.0
    for seed in range(30):
        x = correlated(4, seed=seed)
        qq = (x @ x.T / x.shape[1])[None]
        weight = torch.randn(1, 1, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

        def errors(w, weight=weight, qq=qq):
            return ((w - weight[0]) @ qq[0] * (w - weight[0])).sum(1)

        rounded = round_compensated(weight, qq, to_grid, damping=1e-6)
        assert torch.equal(rounded, to_grid(rounded))
        least = float(errors(every).min())
        assert float(errors(rounded[0])) >= least - 1e-12
        best, found, plain = best + least, found + float(errors(rounded[0])), plain + float(errors(to_grid(weight[0])))
    assert found < 0.8 * plain and found < 2.5 * best  # greedy: near the best in the mean, not ahead every time


@pytest.mark.parametrize('seed', range(3))
def test_compensation_gains_more_where_more_columns_go_together(seed):
    x = correlated(48, seed=seed)
    qq = (x @ x.T / x.shape[1])[None]
    weight = 0.7 * torch.randn(1, 6, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    found, plain = (float((d @ qq[0] * d).sum()) for d in (
        round_compensated(weight, qq, to_grid)[0] - weight[0], (to_grid(weight) - weight)[0]
    ))  # fmt: skip
    assert found < 0.5 * plain


def test_uncorrelated_inputs_leave_nothing_to_compensate():
    weight = torch.randn(2, 3, 5)
    assert torch.equal(round_compensated(weight, torch.eye(5).expand(2, 5, 5), to_grid), to_grid(weight))


def test_a_dead_input_is_harmless():
    x = correlated(4)
    x[2] = 0
    _, qq = moments_of(x, x).covariances(centred=True)
    assert round_compensated(torch.randn(1, 3, 4, dtype=torch.float64), qq, to_grid).isfinite().all()
    zero = torch.zeros(1, 4, 4)
    assert torch.equal(damped(zero, 0.01)[0], torch.eye(4))


# ---------------------------------------------------------------------------------------------------- the inputs


@pytest.mark.parametrize(
    'layer',
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0)),
        nn.Conv2d(4, 6, 3, dilation=2, padding='same'),
        nn.Conv2d(4, 8, 3, groups=2),
        nn.Conv2d(4, 4, 5, groups=4, padding=2, padding_mode='circular'),
        nn.Linear(9, 5),
    ],
    ids=lambda layer: layer.extra_repr(),
)
def test_columns_are_what_the_layer_multiplies(layer):
    x = torch.randn(2, 4, 8, 9, dtype=torch.float64)
    layer = layer.double()
    (found,) = columns(layer, [x], 4000, torch.Generator().manual_seed(0))
    groups = found.shape[0]
    weight = layer.weight.reshape(groups, -1, found.shape[1])
    outputs = (weight @ found).reshape(layer.weight.shape[0], -1)
    plain = layer(x) - layer.bias.reshape(-1, *([1, 1] if x.dim() == 4 and not isinstance(layer, nn.Linear) else []))
    every = plain.reshape(-1, plain.shape[-1]).T if isinstance(layer, nn.Linear) else plain.transpose(0, 1).flatten(1)
    # every sampled output is one of the layer's, and so many draws leave out next to none
    near = torch.cdist(outputs.T.contiguous(), every.T.contiguous())
    assert near.min(1).values.max() < 1e-6
    assert (near.min(0).values < 1e-6).double().mean() > 0.9


def test_layers_share_a_pass_as_long_as_their_moments_fit(monkeypatch):
    net, _, _ = auto(rounds=1)
    names = list(quant_layers(net))
    assert moment_groups(net, names) == [names]
    monkeypatch.setattr('basicsr_quant.network.input_moments._BYTES_AT_ONCE', 8 * 72**2 * 2)
    assert [len(g) for g in moment_groups(net, names)] == [2, 3]
    every = input_moments(net, names, BATCHES, len(BATCHES))
    assert {n: tuple(m.qq.shape) for n, m in every.items()} == {
        'layers.0': (1, 72, 72), 'layers.2': (1, 72, 72), 'layers.3': (4, 18, 18), 'layers.5': (1, 72, 72),
        'mix': (1, 8, 8),
    }  # fmt: skip
    assert all(m.count >= 1 << 14 for m in every.values())


# ---------------------------------------------------------------------------------------------------------- bits


def convex(seed, layers=5, bits=range(2, 7)):
    g = torch.Generator().manual_seed(seed)
    return {f'l{i}': {b: s * 4.0**-b for b in bits}
            for i, s in enumerate((torch.rand(layers, generator=g) * 100).tolist())}  # fmt: skip


@pytest.mark.parametrize('seed', range(4))
@pytest.mark.parametrize('mean', [2, 3, 4.4])
def test_allocation_is_the_best_under_the_mean(seed, mean):
    errors = convex(seed)
    found = allocate_bits(errors, mean, dict.fromkeys(errors, 1.0))
    assert sum(found.values()) <= mean * len(errors)
    best = min(
        sum(errors[n][b] for n, b in zip(errors, choice))
        for choice in itertools.product(range(2, 7), repeat=len(errors))
        if sum(choice) <= mean * len(errors)
    )
    assert sum(errors[n][b] for n, b in found.items()) == pytest.approx(best)


def test_dear_layers_pay_for_their_bits():
    errors = {'small': {3: 8.0, 4: 2.0, 5: 0.5}, 'large': {3: 8.0, 4: 2.0, 5: 0.5}}
    found = allocate_bits(errors, 4, {'small': 1.0, 'large': 10.0})
    assert found == {'small': 4, 'large': 4}  # a fifth bit for the small one takes the large one's fourth
    assert allocate_bits({'a': {3: 1.0, 4: 1.0}}, 4, {'a': 1.0}) == {'a': 3}  # a bit without use is not given


# ----------------------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize('granularity', ['channel', 'tensor'])
@pytest.mark.parametrize('bits', [2, 3, 4, 8])
def test_every_stage_brings_the_output_nearer(bits, granularity):
    plain, _, _ = auto(bits, a_granularity=granularity, mixed_bits=False, compensate=False)
    net, _, seen = auto(bits, a_granularity=granularity)
    errors = seen.choices['output_mse']
    assert next(iter(errors)) == 'ranges' and 'rounding 1' in errors
    assert output_error(net) < output_error(plain)
    inputs = [layer.input_quantizer for layer in quant_layers(net).values()]
    assert {layer.weight_quantizer.num_bits for layer in quant_layers(net).values()} == {bits}
    if granularity == 'tensor':
        assert all(q.unit.shape == () for q in inputs)
    else:
        assert [tuple(q.unit.shape) for q in inputs] == [(1, 8, 1, 1)] * 4 + [(8,)]


def test_the_mean_of_the_bits_by_macs_is_kept():
    net, plan, seen = auto(3)
    from basicsr_quant.cost import cost

    assert len(set(seen.choices['a_bits'].values())) > 1
    found = cost(net, plan_in_force(net, plan), scale=1, output_size=(32, 32))
    assert found.fab_mac is not None and found.fab_mac <= 3 + 1e-9


def test_weights_lie_on_their_grids_and_the_file_is_an_ordinary_one():
    net, plan, _ = auto(4)
    for layer in quant_layers(net).values():
        torch.testing.assert_close(layer.weight_quantizer(layer.weight), layer.weight, rtol=0, atol=1e-6)
    other = quantize(Net(), plan).eval()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(BATCHES[0]), net(BATCHES[0]))  # with the bits that were chosen
    assert plan_in_force(other, plan) == plan_in_force(net, plan) != plan


def test_the_same_images_give_the_same_network():
    a, b = auto(4)[0].state_dict(), auto(4)[0].state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_stage_that_makes_it_worse_is_taken_back(monkeypatch):
    plain, _, _ = auto(4, mixed_bits=False, compensate=False)
    where = 'basicsr_quant.methods.auto_search'
    monkeypatch.setattr(f'{where}.round_compensated', lambda target, *_: torch.zeros_like(target))
    monkeypatch.setattr(f'{where}.allocate_bits', lambda errors, *_: {n: min(e) for n, e in errors.items()})
    net, _, seen = auto(4)
    a, b = net.state_dict(), plain.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert seen.choices['output_mse']['rounding 1'] > seen.choices['output_mse']['ranges']


@pytest.mark.parametrize('bits, first', [(2, 'ranges'), (4, 'ranges'), (6, 'widest ranges'), (8, 'widest ranges')])
def test_a_budget_that_is_too_short_leaves_stages_out_and_says_which(bits, first, monkeypatch):
    clock = itertools.count(0, 0.2)
    monkeypatch.setattr('basicsr_quant.methods.auto_search.time.perf_counter', lambda: next(clock))
    _, _, seen = auto(bits, budget=1.0)
    ranges = {'ranges', 'wider ranges', 'widest ranges'} - {first}
    bits_stage = {'bits of each layer'} if 2 < bits < 8 else set()
    assert set(seen.choices['left_out']) == ranges | bits_stage | {'images', 'rounding 1'}
    assert list(seen.choices['output_mse']) == seen.choices['kept'] == [first]


def test_ranges_may_go_to_the_extremes(monkeypatch):
    net, _, seen = auto(8, mixed_bits=False, compensate=False)
    errors = seen.choices['output_mse']
    assert list(errors) == ['ranges', 'wider ranges', 'widest ranges']
    (kept,) = seen.choices['kept']
    torch.testing.assert_close(errors[kept], output_error(net, BATCHES[:8]))
    monkeypatch.setattr('basicsr_quant.methods.auto_search._WIDENINGS', {'ranges': 1.0})
    net, _, _ = auto(8, mixed_bits=False, compensate=False)
    with torch.no_grad():
        x = Net().first(torch.cat(BATCHES))
    found = net.layers[0].input_quantizer.bounds(x)
    wanted = [f(x).reshape(1, 8, 1, 1) for f in (lambda x: x.amin((0, 2, 3)), lambda x: x.amax((0, 2, 3)))]
    torch.testing.assert_close([b.detach() for b in found], wanted)


def test_a_few_images_serve_for_everything():
    net, _, seen = auto(4, batches=BATCHES[:1])
    assert seen.images == 1 and output_error(net, BATCHES[:1]) < 1.0
    assert 'rounding 1' in {**seen.choices['output_mse'], **seen.choices['left_out']}


def test_stages_are_named():
    stages = Stages()
    auto(4, stages=stages)
    assert list(stages.seconds) == [
        'observing activations', 'setting ranges', 'judging', 'weighing layers', 'measuring inputs', 'rounding weights'
    ]  # fmt: skip


def test_a_copy_keeps_the_bits():
    net, plan, _ = auto(3)
    assert plan_in_force(copy.deepcopy(net), plan) == plan_in_force(net, plan)


def test_depthwise_rounding_keeps_each_group_apart():
    x, weight = torch.randn(1, 4, 6, 6), torch.randn(4, 1, 3, 3)
    layer = nn.Conv2d(4, 4, 3, groups=4, bias=False)
    layer.weight.data = weight
    (cols,) = columns(layer, [x], 50, torch.Generator().manual_seed(1))
    assert cols.shape == (4, 9, 50)
    assert F.conv2d(x, weight, groups=4).shape[1] == (weight.reshape(4, 1, 9) @ cols).shape[0]


def test_json_holds_the_choices():
    _, _, seen = auto(4)
    assert json.loads(json.dumps(seen.choices)) == seen.choices | {'a_bits': seen.choices['a_bits']}
