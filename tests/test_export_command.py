"""``basicsr export`` from calibration to a proven file, and what it refuses."""

from __future__ import annotations

import importlib.util
import json
import shutil

import numpy as np
import pytest

if importlib.util.find_spec('basicsr') is None:
    pytest.skip('BasicSR is not installed', allow_module_level=True)
for package in ('onnx', 'onnxscript', 'onnxruntime'):
    pytest.importorskip(package)

import basicsr_quant  # noqa: E402
from basicsr_quant.cli import main  # noqa: E402


@pytest.fixture
def here(tmp_path, monkeypatch, images, options, option_file):
    """An option file of a tiny EDSR with an FP32 checkpoint, in a working directory of its own."""
    basicsr_quant.enable()
    import torch

    from basicsr_quant.models.preparation import build_float

    monkeypatch.chdir(tmp_path)
    torch.save({'params': build_float(options['network_g']).state_dict()}, 'fp32.pth')
    options['path']['pretrain_network_g'] = 'fp32.pth'
    shutil.copytree(images / 'lq', 'calibration')
    calibration = {'num_images': 4, 'dataset': {'dataroot_lq': 'calibration'}}
    options['quant'] = {'method': 'minmax', 'scope': 'all', 'skip': 'quantized', 'calibration': calibration}

    def write(**block):
        options['quant'].update(block)
        return option_file(options)

    return write


def test_a_calibrated_network_becomes_a_proven_file(here, tmp_path, capsys, images):
    file = here()
    assert main(['calibrate', '-opt', file]) == 0
    capsys.readouterr()
    assert main(['export', '-opt', file, '-o', 'out/model.onnx', '--images', '2', '--triton', 'models']) == 0
    served = tmp_path / 'models' / 'model'
    assert (served / '1' / 'model.onnx').read_bytes() == (tmp_path / 'out' / 'model.onnx').read_bytes()
    assert 'dims: [ 3, -1, -1 ]' in (served / 'config.pbtxt').read_text()
    said = capsys.readouterr().out
    assert '0.0000 % of 7680 values differ' in said and 'ONNX Runtime: 5 QLinearConv, 2 QLinearAdd, 1 Conv' in said
    card = json.loads((tmp_path / 'out' / 'model.json').read_text())
    metrics = json.loads((tmp_path / 'results' / 'tiny' / 'metrics.json').read_text())
    assert (card['scale'], card['w_bits'], card['skip']) == (2, [8], 'quantized')
    assert card['parity']['psnr']['onnxruntime'] == pytest.approx(card['parity']['psnr']['test'], abs=0.02)
    each = [v['psnr'] for v in metrics['datasets']['Val']['images'].values()][:2]
    assert card['parity']['psnr']['test'] == pytest.approx(np.mean(each), abs=1e-4)
    assert [t['tensor'] for t in metrics['tensors']] == [t['tensor'] for t in card['tensors']]
    upscaled = ['upscale', '-i', str(images / 'lq'), '-o', 'up', '-m', 'out/model.onnx', '--tile', '16']
    assert main(upscaled) == 0
    assert len(list((tmp_path / 'up').iterdir())) == 10


@pytest.mark.parametrize('more, words', [
    ((), 'is an FP32 file and has no ranges'), (('--opset', '13'), '--opset 13'), (('--images', '0'), '--images 0'),
    (('--checkpoint', 'nothing.pth'), 'there is no checkpoint nothing.pth'),
])  # fmt: skip
def test_requests_that_are_refused(here, more, words, capsys, tmp_path):
    assert main(['export', '-opt', here(), '-o', 'model.onnx', *more]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / 'model.onnx').exists()


def test_a_method_that_cannot_be_exported_is_named(here, capsys):
    file = here(method='daq', skip='fp')
    assert main(['calibrate', '-opt', file]) == 0
    assert main(['export', '-opt', file, '-o', 'model.onnx']) == 2
    assert "'daq' chooses ranges or bits for each image" in capsys.readouterr().err


def test_missing_packages_are_named(here, capsys, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'onnx', None)
    assert main(['export', '-opt', here(), '-o', 'model.onnx']) == 2
    assert 'package onnx is not installed' in capsys.readouterr().err
