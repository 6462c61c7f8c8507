"""The quant: block through the host's own pipelines: train, resume, calibrate, test, on one rank and on two."""

from __future__ import annotations

import copy
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from basicsr_quant import compat
from basicsr_quant.cli import main

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')

METHODS = ('minmax', 'percentile', 'mse', 'lsq', 'pams', 'daq', 'odm', 'odm_v1')
Run = Callable[..., int]


@pytest.fixture
def basicsr(option_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command of ``basicsr`` in a folder of its own; return its exit code."""
    monkeypatch.chdir(tmp_path)

    def run(command: str, options: dict[str, Any], *flags: str) -> int:
        return main([command, '-opt', option_file(options), *flags])

    return run


def quantized(options: dict[str, Any], method: str = 'odm', **block: Any) -> dict[str, Any]:
    options = copy.deepcopy(options)
    options['network_g'].update(num_block=2, img_range=1.0)
    train = options['datasets']['train']  # the same images as the test set's, under another name
    train.update({k: f'{train[k]}.lmdb' for k in ('dataroot_gt', 'dataroot_lq')}, io_backend={'type': 'lmdb'})
    options['quant'] = {'method': method, 'w_bits': 4, 'a_bits': 4, 'calibration': {'num_images': 4}, **block}
    return options


def network(folder: Path, name: str, label: object) -> dict[str, Any]:
    return torch.load(folder / 'experiments' / name / 'models' / f'net_g_{label}.pth', weights_only=True)


def metrics(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / 'results' / name / 'metrics.json').read_text())


def same_tensors(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize('method', METHODS)
def test_one_block_makes_a_stock_file_train_and_test(
    method: str, options: dict[str, Any], basicsr: Run, tmp_path: Path
) -> None:
    options = quantized(options, method)
    assert basicsr('train', options) == 0
    file = network(tmp_path, 'tiny', 'latest')
    assert set(file) == {'params', 'params_ema', 'quant'}
    assert file['quant']['plan']['method'] == method
    ranges = {k: v for k, v in file['params'].items() if 'quantizer.' in k}
    assert all(v for k, v in ranges.items() if k.endswith('calibrated'))
    assert {k for k in file['params'] if k not in ranges} == set(float_network(options).state_dict())
    assert basicsr('test', options) == 0
    found = metrics(tmp_path, 'tiny')
    assert found['method'] == method and found['checkpoint'].endswith('net_g_latest.pth')
    assert found['datasets']['Val']['fab'] == 4.0
    assert len(found['datasets']['Val']['images']) == 10
    assert found['cost']['bitops'] < found['cost']['macs'] * 32 * 32


def float_network(options: dict[str, Any]) -> torch.nn.Module:
    from basicsr_quant.models.preparation import build_float

    return build_float(options['network_g'])


def test_a_stock_file_trains_as_without_the_package(options: dict[str, Any], basicsr: Run, tmp_path: Path) -> None:
    assert basicsr('train', options) == 0
    assert set(network(tmp_path, 'tiny', 'latest')) == {'params', 'params_ema'}
    assert basicsr('test', options) == 0  # reports the FP32 network's cost beside its PSNR
    found = metrics(tmp_path, 'tiny')
    assert found['method'] == 'none' and found['cost']['bitops'] == found['cost']['macs'] * 32 * 32


@pytest.mark.parametrize('method', ['odm', 'lsq', 'odm_v1'])
@pytest.mark.parametrize('workers', [0, 2])
def test_resuming_is_exact(
    method: str, workers: int, options: dict[str, Any], basicsr: Run, tmp_path: Path
) -> None:
    options = quantized(options, method)
    options['datasets']['train']['num_worker_per_gpu'] = workers
    assert basicsr('train', options) == 0
    whole = network(tmp_path, 'tiny', 8)
    for file in tmp_path.glob('experiments/tiny/*/*8*'):
        file.unlink()
    assert basicsr('train', options, '--auto_resume') == 0
    resumed = network(tmp_path, 'tiny', 8)
    assert same_tensors(whole['params'], resumed['params'])
    assert same_tensors(whole['params_ema'], resumed['params_ema'])
    assert whole['quant'] == resumed['quant']


def test_ema_starts_from_the_calibrated_ranges(options: dict[str, Any], basicsr: Run, tmp_path: Path) -> None:
    options = quantized(options, 'minmax')
    options['train']['total_iter'] = 1
    assert basicsr('train', options) == 0
    file = network(tmp_path, 'tiny', 'latest')
    name = 'body.0.conv1.input_quantizer.'
    for key in ('lower', 'upper', 'unit', 'calibrated'):
        assert torch.equal(file['params'][name + key], file['params_ema'][name + key])


def test_calibrate_then_test(options: dict[str, Any], basicsr: Run, images: Path, tmp_path: Path) -> None:
    assert basicsr('train', {**options, 'name': 'fp'}) == 0
    source = str(tmp_path / 'experiments/fp/models/net_g_latest.pth')
    options['path']['pretrain_network_g'] = source
    lq_alone = {'dataroot_lq': str(images / 'lq.lmdb'), 'io_backend': {'type': 'lmdb'}}
    options['quant'] = {
        'method': 'percentile', 'w_bits': 8, 'a_bits': 8, 'scope': 'all',
        'calibration': {'num_images': 3, 'dataset': lq_alone},
    }  # fmt: skip
    assert basicsr('calibrate', options) == 0
    first = metrics(tmp_path, 'tiny')
    assert (tmp_path / 'experiments/tiny/models/net_g_calibrated.pth').is_file()
    assert basicsr('test', options) == 0
    second = metrics(tmp_path, 'tiny')
    assert second['checkpoint'].endswith('net_g_calibrated.pth')
    assert first['datasets']['Val']['psnr'] == second['datasets']['Val']['psnr']
    options['path']['param_key_g'] = 'params'
    assert basicsr('test', options, '--checkpoint', source) == 0  # an FP32 file calibrates again, to the same ranges
    assert metrics(tmp_path, 'tiny')['datasets']['Val']['psnr'] == first['datasets']['Val']['psnr']


def test_users_components(options: dict[str, Any], basicsr: Run, tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / 'user_parts.py').write_text(
        'import torch\n'
        'from basicsr.models.sr_model import SRModel\n'
        'from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY\n'
        '@ARCH_REGISTRY.register()\n'
        'class UserNet(torch.nn.Module):\n'
        '    def __init__(self):\n'
        '        super().__init__()\n'
        '        self.a, self.b, self.c = (torch.nn.Conv2d(i, o, 3, 1, 1) for i, o in ((3, 8), (8, 8), (8, 12)))\n'
        '    def forward(self, x):\n'
        '        return torch.pixel_shuffle(self.c(self.b(self.a(x).relu()).relu()), 2)\n'
        '@MODEL_REGISTRY.register()\n'
        'class UserModel(SRModel):\n'
        '    def optimize_parameters(self, current_iter):\n'
        '        self.touched = True\n'
        '        super().optimize_parameters(current_iter)\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    options = quantized(options)
    options.update(imports=['user_parts'], model_type='UserModel', network_g={'type': 'UserNet'})
    assert basicsr('train', options) == 0
    plan = network(tmp_path, 'tiny', 'latest')['quant']['plan']
    assert [layer['layer'] for layer in plan['layers'] if layer['w_bits'] == 4] == ['b']
    assert basicsr('train', {**options, 'imports': ['no_such_module']}) == 2


def test_swinir_model(options: dict[str, Any], basicsr: Run, tmp_path: Path) -> None:
    options = quantized(options, 'odm')
    options['train']['total_iter'] = 2
    options.update(model_type='SwinIRModel', network_g={
        'type': 'SwinIR', 'upscale': 2, 'in_chans': 3, 'img_size': 8, 'window_size': 4, 'img_range': 1.0,
        'depths': [2], 'embed_dim': 12, 'num_heads': [2], 'mlp_ratio': 2, 'upsampler': 'pixelshuffledirect',
        'resi_connection': '1conv',
    })  # fmt: skip
    assert basicsr('train', options) == 0
    assert basicsr('test', options) == 0
    kinds = {layer['type'] for layer in metrics(tmp_path, 'tiny')['plan'] if layer['a_bits'] == 4}
    assert kinds == {'Conv2d', 'Linear'}


BAD: dict[str, tuple[dict[str, Any], str]] = {
    'method': ({'method': 'odmm'}, "did you mean 'odm'?"),
    'bits': ({'w_bits': 9}, 'quant.w_bits: 9 given'),
    'one bit': ({'a_bits': 1}, '2 to 8'),
    'unknown key': ({'a_bit': 4}, "quant.a_bit is not an option (did you mean 'a_bits'?)"),
    'glob': ({'layers': {'bdy.*': 'fp'}}, "'bdy.*' matches no layer"),
    'other method': ({'method': 'pams', 'odm': {}}, 'quant.odm is given'),
    'choice': ({'odm': {'gate': 'sine'}}, 'quant.odm.gate'),
    'images': ({'calibration': {'num_images': 11}}, '11 given'),
    'test set': ({'calibration': {'num_images': 2, 'dataset': 'VAL'}}, 'which is the test set'),
    'nothing left': ({'w_bits': 32, 'a_bits': 32}, 'nothing is left to quantize'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_blocks_change_nothing(
    case: str, options: dict[str, Any], basicsr: Run, tmp_path: Path, capsys: Any
) -> None:
    change, sentence = BAD[case]
    earlier = tmp_path / 'experiments' / 'tiny'
    earlier.mkdir(parents=True)
    options = quantized(options)
    options['quant'].update(copy.deepcopy(change))
    if change.get('calibration', {}).get('dataset') == 'VAL':
        options['quant']['calibration']['dataset'] = {'dataroot_lq': options['datasets']['val']['dataroot_lq']}
    assert basicsr('train', options) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and sentence in error
    assert os.listdir(tmp_path / 'experiments') == ['tiny'] and not os.listdir(earlier)


def test_gan_models_are_not_trained_but_tested(options: dict[str, Any], basicsr: Run, capsys: Any) -> None:
    options = quantized(options)
    options['model_type'] = 'ESRGANModel'
    assert basicsr('train', options) == 2
    assert 'is a GAN model' in capsys.readouterr().err


def test_a_checkpoint_of_another_plan_is_refused(
    options: dict[str, Any], basicsr: Run, tmp_path: Path, capsys: Any
) -> None:
    options = quantized(options, 'minmax')
    options['train']['total_iter'] = 1
    assert basicsr('train', options) == 0
    for change, words in (({'a_bits': 8}, 'at W4A4'), ({'method': 'mse'}, "quant.method 'minmax'")):
        other = copy.deepcopy(options)
        other['quant'].update(change)
        assert basicsr('test', other) == 2
        assert words in capsys.readouterr().err


@pytest.mark.slow
def test_two_gloo_ranks_end_with_equal_ranges(options: dict[str, Any], option_file: Any, tmp_path: Path) -> None:
    options = quantized(options, 'odm')
    options['datasets']['train'].update(batch_size_per_gpu=2)
    options['train'].update(total_iter=2, ema_decay=0.9)
    script = tmp_path / 'ranks.py'
    script.write_text(
        'import os, sys, torch\n'
        'import basicsr_quant\n'
        'basicsr_quant.enable()\n'
        'import basicsr.train as host\n'
        'from basicsr.models.sr_model import SRModel\n'
        'saved = SRModel.save\n'
        'def save(self, epoch, current_iter):\n'
        '    torch.save(self.get_bare_model(self.net_g).state_dict(), f"rank{os.environ[\'RANK\']}.pth")\n'
        '    saved(self, epoch, current_iter)\n'
        'SRModel.save = save\n'
        'host.train_pipeline(os.getcwd())\n'
    )
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', '2', '--standalone', str(script)]
    root = str(Path(importlib.import_module('basicsr_quant').__file__ or '').parents[1])
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': root}
    done = subprocess.run(
        [*command, '-opt', option_file(options), '--launcher', 'pytorch'],
        cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ranks = [torch.load(tmp_path / f'rank{r}.pth', weights_only=True) for r in (0, 1)]
    assert same_tensors(*ranks)
    moved = [k for k in ranks[0] if k.endswith('input_quantizer.upper')]
    assert moved and all(ranks[0][k] > 0 for k in moved)


def test_a_stock_file_of_a_network_that_cannot_be_traced_is_the_hosts(
    options: dict[str, Any], basicsr: Run, tmp_path: Path, monkeypatch: Any
) -> None:
    (tmp_path / 'odd_parts.py').write_text(
        'import torch\n'
        'from basicsr.utils.registry import ARCH_REGISTRY\n'
        '@ARCH_REGISTRY.register()\n'
        'class OddNet(torch.nn.Module):\n'
        '    def __init__(self):\n'
        '        super().__init__()\n'
        '        self.conv = torch.nn.Conv2d(3, 12, 3, 1, 1)\n'
        '    def forward(self, x):\n'
        '        assert x.shape[-2:] == (16, 20)\n'
        '        return torch.pixel_shuffle(self.conv(x), 2)\n'
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    options.update(imports=['odd_parts'], network_g={'type': 'OddNet'})
    assert basicsr('test', options) == 0
    assert (tmp_path / 'results/tiny').is_dir() and not list(tmp_path.glob('results/tiny/metrics.*'))
    assert basicsr('test', {**options, 'quant': {'method': 'minmax'}}) == 2
