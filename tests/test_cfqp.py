"""CFQP: the closed form of its augmentation, the choice of images, and calibration of small networks."""

from __future__ import annotations

import copy
import json
import logging
import shutil

import pytest
import torch
from torch import nn
from torch.nn import functional

from basicsr_quant import compat
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import METHODS, method_of, quantize, settings_of
from basicsr_quant.methods.representative import (
    Augmentation,
    OutputStatistics,
    Representative,
    RepresentativeImages,
    candidates,
    choose,
    psnr,
)
from basicsr_quant.network.clamp_free import with_clamps
from basicsr_quant.network.plan import Plan
from basicsr_quant.network.planning import PlanRequest, make_plan
from basicsr_quant.network.surgery import floating_point, quantizers

UNIT = (0.0, 1.0)
needs_host = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')


def statistics(low, high, spread=0.2, outside=0.0):
    return OutputStatistics(low, high, outside, spread)


def candidate(image, low, high, spread=0.2):
    return Representative(image, Augmentation(), statistics(low, high, spread))


# ------------------------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize('target', [UNIT, (0.0, 255.0), (-1.0, 1.0)])
@pytest.mark.parametrize(('low', 'high'), [(-0.2, 1.3), (0.1, 0.9), (0.0, 1.0), (0.4, 0.7)])
def test_a_network_that_follows_intensity_is_fitted_at_once(low, high, target):
    output = torch.rand(1, 3, 9, 9) * (high - low) + low
    fitted = Augmentation().fitted(OutputStatistics.of(output, target), target)
    moved = fitted.gain * output + fitted.offset
    assert float(moved.min()) == pytest.approx(target[0], abs=1e-4)
    assert float(moved.max()) == pytest.approx(target[1], abs=1e-4)
    if fitted.gain != pytest.approx(1.0, abs=1e-3):  # a scaling about the value that stays
        fixed = (target[0] - fitted.gain * float(output.min())) / (1 - fitted.gain)
        assert fitted.gain * fixed + fitted.offset == pytest.approx(fixed, abs=1e-2)


def test_fits_compose():
    first = Augmentation(gain=2.0, offset=-0.25, gamma=0.5, flip=True)
    again = first.fitted(statistics(-1.0, 3.0), UNIT)  # y -> y / 4 + 1 / 4
    assert (again.gain, again.offset, again.gamma, again.flip) == (0.5, 0.1875, 0.5, True)


@pytest.mark.parametrize(
    ('augmentation', 'pixels'),
    [
        (Augmentation(), [0.0, 0.25, 1.0]),
        (Augmentation(gain=0.5, offset=0.25), [0.25, 0.375, 0.75]),
        (Augmentation(gain=2.0, offset=-0.25), [0.0, 0.25, 1.0]),
        (Augmentation(gamma=0.5), [0.0, 0.5, 1.0]),
        (Augmentation(gain=0.5, gamma=0.5), [0.0, 0.25, 0.5]),
        (Augmentation(flip=True), [1.0, 0.25, 0.0]),
    ],
)
@pytest.mark.parametrize('scale', [1.0, 255.0])
def test_augmentations(augmentation, pixels, scale):
    image = torch.tensor([0.0, 0.25, 1.0]).reshape(1, 1, 1, 3) * scale
    augmentation = Augmentation(
        augmentation.gain, augmentation.offset * scale, augmentation.gamma, augmentation.flip
    )
    assert torch.allclose(augmentation(image, (0.0, scale)).reshape(3), torch.tensor(pixels) * scale)


def test_statistics():
    output = torch.tensor([-0.5, 0.0, 0.5, 1.25]).reshape(1, 1, 2, 2)
    found = OutputStatistics.of(output, UNIT)
    assert (found.low, found.high, found.outside) == (-0.5, 1.25, 0.5)
    assert found.spread == pytest.approx(float(output.std(unbiased=False)))
    assert (found.overshoot(UNIT), found.misses(UNIT)) == (0.5, 0.5)
    assert statistics(0.1, 0.8).overshoot(UNIT) == 0.0
    assert statistics(0.1, 0.8).misses(UNIT) == pytest.approx(0.2)


