"""Adaptive bits as static graphs: members, router, folder."""

from __future__ import annotations

import importlib.util
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import BODY, images, plan_of, tiny

from basicsr_quant.deploy.compare_files import bits_of_router, compare_files
from basicsr_quant.deploy.family import adapts, family_of, frozen
from basicsr_quant.deploy.parity import ParityImage
from basicsr_quant.deploy.router import Router
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import method_of, quantize
from basicsr_quant.network.surgery import quant_layers
from basicsr_quant.quantizers import ImageBits, LearnedRange, SymmetricRange, complexity


def calibrated(method, bits, **settings):
    plan = plan_of(tiny(), method, bits, **settings)
    net = quantize(tiny(), plan)
    method_of(plan).calibrate(net, [images(3, 16)])
    return net.eval(), plan


def adabm(**options):
    return calibrated('adabm', 4, options={'epochs': 0, **options}, zero_point='integer')


def smooth(level):
    """A ramp: complexity rises with its slope."""
    return (torch.arange(16.0) * level / 16).expand(1, 3, 16, 16).clone()


def thresholds(net, lower, upper):
    mapping = next(m for m in net.modules() if isinstance(m, ImageBits))
    mapping.set_thresholds(torch.tensor(lower), torch.tensor(upper))


@torch.no_grad()
def test_members_of_adabm_are_the_network_itself():
    net, plan = adabm()
    ramps = [smooth(level) for level in (0.1, 0.4, 0.9)]
    found = [float(complexity(ramp)) for ramp in ramps]
    thresholds(net, (found[0] + found[1]) / 2, (found[1] + found[2]) / 2)
    family = family_of(net, ())
    assert family.agreement is None and len(family.bits) == 3
    layer_bits = {name: int(layer.input_quantizer.layer_bits) for name, layer in quant_layers(net).items()}
    for index, (offset, ramp) in enumerate(zip((-1, 0, 1), ramps)):
        twin, own = frozen(net, family.bits[index], plan)
        assert {layer.layer: layer.a_bits - offset - 4 for layer in own.quantized} == layer_bits
        assert all(type(layer.input_quantizer) is LearnedRange for layer in quant_layers(twin).values())
        assert torch.equal(twin(ramp), net(ramp))
    assert not torch.equal(frozen(net, family.bits[0], plan)[0](ramps[2]), net(ramps[2]))


@torch.no_grad()
@pytest.mark.parametrize('exactly', ['lower', 'upper'])
def test_the_router_decides_as_the_network_does_even_on_a_threshold(exactly):
    net, _ = adabm()
    here = float(complexity(smooth(0.5)))
    thresholds(net, *((here, 2 * here) if exactly == 'lower' else (here / 2, here)))
    family = family_of(net, ())
    router = Router([lambda x, k=k: x * 0 + k for k in range(3)], family.thresholds, [3, 4, 5])
    batch = torch.cat([smooth(level) for level in (0.1, 0.5, 1.5, 0.5)])
    mapping = next(m for m in net.modules() if isinstance(m, ImageBits))
    assert torch.equal(router.choose(batch), (mapping(batch) + 1).long())
    assert torch.equal(router(batch)[:, 0, 0, 0], (mapping(batch) + 1))
    assert router.counts == [1, 2, 1] and router.mean_bits == 4.0


def test_adabm_without_a_mapping_from_images_is_one_network():
    net, plan = adabm(schedule='fast')
    family = family_of(net, ())
    assert len(family.bits) == 1 and family.thresholds == ()
    with torch.no_grad():
        assert torch.equal(frozen(net, family.bits[0], plan)[0](images(2, 16)), net(images(2, 16)))


def test_bits_that_no_file_holds_are_refused():
    net, _ = calibrated('adabm', 2, options={'epochs': 0}, reference_compat=True)
    with pytest.raises(QuantError, match=r'would have [01] bits \(reference_compat'):
        family_of(net, ())


class Choosing:
    """Makes the layers of a CADyQ network choose by the complexity of the image, each layer at a slope of its own."""

    def __init__(self, net):
        for index, layer in enumerate(quant_layers(net).values()):
            selector = layer.input_quantizer.selector
            torch.nn.init.zeros_(selector.weight)
            selector.weight.data[:, :2] = torch.tensor([0.0, 1.0, 2.0])[:, None]
            selector.bias.data = torch.tensor([0.0, -20.0, -70.0]) * (1 + index)


@torch.no_grad()
def test_members_of_cadyq_are_the_middle_of_what_each_group_chose():
    net, plan = calibrated('cadyq', 8)
    Choosing(net)
    patches = [smooth(0.05 + 0.2 * i) for i in (3, 0, 5, 1, 4, 2)]
    chosen = {}
    for patch in patches:
        net(patch)
        chosen[float(complexity(patch))] = {name: int(b) for name, b in net._quant_context.bits.items()}
    family = family_of(net, patches, 2)
    rising = sorted(chosen)
    groups = rising[:3], rising[3:]
    wanted = [{name: int(np.median([chosen[c][name] for c in group])) for name in BODY} for group in groups]
    assert list(family.bits) == wanted and wanted[0] != wanted[1]
    assert family.thresholds == pytest.approx([(rising[2] + rising[3]) / 2])
    pairs = [(wanted[i][name], chosen[c][name]) for i, group in enumerate(groups) for c in group for name in BODY]
    assert family.agreement.equal == pytest.approx(np.mean([a == b for a, b in pairs]))
    assert family.agreement.lower == pytest.approx(np.mean([a < b for a, b in pairs])) and family.agreement.patches == 6
    every = family_of(net, patches, 6)  # a member for each patch: the network itself
    assert every.agreement.equal == 1.0
    for patch, bits in zip(sorted(patches, key=lambda p: float(complexity(p))), every.bits):
        twin, _ = frozen(net, bits, plan)
        assert all(type(layer.input_quantizer) is SymmetricRange for layer in quant_layers(twin).values())
        assert torch.equal(twin(patch), net(patch))


