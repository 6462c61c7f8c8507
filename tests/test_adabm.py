"""AdaBM: mappings and their gradients, published numbers, calibration, fine-tuning, and the plain form of its step."""

from __future__ import annotations

import copy
import importlib.util
import itertools
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import BODY, Tiny, assert_close, images, plan_of, quantized, reference, tiny
from torch import nn
from torch.nn import functional

from basicsr_quant.config import read_config
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import method_of, quantize, settings_of
from basicsr_quant.methods.adabm_tuning import GROUPS, Tuner, Tuning
from basicsr_quant.network.bit_allocation import allocate_bits
from basicsr_quant.network.plan import LayerPlan, Plan
from basicsr_quant.network.scope import block_names
from basicsr_quant.network.sensitivity import output_errors
from basicsr_quant.network.surgery import floating_point, quant_layers
from basicsr_quant.network.teacher import Teacher, batches_of, feature_distance, spread, unit_rows
from basicsr_quant.network.trace import trace
from basicsr_quant.quantizers import (
    AdaptiveRange,
    ImageBits,
    LearnedRange,
    QuantContext,
    complexity,
    fake_quantize,
    search_omse_bound,
)

SECONDS = [n for n in BODY if n.endswith('conv2')]


def calibration(count: int = 6, size: int = 16) -> list[Any]:
    """Images of differing detail."""
    return [functional.avg_pool2d(images(1, size, seed=i), 2 * (i % 2) + 1, 1, i % 2) for i in range(count)]


def calibrated(epochs: int = 0, **options: Any) -> tuple[Tiny, Any, Any]:
    settings = {key: options.pop(key) for key in ('scope', 'layers', 'reference_compat') if key in options}
    net = quantized('adabm', 4, options={'epochs': epochs, **options}, **settings)
    method = method_of(plan_of(tiny(), 'adabm', 4, SECONDS, options={'epochs': epochs, **options}, **settings))
    return net, method, method.calibrate(net, calibration())


# ---------------------------------------------------------------------------------------------------- complexity, b_I


def test_complexity_is_the_mean_magnitude_of_normalized_sobel():
    x = images(3, 9)
    gray = (x * torch.tensor([0.299, 0.587, 0.114]).reshape(3, 1, 1)).sum(1, keepdim=True)
    kernel = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]) / 8
    both = torch.stack([kernel, kernel.T])[:, None]
    wanted = 1e3 * functional.conv2d(functional.pad(gray, (1, 1, 1, 1), mode='replicate'), both).abs().mean((1, 2, 3))
    assert_close(complexity(x), wanted)
    assert_close(complexity(x[:, :1]), complexity(x[:, :1].expand(-1, 3, -1, -1)))
    assert_close(complexity(torch.full((2, 3, 5, 5), 0.7)), torch.zeros(2), atol=1e-4)


def test_complexity_of_a_clip_is_the_mean_of_its_frames():
    clips = images(6, 8).reshape(2, 3, 3, 8, 8)
    assert_close(complexity(clips), torch.stack([complexity(clip).mean() for clip in clips]))


def mapping(lower: float = 10.0, upper: float = 20.0) -> ImageBits:
    found = ImageBits()
    found.set_thresholds(torch.tensor(lower), torch.tensor(upper))
    return found


def test_image_bits_are_steps_with_the_gradient_of_tanh():
    bits = mapping().requires_grad_(True)
    c = torch.tensor([3.0, 10.0, 15.0, 20.0, 31.0])
    found = bits.from_complexity(c)
    assert found.tolist() == [-1, 0, 0, 0, 1]
    found.sum().backward()
    low, high = (torch.tensor(v, requires_grad=True) for v in (10.0, 20.0))
    torch.tanh((c - (high + low) / 2) * 2 / (high - low)).sum().backward()
    assert_close([bits.lower.grad, bits.upper.grad], [low.grad, high.grad])


def test_thresholds_never_cross_and_are_closed_to_gradients_at_first():
    bits = mapping(30.0, 20.0)
    assert bits.upper > bits.lower == 30.0
    assert not any(p.requires_grad for p in bits.parameters())
    assert ImageBits()(images(4)).tolist() == [0, 0, 0, 0]  # before calibration


# ------------------------------------------------------------------------------------------------------- the quantizer