@pytest.mark.parametrize('value', [0.01, 1.0])
def test_psnr(value):
    assert psnr(value, UNIT) == pytest.approx(-10 * torch.tensor(value).log10().item())
    assert psnr(value, (0.0, 255.0)) == pytest.approx(psnr(value / 255**2, UNIT))
    assert psnr(0.0, UNIT) == float('inf')


# ------------------------------------------------------------------------------------------------- candidates


def sharpen(image):
    """Overshoots at every edge."""
    blurred = functional.avg_pool2d(functional.pad(image, (1, 1, 1, 1), mode='replicate'), 3, 1)
    return image + 0.7 * (image - blurred)


def test_an_overshooting_image_is_scaled_until_it_fits():
    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = candidates(4, image, sharpen, UNIT, 0.002)
    given, fitted = found
    assert given.augmentation == Augmentation() and given.output.overshoot(UNIT) > 0.2
    assert fitted.image == 4 and fitted.output.misses(UNIT) <= 0.002
    assert fitted.output == OutputStatistics.of(sharpen(fitted.augmentation(image, UNIT)), UNIT)
    assert fitted.augmentation.gain < 0.9


def test_what_a_network_does_not_follow_is_fitted_in_steps():
    def bent(image):
        return sharpen(image) + 0.2 * image**2 - 0.1

    image = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = [candidates(0, image, bent, UNIT, 0.0, steps=steps, max_gain=9.0) for steps in (0, 1, 3, 6)]
    misses = [each[-1].output.misses(UNIT) for each in found]
    assert misses == sorted(misses, reverse=True) and misses[0] > 5 * misses[-1]


def test_flat_images_are_not_blown_up():
    image = 0.5 + 0.01 * torch.rand(1, 3, 8, 8)
    (only,) = candidates(0, image, sharpen, UNIT, 0.002, max_gain=2.0)
    assert only.augmentation == Augmentation()
    constant = torch.full((1, 3, 8, 8), 0.5)
    assert len(candidates(0, constant, sharpen, UNIT, 0.002)) == 1


def test_every_start_is_tried():
    image = torch.rand(1, 3, 8, 8)
    starts = [Augmentation(gamma=g, flip=f) for g in (1.0, 2.0) for f in (False, True)]
    found = candidates(0, image, sharpen, UNIT, 0.002, starts=starts, steps=0)
    assert [c.augmentation for c in found] == starts


# --------------------------------------------------------------------------------------------------- choosing


def test_nothing_that_leaves_the_range_is_chosen():
    found = [candidate(0, -0.1, 1.0), candidate(1, 0.0, 1.0), candidate(2, 0.3, 0.6), candidate(3, 0.0, 1.01)]
    assert [c.image for c in choose(found, 9, UNIT, 0.002)] == [1, 2]


def test_both_ends_are_reached():
    found = [candidate(0, 0.05, 0.95), candidate(1, 0.0, 0.4), candidate(2, 0.5, 1.0), candidate(3, 0.2, 0.8, 0.9)]
    assert [c.image for c in choose(found, 3, UNIT, 0.002)] == [0, 1, 2]
    assert [c.image for c in choose(found, 4, UNIT, 0.002)] == [0, 1, 2, 3]


def test_the_rest_is_by_spread_each_image_once_first():
    found = [candidate(0, 0.0, 1.0, 0.1)]
    found += [candidate(1, 0.1, 0.9, 0.5), candidate(1, 0.1, 0.9, 0.4), candidate(2, 0.1, 0.9, 0.3)]
    chosen = [(c.image, c.output.spread) for c in choose(found, 4, UNIT, 0.002)]
    assert chosen == [(0, 0.1), (1, 0.5), (2, 0.3), (1, 0.4)]


def test_where_none_fits_the_nearest_is_all():
    found = [candidate(0, -0.3, 1.0), candidate(1, -0.1, 1.1), candidate(2, 0.0, 1.5)]
    assert [c.image for c in choose(found, 3, UNIT, 0.002)] == [1]


def test_representative_images_can_be_gone_through_again():
    images = [torch.full((1, 3, 2, 2), v) for v in (0.1, 0.2, 0.3)]
    chosen = [Representative(2, Augmentation(gain=2.0), statistics(0, 1)), candidate(0, 0, 1)]
    found = RepresentativeImages(images, chosen, UNIT)
    for _ in range(2):
        assert [round(float(i.mean()), 4) for i in found] == [0.1, 0.6]
    assert len(found) == 2