def test_too_few_patches_for_the_members():
    with pytest.raises(QuantError, match='--members 3: 1 patches'):
        family_of(calibrated('cadyq', 8)[0], [images(1, 16)], 3)


def test_static_networks_have_no_family():
    assert not adapts(calibrated('minmax', 8)[0]) and not adapts(tiny())


def test_files_are_compared_image_by_image():
    router = Router([lambda x: x, lambda x: x + 1], [20.0], [3.0, 5.0], batched=False)
    pictures = [ParityImage('a', smooth(0.1), 0.0), ParityImage('b', smooth(0.9), 1.0), ParityImage('c', smooth(0.1))]
    rows = compare_files(
        {'plain': lambda x: x, 'family': router}, {'Set': pictures},
        lambda output, truth: float(output.min()) - truth, {'family': bits_of_router(router)}, rounds=2,
    )  # fmt: skip
    assert [(row.name, row.dataset, row.psnr, row.fab) for row in rows] == [
        ('plain', 'Set', -0.5, None), ('family', 'Set', 0.0, pytest.approx(11 / 3)),
    ]  # fmt: skip
    assert all(row.seconds > 0 for row in rows)


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def here(tmp_path, monkeypatch, images, options, option_file):
    """An option file of a tiny EDSR with an FP32 checkpoint, in a working directory of its own."""
    if importlib.util.find_spec('basicsr') is None:
        pytest.skip('BasicSR is not installed')
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package)
    import basicsr_quant

    basicsr_quant.enable()
    from basicsr_quant.models.preparation import build_float

    monkeypatch.chdir(tmp_path)
    torch.save({'params': build_float(options['network_g']).state_dict()}, 'fp32.pth')
    options['path']['pretrain_network_g'] = 'fp32.pth'
    shutil.copytree(images / 'lq', 'calibration')
    calibration = {'num_images': 6, 'patch_size': 12, 'dataset': {'dataroot_lq': 'calibration'}}
    options['quant'] = {'scope': 'all', 'skip': 'quantized', 'patch': {'size': 12, 'stride': 12},
                        'calibration': calibration}  # fmt: skip

    def write(**block):
        options['quant'].update(block)
        return option_file(options)

    return write


@pytest.mark.parametrize('method', ['adabm', pytest.param('cadyq', marks=pytest.mark.slow)])
def test_a_folder_that_upscale_and_bench_take(method, here, tmp_path, capsys, images):
    from basicsr_quant.cli import main

    block = {'w_bits': 4, 'a_bits': 4, 'adabm': {'epochs': 0}} if method == 'adabm' else {'w_bits': 8, 'a_bits': 8}
    file = here(method=method, **block)
    assert main(['calibrate', '-opt', file]) == 0
    assert main(['export', '-opt', file, '-o', 'model.onnx']) == 2
    assert 'give a folder' in capsys.readouterr().err
    assert main(['export', '-opt', file, '-o', 'family', '--images', '2']) == 0
    said = capsys.readouterr().out
    manifest = json.loads((tmp_path / 'family' / 'family.json').read_text())
    members = {member['file'] for member in manifest['members']}
    assert len(members) == 3 and {f.name for f in (tmp_path / 'family').iterdir()} == (
        members | {name.replace('.onnx', '.json') for name in members} | {'family.json'}
    )
    assert said.count('0.0000 % of') == 3 and 'differ in accuracy, not in speed' in said
    assert manifest['parity']['psnr']['family'] == pytest.approx(manifest['parity']['psnr']['test'], abs=0.05)
    if method == 'adabm':
        assert manifest['parity']['fab']['family'] == pytest.approx(manifest['parity']['fab']['test'])
        assert manifest['agreement'] is None
    assert not [f for f in tmp_path.iterdir() if f.name.startswith('.family')]
    assert main(['upscale', '-i', str(images / 'lq'), '-o', 'up', '-m', 'family']) == 0
    assert 'bits of patches:' in capsys.readouterr().out and len(list((tmp_path / 'up').iterdir())) == 10
    assert main(['bench', '-opt', file, '--files', 'family', 'family/member_2.onnx', '--rounds', '1']) == 0
    rows = [line.split('|') for line in capsys.readouterr().out.splitlines() if line.startswith('| Val')]
    assert [row[2].strip() for row in rows] == ['basicsr test', 'family', 'family/member_2.onnx']
    assert abs(float(rows[0][3]) - float(rows[1][3])) < 0.05
    (tmp_path / 'family' / 'member_3.onnx').unlink()
    assert main(['upscale', '-i', str(images / 'lq'), '-o', 'again', '-m', 'family']) == 2
    assert 'member_3.onnx is missing' in capsys.readouterr().err


def test_a_folder_with_other_things_is_left_alone(here, capsys, tmp_path):
    from basicsr_quant.cli import main

    file = here(method='adabm', w_bits=4, a_bits=4, adabm={'epochs': 0})
    assert main(['calibrate', '-opt', file]) == 0
    assert main(['export', '-opt', file, '-o', 'calibration']) == 2
    assert 'with other things in it' in capsys.readouterr().err
    assert main(['upscale', '-i', 'calibration', '-o', 'out', '-m', 'calibration']) == 2
    assert 'is no folder of `basicsr export`' in capsys.readouterr().err
    assert len(list((tmp_path / 'calibration').iterdir())) == 10
