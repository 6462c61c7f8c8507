"""DDTB and DAQ through the host's pipelines, with the shipped option files shortened: train, resume, test, export."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from basicsr_quant import compat
from basicsr_quant.cli import main

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')

FOLDER = Path(__file__).parents[1] / 'options'


def shortened(options: dict[str, Any], images: Path, stem: str, folder: Path) -> dict[str, Any]:
    """The shipped block, network and optimizer on the tiny data: 6 iterations, 3 of them the warm-up."""
    compat.apply()  # the host is imported below, perhaps for the first time

    from basicsr_quant.models.preparation import build_float

    shipped = yaml.safe_load((FOLDER / f'{stem}.yml').read_text())
    opt = {**copy.deepcopy(options), 'name': stem}
    opt['network_g'] = {**shipped['network_g'], 'num_feat': 4, 'num_block': 2, 'upscale': 2}
    data = {'dataroot_lq': str(images / 'lq.lmdb'), 'io_backend': {'type': 'lmdb'}}
    opt['quant'] = {**shipped['quant'], 'calibration': {'num_images': 4, 'dataset': data}}
    if 'ddtb' in opt['quant']:
        opt['quant']['ddtb']['warm_up'] = 3
    torch.manual_seed(0)
    torch.save({'params': build_float(opt['network_g']).state_dict()}, folder / 'fp32.pth')
    opt['path']['pretrain_network_g'] = str(folder / 'fp32.pth')
    opt['train'].update(optim_g=shipped['train']['optim_g'], total_iter=6)
    opt['logger']['save_checkpoint_freq'] = 2  # 2 lies within the warm-up, 4 behind it
    return opt


@pytest.mark.parametrize('stem', ['EDSR_x4_W2A2_DDTB', 'EDSR_x4_W3A3_DDTB', 'EDSR_x4_W4A4_DDTB', 'EDSR_x4_W2A2_DAQ'])
def test_shipped_files_train_and_test(
    stem: str, options: dict[str, Any], images: Path, option_file: Any, tmp_path: Path, monkeypatch: Any,
    said: list[str], capsys: Any,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    file = option_file(shortened(options, images, stem, tmp_path))
    assert main(['train', '-opt', file]) == 0
    assert main(['test', '-opt', file]) == 0
    found = json.loads((tmp_path / f'results/{stem}/metrics.json').read_text())
    bits = int(stem.split('_W')[1][0])
    assert found['datasets']['Val']['fab'] == bits
    if stem.endswith('DDTB'):
        log = '\n'.join(said)
        assert 'DDTB: gates on 1 of 4 layers' in log and 'l_distill: ' in log and 'l_gate: ' in log
        saved = torch.load(tmp_path / f'experiments/{stem}/models/net_g_latest.pth', weights_only=True)
        for key in ('params', 'params_ema'):
            assert saved[key]['quant_measures.warm_up.steps'] == 6
            assert [k.split('.input')[0] for k, v in saved[key].items() if k.endswith('.gated') and v] == (
                saved['quant']['calibration']['choices']['gates']
            )
        assert any('192 more MACs on the ranges of each image' in note for note in found['cost']['notes'])
    capsys.readouterr()
    assert main(['export', '-opt', file, '-o', 'model.onnx']) == 2
    refused = capsys.readouterr().err
    assert 'chooses ranges or bits for each image' in refused and refused.count('\n') == 1
    assert ('trained with ddtb: {dynamic_ratio: 0}' in refused) == stem.endswith('DDTB')


@pytest.mark.parametrize('first', [2, 4])
def test_resuming_within_and_behind_the_warm_up_is_exact(
    first: int, options: dict[str, Any], images: Path, option_file: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    opt = shortened(options, images, 'EDSR_x4_W2A2_DDTB', tmp_path)
    file = option_file(opt)
    assert main(['train', '-opt', file]) == 0
    models = tmp_path / 'experiments' / opt['name'] / 'models'
    whole = torch.load(models / 'net_g_6.pth', weights_only=True)
    for later in range(first + 2, 7, 2):
        for left in tmp_path.glob(f'experiments/{opt["name"]}/*/*{later}.*'):
            left.unlink()
    assert not (models / 'net_g_6.pth').exists()
    assert main(['train', '-opt', file, '--auto_resume']) == 0
    resumed = torch.load(models / 'net_g_6.pth', weights_only=True)
    for key in ('params', 'params_ema'):
        assert not [k for k, v in whole[key].items() if not torch.equal(v, resumed[key][k])]
    assert whole['quant'] == resumed['quant']


def test_without_gates_it_exports(
    options: dict[str, Any], images: Path, option_file: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    opt = shortened(options, images, 'EDSR_x4_W4A4_DDTB', tmp_path)
    opt['quant']['ddtb']['dynamic_ratio'] = 0
    file = option_file(opt)
    assert main(['train', '-opt', file]) == 0
    assert main(['export', '-opt', file, '-o', 'model.onnx']) == 0
    assert (tmp_path / 'model.onnx').exists() and (tmp_path / 'model.json').exists()