# ----------------------------------------------------------------------------------------------- whole networks


class Plain(nn.Module):
    """Three convolutions over a residual, which overshoot, and a clip."""

    def __init__(self, clip=True):
        super().__init__()
        self.conv_first = nn.Conv2d(3, 6, 3, padding=1)
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.conv_last = nn.Conv2d(6, 12, 3, padding=1)
        self.clip = clip

    def forward(self, x):
        y = self.conv_last(functional.relu(self.body(functional.relu(self.conv_first(x)))))
        y = functional.pixel_shuffle(y + x.repeat_interleave(4, 1), 2)
        return torch.clamp(y, 0, 1) if self.clip else y


def network():
    torch.manual_seed(1)
    net = Plain().eval()
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.mul_(0.0 if name == 'conv_last.bias' else 1.3)
    return net


def planned(net, **options):
    settings = settings_of('cfqp', w_granularity='channel', options=options)
    plan = make_plan(net, PlanRequest('cfqp', 8, 8, 'all', settings=settings))
    return method_of(plan).complete_plan(plan, net)


@pytest.fixture
def crops():
    draw = torch.Generator().manual_seed(0)
    smooth = [torch.rand(1, 3, 4, 4, generator=draw) for _ in range(8)]
    return [functional.interpolate(s, size=(16, 16), mode='bicubic').clamp(0, 1) for s in smooth]


def calibrated(crops, **options):
    net = network()
    plan = planned(net, **options)
    quantize(net, plan)
    return net, method_of(plan), method_of(plan).calibrate(net, crops)


def test_the_clip_goes_and_codes_are_pixels(crops, caplog):
    reference = network()
    with caplog.at_level(logging.INFO, 'basicsr'):
        net, method, seen = calibrated(crops)
    low, high = method.output_grid(net)
    assert abs(low) < 1 / 255 and abs(high - 1) < 1 / 255 and type(net) is Plain
    with torch.no_grad():
        free = [net(image) for image in crops]
        wanted = [reference(image) for image in crops]
    codes = torch.cat([(y / (high - low) * 255).flatten() for y in free])
    assert torch.allclose(codes, codes.round(), atol=1e-3) and codes.min() >= -1e-3 and codes.max() <= 255 + 1e-3
    error = torch.stack([(y - w).square().mean() for y, w in zip(free, wanted)]).mean()
    assert psnr(float(error), UNIT) > 40
    figures = seen.choices['output_psnr']
    assert figures['representative, codes are pixels'] > figures['images as given, codes are pixels'] + 10
    assert seen.images == 8 and 0 < seen.choices['outside_as_given'] < 1
    assert seen.choices['output_range'] == [low, high]
    assert 'codes are pixels' in caplog.text and 'ms without the clip' in caplog.text


def test_floating_point_is_the_network_without_its_clip(crops):
    net, _, _ = calibrated(crops)
    with torch.no_grad(), floating_point(net):
        free = net(crops[0])
        with with_clamps(net):
            assert torch.equal(net(crops[0]), network()(crops[0]))
    assert free.min() < 0 and torch.equal(free.clamp(0, 1), network()(crops[0]).detach())


def test_choices_are_what_was_calibrated_on(crops):
    net, _, seen = calibrated(crops, images=3, steps=8, compare=False)
    chosen = seen.choices['representative']
    assert len(chosen) == 3 and seen.choices['output_psnr'] == {}
    outputs = []
    with torch.no_grad(), floating_point(net):
        for c in chosen:
            augmentation = Augmentation(**{k: c[k] for k in ('gain', 'offset', 'gamma', 'flip')})
            outputs.append(net(augmentation(crops[c['image']], UNIT)))
            assert float(outputs[-1].min()) == pytest.approx(c['low'], abs=1e-6)
    lower, upper = net.output_quantizer.bounds(torch.empty(0))
    assert float(lower) == pytest.approx(min(float(y.min()) for y in outputs), abs=1e-6)
    assert float(upper) == pytest.approx(max(float(y.max()) for y in outputs), abs=1e-6)


