"""AdaBM through the host's pipelines, with its own option file shortened, and on a real network."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_real_network import edsr, run

from basicsr_quant import compat
from basicsr_quant.cli import main

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')

OPTION_FILE = Path(__file__).parents[1] / 'options/EDSR_x4_W4A4_AdaBM.yml'


def with_adabm(options: dict[str, Any], images: Path, **block: Any) -> dict[str, Any]:
    """The shipped ``quant:`` block on the tiny network and its images."""
    options = copy.deepcopy(options)
    quant = yaml.safe_load(OPTION_FILE.read_text())['quant']
    quant['adabm']['epochs'] = 3
    quant['calibration'] = {
        'num_images': 6, 'dataset': {'dataroot_lq': str(images / 'lq.lmdb'), 'io_backend': {'type': 'lmdb'}},
    }  # fmt: skip
    options['quant'] = {**quant, **block}
    return options


@pytest.fixture
def float_file(options: dict[str, Any], option_file: Any, tmp_path: Path, monkeypatch: Any) -> str:
    """An FP32 network of the tiny data sets."""
    monkeypatch.chdir(tmp_path)
    assert main(['train', '-opt', option_file({**options, 'name': 'float'})]) == 0
    return str(tmp_path / 'experiments/float/models/net_g_latest.pth')


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / 'results/tiny/metrics.json').read_text())  # type: ignore[no-any-return]


def test_calibrates_then_tests_the_same_network(
    float_file: str, options: dict[str, Any], images: Path, option_file: Any, tmp_path: Path
) -> None:
    options['path']['pretrain_network_g'] = float_file
    file = option_file(with_adabm(options, images))
    assert main(['calibrate', '-opt', file]) == 0
    first = results(tmp_path)
    state = torch.load(tmp_path / 'experiments/tiny/models/net_g_calibrated.pth', weights_only=True)
    assert 'quant_measures.image_bits.lower' in state['params']
    choices = state['quant']['calibration']['choices']
    assert choices['schedule'] == 'published' and set(choices['layer_bits'].values()) <= {-1, 0, 1}
    assert main(['test', '-opt', file]) == 0
    again = results(tmp_path)
    assert again['datasets']['Val']['psnr'] == first['datasets']['Val']['psnr']
    found = first['datasets']['Val']
    bits = [image['fab'] for image in found['images'].values()]
    assert found['fab'] == pytest.approx(sum(bits) / len(bits)) == first['cost']['fab']
    layers = sum(choices['layer_bits'].values()) / len(choices['layer_bits'])
    assert {b - 4 - layers for b in bits} <= {-1.0, 0.0, 1.0}


def test_patches_choose_their_own_bits(
    float_file: str, options: dict[str, Any], images: Path, option_file: Any, tmp_path: Path
) -> None:
    options['path']['pretrain_network_g'] = float_file
    assert main(['calibrate', '-opt', option_file(with_adabm(options, images))]) == 0
    whole = results(tmp_path)
    assert main(['test', '-opt', option_file(with_adabm(options, images, patch={'size': 10, 'stride': 8}))]) == 0
    cut = results(tmp_path)
    assert cut['datasets']['Val']['psnr'] != whole['datasets']['Val']['psnr']
    sixths = [image['fab'] * 6 for image in cut['datasets']['Val']['images'].values()]  # 2 x 3 patches, 2 layers alike
    assert sixths == pytest.approx([round(s) for s in sixths])
    assert any('patches of 10x10 every 8 pixels' in note for note in cut['cost']['notes'])


@pytest.mark.parametrize('method', ['none', 'minmax'])
def test_any_method_runs_in_patches(
    method: str, float_file: str, options: dict[str, Any], images: Path, option_file: Any, tmp_path: Path
) -> None:
    options['path']['pretrain_network_g'] = float_file
    block = with_adabm(options, images)['quant']
    quant = {k: block[k] for k in ('calibration', 'w_bits', 'a_bits')} if method == 'minmax' else {}
    psnr = []
    for patch in (None, {'size': 16, 'stride': 8}, {'size': 8}):
        options['quant'] = {'method': method, **quant, 'patch': patch}
        assert main(['calibrate', '-opt', option_file(options)]) == 0
        psnr.append(results(tmp_path)['datasets']['Val']['psnr'])
    assert psnr[0] == pytest.approx(psnr[1], abs=0.05) and psnr[2] != psnr[0]


def test_trains_from_its_ranges(
    float_file: str, options: dict[str, Any], images: Path, option_file: Any, tmp_path: Path
) -> None:
    options['path']['pretrain_network_g'] = float_file
    assert main(['train', '-opt', option_file(with_adabm(options, images))]) == 0
    files = [torch.load(tmp_path / f'experiments/tiny/models/net_g_{i}.pth', weights_only=True) for i in (4, 8)]
    changed = {k for k in files[0]['params'] if not torch.equal(files[0]['params'][k], files[1]['params'][k])}
    assert 'body.0.conv1.input_quantizer.upper' in changed
    assert not any('image_bits' in k or 'layer_factor' in k for k in changed)
    thresholds = [f[key]['quant_measures.image_bits.upper'] for f in files for key in ('params', 'params_ema')]
    assert all(torch.equal(t, thresholds[0]) for t in thresholds) and thresholds[0] < 1e3
    assert main(['test', '-opt', option_file(with_adabm(options, images))]) == 0


@pytest.mark.slow
def test_real_network_reaches_its_figure(assets: Path, option_file: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    options = edsr(assets)
    lq = {'dataroot_lq': str(assets / 'calib/LR_bicubic/X2')}
    calibration = {'num_images': 100, 'dataset': lq}
    options['quant'] = {
        'method': 'adabm', 'w_bits': 4, 'a_bits': 4, 'calibration': calibration, 'adabm': {'schedule': 'fast'},
    }  # fmt: skip
    found = run('calibrate', options, option_file, tmp_path)['datasets']['Set5']
    assert found['psnr'] > 37.55 and found['fab'] <= 4.0 and found['fab_mac'] <= 4.0
