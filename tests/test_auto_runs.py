"""``auto`` through the host's pipelines, and on a real network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_real_network import edsr, run

from basicsr_quant import compat
from basicsr_quant.cli import main

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')


def block(images: Path, **settings: Any) -> dict[str, Any]:
    data = {'dataroot_lq': str(images / 'lq.lmdb'), 'io_backend': {'type': 'lmdb'}}
    return {'method': 'auto', 'w_bits': 4, 'a_bits': 4, 'calibration': {'num_images': 4, 'dataset': data}, **settings}


@pytest.fixture
def calibrated(
    options: dict[str, Any], images: Path, option_file: Any, tmp_path: Path, monkeypatch: Any
) -> dict[str, Any]:
    """Options of a run whose network has been calibrated."""
    monkeypatch.chdir(tmp_path)
    assert main(['train', '-opt', option_file({**options, 'name': 'float'})]) == 0
    options['path']['pretrain_network_g'] = str(tmp_path / 'experiments/float/models/net_g_latest.pth')
    options['quant'] = block(images)
    assert main(['calibrate', '-opt', option_file(options)]) == 0
    return options


def test_calibrate_then_test_gives_the_same_figures_and_the_bits_in_force(
    calibrated: dict[str, Any], option_file: Any, tmp_path: Path
) -> None:
    results = tmp_path / 'results/tiny/metrics.json'
    found = json.loads(results.read_text())
    file = torch.load(tmp_path / 'experiments/tiny/models/net_g_calibrated.pth', weights_only=True)
    bits = file['quant']['calibration']['choices']['a_bits']
    planned = {row['layer']: row['a_bits'] for row in found['plan'] if row['a_bits'] < 32}
    assert planned == bits
    assert found['cost']['fab_mac'] <= 4.0
    assert main(['test', '-opt', option_file(calibrated)]) == 0
    again = json.loads(results.read_text())
    assert again['plan'] == found['plan'] and again['cost']['bitops'] == found['cost']['bitops']
    assert again['datasets']['Val']['psnr'] == found['datasets']['Val']['psnr']


@pytest.mark.parametrize(
    ('changed', 'said'),
    [
        ({'a_bits': 8}, "quant.bits 'W4A4', the option file says 'W4A8'"),
        ({'w_granularity': 'tensor'}, "quant.w_granularity 'channel', the option file says 'tensor'"),
        ({'auto': {'budget': 0.5}}, 'quant.auto.budget'),
        ({'auto': {'a_granularity': 'row'}}, 'quant.auto.a_granularity'),
    ],
)
def test_a_file_of_other_settings_is_refused(
    changed: dict[str, Any], said: str, calibrated: dict[str, Any], option_file: Any, capsys: Any
) -> None:
    calibrated['quant'].update(changed)
    assert main(['test', '-opt', option_file(calibrated)]) == 2
    assert said in capsys.readouterr().err


def test_training_goes_on_from_the_calibrated_file(
    calibrated: dict[str, Any], option_file: Any, tmp_path: Path
) -> None:
    start = tmp_path / 'experiments/tiny/models/net_g_calibrated.pth'
    calibrated['path']['pretrain_network_g'] = str(start)
    assert main(['train', '-opt', option_file({**calibrated, 'name': 'trained'})]) == 0
    before = torch.load(start, weights_only=True)
    after = torch.load(tmp_path / 'experiments/trained/models/net_g_latest.pth', weights_only=True)
    moved = [k for k, v in after['params'].items() if k.endswith('.lower') and not torch.equal(v, before['params'][k])]
    bits = [k for k in after['params'] if k.endswith('.bits')]
    assert moved and all(torch.equal(after['params'][k], before['params'][k]) for k in bits)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('bits', 'settings', 'least'),
    [(4, {}, 37.67), (4, {'a_granularity': 'tensor'}, 37.64), (2, {}, 36.45)],
    ids=['W4A4', 'W4A4 tensor', 'W2A2'],
)
def test_real_network_without_training(
    bits: int, settings: dict[str, Any], least: float, assets: Path, option_file: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    options = edsr(assets)
    data = {'dataroot_lq': str(assets / 'calib/LR_bicubic/X2'), 'io_backend': {'type': 'disk'}}
    options['quant'] = {
        'method': 'auto', 'w_bits': bits, 'a_bits': bits, 'auto': {'budget': 300, **settings},
        'calibration': {'num_images': 40, 'dataset': data},
    }  # fmt: skip
    found = run('calibrate', options, option_file, tmp_path)
    assert found['datasets']['Set5']['psnr'] > least
    assert found['cost']['fab_mac'] <= bits