@pytest.mark.parametrize('options', [{}, {'gamma': 1.5, 'flip': True}, {'output_range': 'target'}, {'steps': 0}])
def test_deterministic_and_reloads(crops, options):
    first, method, seen = calibrated(crops, **options)
    second, _, again = calibrated(Again(crops), **options)
    assert seen.choices == again.choices
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values()))
    plan = planned(network(), **options)
    plain = Plan.from_plain(json.loads(json.dumps(plan.to_plain())))
    assert plain == plan
    fresh = quantize(Plain().eval(), plain)
    fresh.load_state_dict(first.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(crops[0]), first(crops[0]))
        assert torch.equal(copy.deepcopy(first)(crops[0]), first(crops[0]))
    if options == {'output_range': 'target'}:
        assert method.output_grid(first) == pytest.approx(UNIT)


class Again:
    """Images that are no list."""

    def __init__(self, images):
        self.images = images

    def __iter__(self):
        return iter(self.images)


def test_every_quantizer_is_set(crops):
    net, _, _ = calibrated(crops)
    names = quantizers(net)
    assert 'output_quantizer' in names and all(q.calibrated for q in names.values())


def test_a_set_that_misses_the_range_is_warned_of(crops, caplog):
    calibrated([image * 0.2 + 0.4 for image in crops], max_gain=1.0)
    assert 'misses the image range' in caplog.text


def test_refusals(crops):
    with pytest.raises(QuantError, match='Plain has none'):
        planned(Plain(clip=False))
    with pytest.raises(QuantError, match=r'quant.cfqp.high: 0 given, more than quant.cfqp.low \(0\) needed'):
        planned(network(), high=0.0)
    with pytest.raises(QuantError, match=r'quant.cfqp.tolerance: -1'):
        settings_of('cfqp', options={'tolerance': -1})
    net = network()
    plan = planned(net)
    quantize(net, plan)
    with pytest.raises(QuantError, match='gave no image'):
        method_of(plan).calibrate(net, [])
    with torch.no_grad():
        net.conv_last.bias.fill_(float('nan'))
    with pytest.raises(QuantError, match='output of Plain on calibration image 1 holds values that are not finite'):
        method_of(plan).calibrate(net, crops)


def test_what_the_checkpoint_changes_is_noticed(crops):
    """A mean that the plan knew as zero and the checkpoint has otherwise."""

    class Shifted(Plain):
        def __init__(self):
            super().__init__()
            self.register_buffer('mean', torch.zeros(()))

        def forward(self, x):
            return super().forward(x) + self.mean

    net = Shifted().eval()
    plan = planned(net)
    quantize(net, plan)
    net.mean.fill_(0.2)
    with pytest.raises(QuantError, match=r'took the clamps out of Shifted and its output .* changed by'):
        method_of(plan).calibrate(net, crops)


@needs_host
def test_checkpoint_of_another_output_is_refused():
    compat.apply()
    from basicsr_quant.models.checkpoint import NetworkFile, compare_plans

    class Module(Plain):
        def __init__(self):
            super().__init__(clip=False)
            self.end = nn.Hardtanh(0.0, 1.0)

        def forward(self, x):
            return self.end(super().forward(x))

    file = NetworkFile('file.pth', {}, planned(network()))
    compare_plans(file, planned(network()))
    with pytest.raises(QuantError, match=r"clamp\(\) in the network, Plain \[0, 1\], .* 'end', Hardtanh \[0, 1\]"):
        compare_plans(file, planned(Module()))
    with pytest.raises(QuantError, match=r'image range \[0, 1\] .* image range \[0, 0.5\]'):
        compare_plans(file, planned(network(), high=0.5))


def test_a_network_without_its_clip_can_be_exported(crops):
    net, _, _ = calibrated(crops)
    with torch.no_grad(), floating_point(net):
        wanted = net(crops[0])
        program = torch.export.export(net, (crops[0],))
        assert torch.equal(program.module()(crops[0]), wanted)


def test_defaults_are_integer_min_max():
    method = METHODS['cfqp']
    assert method.default_zero_point == 'integer' and method.Options().init == 'minmax'