def in_context(quantizer: AdaptiveRange, batch: Any, found: ImageBits | None = None) -> AdaptiveRange:
    quantizer.context = QuantContext()
    quantizer.context.measures = {'image_bits': found or mapping(0.0, 1e3)}
    quantizer.context.begin(batch)
    return quantizer


@pytest.mark.parametrize(
    ('factor', 'layer'), [(-3.0, -1), (-0.51, -1), (-0.5, 0), (0.2, 0), (0.5, 0), (0.7, 1), (9.0, 1)]
)
@pytest.mark.parametrize('base', [2, 4, 8])
def test_bits_are_base_image_and_layer(factor, layer, base):
    found = []
    for limited in (True, False):
        quantizer = in_context(AdaptiveRange(base, 'x', limited), images(3), mapping(0.0, 0.0))
        quantizer.layer_factor.data.fill_(factor)
        x = torch.randn(3, 2, 4, 4)
        y = quantizer(x)
        found.append(quantizer.context.bits['x'].tolist())
    wanted = base + layer + 1
    assert found == [[min(8, max(2, wanted))] * 3, [wanted] * 3]
    quantizer.limited = True
    assert_close(quantizer(x), fake_quantize(x, *quantizer.bounds(x), min(8, max(2, wanted))), rtol=1e-4, atol=1e-5)
    assert y.shape == x.shape


def test_each_image_has_its_own_bits_also_in_several_parts():
    x = torch.randn(2, 3, 8, 8)
    detail = images(2, 8)
    detail[0] = 0.5
    quantizer = in_context(AdaptiveRange(4, 'x'), detail, mapping(1.0, 2.0))
    both = quantizer(x)
    assert quantizer.context.bits['x'].tolist() == [3, 5]
    for i, bits in enumerate((3, 5)):
        assert_close(both[i], fake_quantize(x[i], *quantizer.bounds(x), bits))
    windows = x.reshape(6, 8, 8)  # three windows of each image, (windows, tokens, channels)
    assert_close(quantizer(windows).reshape(x.shape), both)
    with pytest.raises(RuntimeError, match='2 images do not divide'):
        quantizer(x.reshape(3, 2, 8, 8))


def test_gradient_reaches_the_mappings_through_the_bits():
    batch, x = images(2), torch.randn(2, 3, 4, 4)
    found = mapping(5.0, 400.0).requires_grad_(True)
    quantizer = in_context(AdaptiveRange(4, 'x'), batch, found)
    quantizer.layer_factor.requires_grad_(True).data.fill_(0.3)
    weights = torch.randn(x.shape)
    (quantizer(x) * weights).sum().backward()
    bits = torch.full((2, 1, 1, 1), 4.0, requires_grad=True)
    (fake_quantize(x, *quantizer.bounds(x), bits) * weights).sum().backward()
    assert_close(quantizer.layer_factor.grad, bits.grad.sum() * (1 - math.tanh(0.3) ** 2), rtol=1e-4)
    c = complexity(batch)
    slope = 1 - torch.tanh((c - 202.5) / 197.5) ** 2
    by_upper = slope * (-0.5 / 197.5 - (c - 202.5) * 0.5 / 197.5**2)
    assert_close(found.upper.grad, (bits.grad.reshape(-1) * by_upper).sum(), rtol=1e-4)


