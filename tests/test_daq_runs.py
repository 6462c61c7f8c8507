"""DAQ through the host's pipelines, and on a real network."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_real_network import edsr, run

from basicsr_quant import compat
from basicsr_quant.cli import main

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')

GIVEN = {'step_table': 'reference', 'w_step_table': 'optimal'}


def with_daq(options: dict[str, Any], **block: Any) -> dict[str, Any]:
    options = copy.deepcopy(options)
    options['quant'] = {'method': 'daq', 'w_bits': 4, 'a_bits': 4, **block}
    return options


@pytest.fixture
def float_file(options: dict[str, Any], option_file: Any, tmp_path: Path, monkeypatch: Any) -> str:
    """An FP32 network of the tiny data sets."""
    monkeypatch.chdir(tmp_path)
    assert main(['train', '-opt', option_file({**options, 'name': 'float'})]) == 0
    return str(tmp_path / 'experiments/float/models/net_g_latest.pth')


def test_calibrates_without_images_where_tables_are_given(
    float_file: str, options: dict[str, Any], option_file: Any, tmp_path: Path
) -> None:
    options['path']['pretrain_network_g'] = float_file
    assert main(['calibrate', '-opt', option_file(with_daq(options, daq=GIVEN))]) == 0
    found = json.loads((tmp_path / 'results/tiny/metrics.json').read_text())
    assert found['method'] == 'daq' and found['datasets']['Val']['fab'] == 4.0
    file = torch.load(tmp_path / 'experiments/tiny/models/net_g_calibrated.pth', weights_only=True)
    assert file['quant']['calibration']['images'] == 0
    assert file['params']['body.0.conv1.input_quantizer.steps'][3] == pytest.approx(0.586)
    assert file['params']['body.0.conv1.weight_quantizer.steps'][3] == pytest.approx(0.335)


def test_choosing_without_images_is_refused(
    float_file: str, options: dict[str, Any], option_file: Any, capsys: Any
) -> None:
    options['path']['pretrain_network_g'] = float_file
    assert main(['calibrate', '-opt', option_file(with_daq(options))]) == 2
    assert 'quant.calibration' in capsys.readouterr().err


def test_checkpoint_says_what_was_chosen(
    float_file: str, options: dict[str, Any], images: Path, option_file: Any, tmp_path: Path
) -> None:
    options['path']['pretrain_network_g'] = float_file
    calibration = {'num_images': 4, 'dataset': {'dataroot_lq': str(images / 'lq.lmdb'), 'io_backend': {'type': 'lmdb'}}}
    assert main(['calibrate', '-opt', option_file(with_daq(options, calibration=calibration))]) == 0
    file = torch.load(tmp_path / 'experiments/tiny/models/net_g_calibrated.pth', weights_only=True)
    choices = file['quant']['calibration']['choices']
    assert set(choices) == {'step_table', 'w_step_table', 'output_mse'} and len(choices['output_mse']) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    ('bits', 'block', 'least', 'most'),
    [
        (4, {'daq': GIVEN}, 37.60, 37.80),
        (2, {'daq': GIVEN}, 35.85, 36.10),
        (2, {'daq': {**GIVEN, 'stat_bits': 4, 'mixed_precision': True}}, 36.00, 36.30),
        (4, {'reference_compat': True}, 37.44, 37.48),
        (2, {'reference_compat': True}, 33.40, 33.50),
    ],
    ids=['W4A4', 'W2A2', 'W2A2 mixed', 'published W4A4', 'published W2A2'],
)
def test_real_network_without_training(
    bits: int, block: dict[str, Any], least: float, most: float, assets: Path, option_file: Any, tmp_path: Path,
    monkeypatch: Any,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    options = edsr(assets)
    options['quant'] = {'method': 'daq', 'w_bits': bits, 'a_bits': bits, **block}
    found = run('calibrate', options, option_file, tmp_path)
    assert least < found['datasets']['Set5']['psnr'] < most
    assert bits - 0.1 < found['cost']['fab'] <= bits  # as measured; mixed precision rounds down