# --------------------------------------------------------------------------------------------------- the host




@needs_host
@pytest.mark.parametrize(
    ('name', 'parameters', 'flat'), [('ABPN', 42539, {'num_feat': 4}), ('XLSR', 21947, {'num_feat': 8, 'num_skip': 4})]
)
def test_mobile_networks(name, parameters, flat):
    compat.apply()
    from basicsr.utils.registry import ARCH_REGISTRY

    import basicsr_quant.archs  # noqa: F401

    kind = ARCH_REGISTRY.get(name)
    assert sum(p.numel() for p in kind().parameters()) == parameters  # the papers': 42.5 K and 22 K
    for scale in (2, 3, 4):
        net, free = kind(upscale=scale, **flat), kind(upscale=scale, clip=False, **flat)
        free.load_state_dict(net.state_dict())
        image = torch.rand(1, 3, 7, 9) * 3 - 1
        with torch.no_grad():
            assert net(image).shape == (1, 3, 7 * scale, 9 * scale)
            assert torch.equal(net(image), free(image).clamp(0, 1))


@needs_host
def test_abpn_starts_from_nearest_neighbour():
    compat.apply()
    from basicsr_quant.archs import ABPN

    net = ABPN(num_feat=4, upscale=2)
    with torch.no_grad():
        net.conv_last.weight.zero_()
        net.conv_last.bias.zero_()
        image = torch.rand(1, 3, 5, 6)
        assert torch.equal(net(image), functional.interpolate(image, scale_factor=2, mode='nearest'))


@needs_host
@pytest.mark.parametrize('kind', ['ABPN', 'XLSR'])
def test_calibrate_then_test(kind, options, images, option_file, tmp_path, monkeypatch, capsys):
    from basicsr_quant.cli import main

    monkeypatch.chdir(tmp_path)
    compat.apply()
    from basicsr.utils.registry import ARCH_REGISTRY

    import basicsr_quant.archs  # noqa: F401

    network = {'num_in_ch': 3, 'num_feat': 8, 'num_block': 1, 'upscale': 2}
    torch.manual_seed(0)
    torch.save({'params': ARCH_REGISTRY.get(kind)(**network).state_dict()}, 'float.pth')
    options['network_g'] = {'type': kind, **network}
    options['path']['pretrain_network_g'] = 'float.pth'
    dataset = {'dataroot_lq': str(images / 'lq'), 'io_backend': {'type': 'disk'}}
    options['quant'] = {
        'method': 'cfqp', 'w_bits': 8, 'a_bits': 8, 'scope': 'all', 'w_granularity': 'channel',
        'calibration': {'dataset': dataset}, 'cfqp': {'images': 4},
    }  # fmt: skip
    # The test sets are other images than the calibration's: copies.
    options['datasets']['val']['dataroot_lq'] = str(shutil.copytree(images / 'lq', tmp_path / 'lq'))
    file = option_file(options)
    assert main(['calibrate', '-opt', file]) == 0
    first = json.loads((tmp_path / 'results/tiny/metrics.json').read_text())
    saved = torch.load('experiments/tiny/models/net_g_calibrated.pth', weights_only=True)
    (clamp,) = saved['quant']['plan']['settings']['output']['clamps']
    assert (clamp['low'], clamp['high'], clamp['type']) == (0.0, 1.0, 'ABPN' if kind == 'ABPN' else 'Hardtanh')
    assert saved['quant']['calibration']['choices']['representative']
    assert saved['params']['output_quantizer.calibrated']
    assert main(['test', '-opt', file]) == 0
    again = json.loads((tmp_path / 'results/tiny/metrics.json').read_text())
    assert again['datasets']['Val']['psnr'] == first['datasets']['Val']['psnr']
    assert 'net_g_calibrated' in again['checkpoint']
    capsys.readouterr()

    assert main(['plan', '-opt', file]) == 0
    assert 'taken out: ' in capsys.readouterr().out
    options['quant']['cfqp']['low'] = -0.0 if kind == 'ABPN' else 0.0
    options['network_g']['clip'] = False
    assert main(['test', '-opt', option_file(options, 'free.yml')]) == 2
    assert f'{kind} has none' in capsys.readouterr().err