@pytest.mark.parametrize('narrow', [False, True])
@pytest.mark.parametrize('shape', [(), (3, 1, 1, 1)], ids=['one range', 'range per sample'])
def test_bits_per_sample_take_a_fast_path_that_equals_the_plain_one(shape, narrow, monkeypatch):
    module = importlib.import_module('basicsr_quant.quantizers.fake_quantize')
    draw = torch.Generator().manual_seed(0)
    x, weights = torch.randn(2, 3, 4, 5, 6, generator=draw).unbind()
    given = [x, torch.full(shape, -0.8), torch.full(shape, 1.3), torch.tensor([2.0, 4.0, 6.0]).reshape(3, 1, 1, 1)]
    assert module._is_sample_case(x, torch.zeros(()), torch.ones(()), torch.ones(1, 1, 1, 1))
    assert module._is_sample_case(*given) and not module._is_sample_case(x, *given[1:3], given[3][:2])
    results = []
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(module, '_is_sample_case', lambda *_: False)
        leaves = [t.clone().requires_grad_() for t in given]
        y = fake_quantize(*leaves, narrow_range=narrow)
        (y * weights).sum().backward()
        results.append([y, *(t.grad for t in leaves)])
    for ours, plain in zip(*results):
        assert_close(ours, plain, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------ the published numbers


class Probe(nn.Module):
    """The layer that the published modules were probed with."""

    def __init__(self, weight: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(16, 8, 3, padding=1, bias=False)
        self.conv.weight.data.copy_(torch.as_tensor(weight))

    def forward(self, x: Any) -> Any:
        return self.conv(x)


@pytest.mark.parametrize('compat', [True, False])
def test_published_numbers(compat):
    numbers = reference()
    x = torch.as_tensor(numbers['x'])
    settings = settings_of('adabm', reference_compat=compat, options={'epochs': 0, 'batch': 3, 'clip_blend': 0.5})
    plan = Plan('adabm', (LayerPlan('conv', 'Conv2d', 4, 4, why="layers: 'conv'"),), settings)
    net = quantize(Probe(numbers['w']), plan)
    method = method_of(plan)
    ranges = []
    start = method.start_input
    method.start_input = lambda q, o: (start(q, o), ranges.extend(q.bounds(x)))
    method.calibrate(net, [x, 0.7 * x, 1.3 * x])
    bound = net.conv.weight_quantizer.bounds(x)[1]
    found = [*ranges, bound], [*net.conv.input_quantizer.bounds(x)], net(x)
    same = [np.allclose(torch.stack(list(f)).detach(), numbers[f'adabm_a4_{k}'], rtol=1e-5, atol=2e-5)
            for f, k in zip(found, ('range', 'bac', 'y'))]  # fmt: skip
    # Without the published faults: weights start from the longer tail, clipping sees the ranges of all the images.
    assert same == ([True] * 3 if compat else [False, False, False])


def test_weights_start_from_the_longer_tail():
    rows = torch.tensor([[-1.0, 0.1, 0.2, -0.9, 0.05]])
    best = search_omse_bound(rows, 4)
    candidates = [1 - 0.01 * i for i in range(50)]
    errors = [float((fake_quantize(rows, *(torch.tensor(s * c) for s in (-1, 1)), 4) - rows).square().mean())
              for c in candidates]  # fmt: skip
    assert_close(best, [candidates[int(np.argmin(errors))]])
    assert search_omse_bound(rows, 4, start=rows.amax(dim=1)) <= 0.2


# --------------------------------------------------------------------------------------------------------- calibration


def test_calibration_sets_thresholds_and_layers_by_percentiles():
    net, _, seen = calibrated()
    c = torch.cat([complexity(i) for i in calibration()])
    found = net.get_submodule('quant_measures.image_bits')
    assert_close([found.lower, found.upper], [c.quantile(0.1), c.quantile(0.9)], rtol=1e-4)
    stds = {}
    with torch.no_grad(), floating_point(net):
        for name in BODY:
            net.get_submodule(name).register_forward_hook(
                lambda m, i, o, n=name: stds.setdefault(n, []).append(i[0].std()))
        for image in calibration():
            net(image)
    s = torch.stack([torch.stack(stds[n]).mean() for n in BODY])
    wanted = (s > s.quantile(0.7)).int() - (s < s.quantile(0.3)).int()
    assert list(seen.choices['layer_bits'].values()) == wanted.tolist() and set(wanted.tolist()) == {-1, 0, 1}
    assert seen.choices['mean_bits'] == pytest.approx(4 + float((mapping_bits(net, c)).mean()) + wanted.float().mean())


def mapping_bits(net: Any, c: Any) -> Any:
    return net.get_submodule('quant_measures.image_bits').from_complexity(c)


def test_later_images_move_thresholds_by_a_tenth():
    _, method, _ = calibrated()
    first, second = [float(i) for i in range(1, 17)], [100.0] * 16
    low, high = method._thresholds(first + second)
    assert_close([low, high], [0.9 * 2.5 + 10, 0.9 * 14.5 + 10])


@pytest.mark.parametrize('schedule', ['published', 'fast'])
def test_calibration_is_deterministic_and_leaves_the_network_alone(schedule):
    states = []
    for _ in range(2):
        net, _, _ = calibrated(1, schedule=schedule)
        states.append(net.state_dict())
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    original = tiny().state_dict()
    assert all(torch.equal(states[0][k], v) for k, v in original.items())
    assert net.training and all(p.grad is None for p in net.parameters())
    learns = {n.rpartition('.')[2] for n, p in net.named_parameters() if not p.requires_grad}
    assert learns == {'layer_factor', 'lower', 'upper'} & learns and 'layer_factor' in learns
    assert all(p.requires_grad for n, p in net.named_parameters() if n.endswith(('weight', 'bias', 'alpha')))


@pytest.mark.parametrize('batches', [[], ()])
def test_no_images_are_refused(batches):
    net = quantized('adabm')
    with pytest.raises(QuantError, match='gave no image'):
        method_of(plan_of(tiny(), 'adabm')).calibrate(net, batches)


def test_images_of_many_sizes():
    net = quantized('adabm', options={'epochs': 3})
    sizes = [8, 12, 8, 8, 12, 16, 8]
    seen = method_of(plan_of(tiny(), 'adabm', options={'epochs': 3})).calibrate(
        net, [images(1, s, seed=i) for i, s in enumerate(sizes)]
    )
    assert seen.images == 7
    assert all(q.isfinite().all() for q in net.state_dict().values())


@pytest.mark.parametrize(
    ('settings', 'adaptive', 'fixed'),
    [
        ({}, BODY, {}),
        ({'scope': 'all'}, BODY, {'first': 8, 'last': 8}),
        ({'layers': {'body.0.*': None}}, BODY[2:], {'body.0.conv1': 6, 'body.0.conv2': 6}),
    ],
    ids=['partly', 'fully', 'rule'],
)
def test_ends_and_rules_keep_their_bits(settings, adaptive, fixed):
    from basicsr_quant.network.planning import LayerRule

    settings = {k: {g: LayerRule(4, 6) for g in v} if k == 'layers' else v for k, v in settings.items()}
    net, _, seen = calibrated(3, **settings)
    inputs = {n: layer.input_quantizer for n, layer in quant_layers(net).items()}
    assert [n for n, q in inputs.items() if isinstance(q, AdaptiveRange)] == adaptive
    assert {n: q.num_bits for n, q in inputs.items() if type(q) is LearnedRange} == fixed
    assert list(seen.choices['layer_bits']) == adaptive
    net(images(2))
    assert set(net._quant_context.bits) == set(adaptive)


def test_without_adaptive_layers_nothing_is_mapped():
    from basicsr_quant.network.planning import LayerRule

    net, _, seen = calibrated(3, layers={'body.*': LayerRule(4, 4)})
    assert not hasattr(net, 'quant_measures') and seen.choices == {}
    assert net(images(1)).isfinite().all()


# ---------------------------------------------------------------------------------------------- state, copies, training


def test_without_image_bits_layers_alone_decide():
    net, _, seen = calibrated(3, image_bits=False)
    assert not hasattr(net, 'quant_measures') and 'image_thresholds' not in seen.choices
    net(images(2))
    chosen = {name: 4.0 + bits for name, bits in seen.choices['layer_bits'].items()}
    assert {name: float(bits) for name, bits in net._quant_context.bits.items()} == chosen


def test_thresholds_are_saved_once_and_come_back():
    net, _, _ = calibrated(3)
    state = net.state_dict()
    assert [k for k in state if 'quant_measures' in k] == [f'quant_measures.image_bits.{b}' for b in ('lower', 'upper')]
    other = quantized('adabm')
    other.load_state_dict(copy.deepcopy(state))
    assert torch.equal(net(images(2)), other(images(2)))


def test_a_copy_measures_with_its_own_thresholds():
    net, _, _ = calibrated()
    twin = copy.deepcopy(net)
    for m, n in ((net, 1e3), (twin, -1.0)):
        m.get_submodule('quant_measures.image_bits').set_thresholds(torch.tensor(-2.0), torch.tensor(n))
    net(images(1)), twin(images(1))
    differ = [float(twin._quant_context.bits[n] - net._quant_context.bits[n]) for n in BODY]
    assert differ == [1.0] * 4


def test_the_image_is_measured_once_a_pass(monkeypatch):
    net, _, _ = calibrated()
    calls = []
    forward = ImageBits.forward
    monkeypatch.setattr(ImageBits, 'forward', lambda self, x: calls.append(1) or forward(self, x))
    net(images(2))
    assert len(calls) == 1
    with floating_point(net):
        net(images(2))
    assert len(calls) == 1


def test_trace_sees_no_layer_in_the_mapping():
    net, _, _ = calibrated()
    found, plain = trace(net), trace(tiny())
    assert [x.name for x in found.layers] == [x.name for x in plain.layers] and found.macs == plain.macs
    assert found.parameter_bytes == plain.parameter_bytes


def test_training_learns_ranges_and_keeps_the_mappings():
    net, method, _ = calibrated()
    groups = method.parameter_groups(net, [p for p in net.parameters() if p.requires_grad], 1e-3)
    optimizer = torch.optim.Adam(groups, lr=1e-3)
    method.attach(net, optimizer, 1.0)
    before = copy.deepcopy(net.state_dict())
    for _ in range(2):
        optimizer.zero_grad()
        net(images(2)).square().mean().backward()
        optimizer.step()
    moved = {k.split('.', 3)[-1] for k, v in net.state_dict().items() if not torch.equal(v, before[k])}
    assert {'input_quantizer.lower', 'input_quantizer.upper', 'weight_quantizer.alpha', 'weight'} <= moved
    assert not any('layer_factor' in k or 'image_bits' in k for k in moved)


# -------------------------------------------------------------------------------------------------------- fine-tuning


def taught(net: Any, count: int = 6, features: bool = True) -> Teacher:
    teacher = Teacher(net, features)
    with teacher.recording(), floating_point(net), torch.no_grad():
        for batch in batches_of(calibration(count), 4):
            net(batch)
    return teacher


KINDS = {'weight ranges': 'alpha', 'activation ranges': 'input_quantizer.', 'bit mappings': ('factor', 'image_bits')}


@pytest.mark.parametrize('name', GROUPS)
def test_one_group_learns_at_a_time(name):
    net, _, _ = calibrated()
    for layer in quant_layers(net).values():
        layer.input_quantizer.layer_factor.data.fill_(1.0)  # too many bits, so that the bit loss is felt
    before = copy.deepcopy(net.state_dict())
    Tuner(net, taught(net), Tuning(cycle=((name,),), epochs=1)).run(_stages())
    moved = [k for k, v in net.state_dict().items() if not torch.equal(v, before[k])]
    kinds = KINDS[name]
    assert moved and all(any(kind in k for kind in ([kinds] if isinstance(kinds, str) else kinds)) for k in moved)
    assert ('layer_factor' in ' '.join(moved)) == (name == 'bit mappings')


def _stages() -> Any:
    from basicsr_quant.network.stages import Stages

    return Stages()


def test_ten_epochs_are_four_three_three_with_rates_that_decay():
    net, method, _ = calibrated()
    tuner = Tuner(net, taught(net), method._tuning().__class__(epochs=10))
    learned = []
    tuner.step = lambda indices, names, seen: learned.append((names[0], len(indices)))
    tuner.run(_stages())
    assert [name for name, _ in learned[::3]] == [GROUPS[e % 3] for e in range(10)]
    assert all(size == 2 for _, size in learned) and len(learned) == 30
    rates = [tuner.optimizers[n].param_groups[0]['lr'] for n in GROUPS]
    wanted = [0.01 * 0.9**4, 0.01 * 0.9**3, 0.01 * 0.9**3]
    assert rates == pytest.approx(wanted)


def test_published_rates_are_absolute_under_reference_compat():
    net, method, _ = calibrated(reference_compat=True)
    tuner = Tuner(net, taught(net), method._tuning())
    before = [b.detach() for q in tuner.ranges for b in q.bounds(images())]
    with tuner.learning(GROUPS[:2]) as step:
        step([0, 1])
    after = [b.detach() for q in tuner.ranges for b in q.bounds(images())]
    moved = [float((b - a).abs().max()) for a, b in zip(before, after)]
    assert moved == pytest.approx([0.01] * len(moved), rel=1e-2)  # the first step of Adam is its learning rate


def test_tuning_brings_the_output_nearer():
    net, _, _ = calibrated(image_percentile=0)
    for layer in quant_layers(net).values():  # ranges twice as wide as they were
        lower, upper = layer.input_quantizer.bounds(layer.weight)
        layer.input_quantizer.set_range(2 * lower.detach(), 2 * upper.detach())
    errors = []
    for _ in range(2):
        with torch.no_grad():
            errors.append(float(sum((net(i) - tiny()(i)).abs().mean() for i in calibration())))
        Tuner(net, taught(net), Tuning(cycle=(GROUPS[:2],), epochs=10, rates=(0.003, 0.02, 0.0, 0.0))).run(_stages())
    assert errors[1] < 0.8 * errors[0]


def test_only_bits_above_the_base_cost():
    net, _, _ = calibrated()
    tuner = Tuner(net, taught(net), Tuning())
    for factor, excess in ((1.0, 1.0), (0.0, 0.0), (-1.0, 0.0)):
        mapping_of = net.get_submodule('quant_measures.image_bits')
        mapping_of.set_thresholds(torch.tensor(-1.0), torch.tensor(1e4))
        for q in tuner.adaptive:
            q.layer_factor.data.fill_(factor)
        net(images(2))
        assert float(tuner.excess_bits()) == excess


@pytest.mark.parametrize(('angle', 'distance'), [(0.0, 0.0), (90.0, math.sqrt(2)), (180.0, 2.0), (60.0, 1.0)])
def test_feature_distance_is_that_of_directions(angle, distance):
    a = math.radians(angle)
    ours = torch.tensor([[3.0, 0.0], [5.0, 0.0]])
    theirs = torch.tensor([[math.cos(a), math.sin(a)]] * 2)
    assert_close(feature_distance([ours, ours], [theirs, theirs]), distance, atol=1e-6)


def test_teacher_gives_back_what_the_float_network_said():
    net, _, _ = calibrated()
    teacher = taught(net)
    assert block_names(net) == ['body.0', 'body.1'] and len(teacher) == 6
    x, wanted, features = teacher.batch([4, 1])
    assert torch.equal(x, torch.cat([calibration()[i] for i in (4, 1)]))
    original = tiny()
    with torch.no_grad():
        assert_close(wanted, original(x), rtol=1e-4, atol=1e-6)
        inner = original.first(x)
        for block, found in zip(original.body, features):
            inner = block(inner)
            assert_close(found, unit_rows(inner, 2), rtol=2e-3, atol=1e-4)
    teacher.close()


def test_batches_are_of_one_shape():
    teacher = Teacher(tiny())
    teacher.shapes = [torch.Size([3, s, s]) for s in (8, 8, 12, 8, 12)]
    teacher.images._entries = [None] * 5
    drawn = [teacher.draw(2, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(itertools.chain(*drawn[0])) == [0, 1, 2, 3, 4]
    assert all(len({teacher.shapes[i] for i in batch}) == 1 and len(batch) <= 2 for batch in drawn[0])
    gathered = list(batches_of([torch.zeros(n, 3, s, s) for n, s in ((1, 8), (1, 8), (1, 8), (1, 4), (5, 8))], 2))
    assert [tuple(b.shape[::2]) for b in gathered] == [(2, 8), (1, 8), (1, 4), (5, 8)]


@pytest.mark.parametrize(
    ('images', 'count', 'chosen'),
    [
        (list(range(10)), 4, [0, 2, 5, 7]),
        (list(range(3)), 4, [0, 1, 2]),
        (iter(range(10)), 4, [0, 1, 2, 3]),
        (iter(range(3)), None, [0, 1, 2]),
    ],
)
def test_images_are_evenly_spread(images, count, chosen):
    found = spread(images, count)
    assert not hasattr(found, '__len__') or len(found) == len(chosen)
    assert list(found) == chosen


def speed_tool() -> Any:
    path = Path(__file__).parents[1] / 'tools' / 'adabm_speed.py'
    spec = importlib.util.spec_from_file_location('adabm_speed', path)
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


@pytest.mark.parametrize('name', GROUPS)
def test_steps_are_those_of_the_plain_form(name):
    net, _, _ = calibrated()
    net.get_submodule('body.1.conv1').input_quantizer.layer_factor.data.fill_(1.2)
    plain = speed_tool().PlainStep(net, tiny())
    plain.learn(name)
    tuner = Tuner(net, taught(net), Tuning())
    with tuner.learning((name,)) as step:
        for indices in ([0, 1], [2, 3], [4, 5]):
            assert_close(step(indices), plain.step(torch.cat([calibration()[i] for i in indices]), name), rtol=2e-3)
    for conv, layer in zip(plain.convs, quant_layers(net).values()):
        lower, upper = layer.input_quantizer.bounds(conv.weight)
        found = [lower, upper, layer.weight_quantizer.bounds(conv.weight)[1], layer.input_quantizer.layer_factor]
        assert_close(found, [conv.lower, conv.upper, conv.bound, conv.factor], rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------------------------ bits by output error


def brute_force(errors: Any, macs: Any) -> float:
    names = list(errors)
    allowed = [c for c in itertools.product((-1, 0, 1), repeat=len(names))
               if sum(c) <= 0 and sum(o * macs[n] for n, o in zip(names, c)) <= 0]  # fmt: skip
    return min(sum(errors[n][o] for n, o in zip(names, c)) for c in allowed)


@pytest.mark.parametrize('seed', range(5))
def test_chosen_bits_cost_no_more_and_err_little_more_than_the_best(seed):
    draw = np.random.default_rng(seed)
    scale = draw.lognormal(0, 2, 6)
    errors = {f'l{i}': {o: s * 4.0**-o for o in (-1, 0, 1)} for i, s in enumerate(scale)}
    for macs in (dict.fromkeys(errors, 3), {n: int(draw.integers(1, 9)) for n in errors}):
        chosen = allocate_bits(errors, 0, macs, dict.fromkeys(errors, 1))
        assert sum(chosen.values()) <= 0 and sum(macs[n] * o for n, o in chosen.items()) <= 0
        total = sum(errors[n][o] for n, o in chosen.items())
        assert total <= sum(e[0] for e in errors.values())
        if len(set(macs.values())) == 1:
            assert total == pytest.approx(brute_force(errors, macs))


def test_output_errors_are_what_a_quantized_layer_does():
    net, method, seen = calibrated(init='mse')
    inputs = {n: layer.input_quantizer for n, layer in quant_layers(net).items()}
    ranges = {(n, o): method._range_at(seen.observers[n], inputs[n], o) for n in BODY for o in (-1, 0, 1)}
    batch = [images(1, 16, seed=s) for s in range(8)]
    errors, macs = output_errors(net, batch, inputs, ranges)
    assert set(macs.values()) == {16 * 16 * 4 * 4 * 9}
    original = tiny()
    for name in BODY:
        assert errors[name][-1] > errors[name][0] > errors[name][1] > 0
        for n, q in inputs.items():
            q.enabled = n == name
        inputs[name].layer_factor.data.zero_()
        inputs[name].set_range(*ranges[name, 0])
        weights = [layer.weight_quantizer for layer in quant_layers(net).values()]
        for w in weights:
            w.enabled = False
        with torch.no_grad():
            net.get_submodule('quant_measures.image_bits').set_thresholds(torch.tensor(-1.0), torch.tensor(1e4))
            measured = sum(float((net(i) - original(i)).square().sum()) for i in batch)
        assert 0.5 < errors[name][0] / measured < 2.0


# ------------------------------------------------------------------------------------------------------------- options


@pytest.mark.parametrize(
    ('options', 'key', 'value'),
    [
        ({}, 'epochs', 10),
        ({}, 'init', 'ema_minmax'),
        ({'schedule': 'fast'}, 'init', 'mse'),
        ({'schedule': 'fast', 'init': 'percentile'}, 'init', 'percentile'),
        ({'epochs': 0}, 'epochs', 0),
        ({'schedule': 'fast', 'feature_weight': '1e1'}, 'feature_weight', 10.0),
    ],
)
def test_options_over_schedule(options, key, value):
    settings = read_config({'method': 'adabm', 'adabm': options}).settings
    plan = Plan('adabm', (), settings)
    assert getattr(method_of(plan).schedule, key) == value


@pytest.mark.parametrize(
    ('options', 'said'),
    [
        ({'schedule': 'slow'}, 'published | fast'),
        ({'epochs': -1}, 'at least 0'),
        ({'init': 'lsq'}, 'ema_minmax | minmax | percentile | mse'),
        ({'clip_blend': 2}, 'from 0 to 1'),
    ],
)
def test_refused(options, said):
    with pytest.raises(QuantError, match=f'quant.adabm.{next(iter(options))}') as raised:
        read_config({'method': 'adabm', 'adabm': options})
    assert said in str(raised.value)
