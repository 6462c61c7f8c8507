"""CADyQ's two stages through the host's pipelines, with the shipped option files shortened."""

from __future__ import annotations

import argparse
import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from basicsr_quant import compat
from basicsr_quant.cli import _two_stages, main
from basicsr_quant.errors import QuantError

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')

FOLDER = Path(__file__).parents[1] / 'options'
SMALL: dict[str, dict[str, Any]] = {  # upscale 2, as the tiny images
    'EDSR': {'num_feat': 4, 'num_block': 2},
    'SRResNetBN': {'num_feat': 4, 'num_block': 2},
    'IDN': {'num_feat': 16, 'num_block': 4, 'step': 4},
    'CARN': {'num_feat': 8},
}


def shortened(options: dict[str, Any], images: Path, stem: str, start: str | None) -> dict[str, Any]:
    """The shipped block and network on the tiny data: 4 iterations of the shipped loss and optimizer."""
    shipped = yaml.safe_load((FOLDER / f'{stem}.yml').read_text())
    opt = {**copy.deepcopy(options), 'name': stem}
    kind = shipped['network_g']['type']
    opt['network_g'] = {**shipped['network_g'], **SMALL[kind], 'upscale': 2}
    data = {'dataroot_lq': str(images / 'lq.lmdb'), 'io_backend': {'type': 'lmdb'}}
    opt['quant'] = {**shipped['quant'], 'calibration': {'num_images': 4, 'dataset': data}}
    if kind == 'EDSR' and 'distill' in opt['quant']:
        opt['quant']['cadyq']['bit_weight'] = 1e3  # so that bits move within 4 iterations
        opt['quant']['cadyq']['selector_lr'] = 1000
    opt['path']['pretrain_network_g'] = start
    opt['train']['optim_g'] = shipped['train']['optim_g']
    opt['train']['total_iter'] = 4
    return opt


@pytest.mark.parametrize('kind', list(SMALL))
def test_two_stages_from_two_option_files(
    kind: str, options: dict[str, Any], images: Path, option_file: Any, tmp_path: Path, monkeypatch: Any,
    caplog: Any,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    logger = logging.getLogger('basicsr')  # which does not propagate
    monkeypatch.setattr(logger, 'handlers', [*logger.handlers, caplog.handler])
    first, second = f'{kind}_x4_W8A8_PAMS', f'{kind}_x4_W8A8_CADyQ'
    assert main(['train', '-opt', option_file(shortened(options, images, first, None))]) == 0
    start = f'experiments/{first}/models/net_g_latest.pth'
    file = option_file(shortened(options, images, second, start))
    caplog.clear()
    assert main(['train', '-opt', file]) == 0
    log = caplog.text
    assert f'Teacher: {start}, attention losses' in log and 'Calibrated' not in log
    assert 'l_distill: ' in log and 'l_bits: ' in log
    saved = torch.load(tmp_path / f'experiments/{second}/models/net_g_latest.pth', weights_only=True)
    pams = torch.load(tmp_path / start, weights_only=True)
    steps = saved['params']['quant_measures.progress.steps']
    assert steps == 4 and torch.equal(saved['params_ema']['quant_measures.progress.steps'], steps)
    units = {k: v for k, v in saved['params'].items() if k.endswith('input_quantizer.unit')}
    assert units and all(torch.equal(v, pams['params'][k]) for k, v in units.items())
    assert not any('teacher' in k for k in saved['params'])
    if kind == 'EDSR':
        opt = yaml.safe_load(Path(file).read_text())
        opt['quant'].update(patch={'size': 12, 'stride': 10}, save_bits=True)
        file = option_file(opt)
    assert main(['test', '-opt', file]) == 0
    pictures = list((tmp_path / f'results/{second}/visualization/Val').glob('*_bits.png'))
    assert len(pictures) == (10 if kind == 'EDSR' else 0)
    found = json.loads((tmp_path / f'results/{second}/metrics.json').read_text())
    fab = found['datasets']['Val']['fab']
    assert found['cost']['fab'] == pytest.approx(fab) and (4.0 <= fab < 8.0 if kind == 'EDSR' else fab <= 8.0)


def test_normalized_features_are_measured_on_the_network_that_is_taken_over(
    options: dict[str, Any], images: Path, option_file: Any, tmp_path: Path, monkeypatch: Any, said: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = (f'EDSR_x4_W8A8_{method}' for method in ('PAMS', 'CADyQ'))
    assert main(['train', '-opt', option_file(shortened(options, images, first, None))]) == 0
    opt = shortened(options, images, second, f'experiments/{first}/models/net_g_latest.pth')
    opt['quant']['cadyq']['normalize'] = True
    file = option_file(opt)
    assert main(['train', '-opt', file]) == 0
    assert any(line.startswith('Measured on ') for line in said)
    saved = torch.load(tmp_path / f'experiments/{second}/models/net_g_latest.pth', weights_only=True)
    for key in (k for k in saved['params'] if k.endswith('.feature_mean')):
        assert (saved['params'][key] > 0).any() and torch.equal(saved['params'][key], saved['params_ema'][key])
    said.clear()
    assert main(['test', '-opt', file]) == 0
    assert not any(line.startswith(('Measured', 'Calibrated')) for line in said)


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        ({'distill': {'teacher': 'fp32'}}, "quant.distill.teacher: 'fp32' given, but"),
        ({'distill': {'teacher': 'nowhere.pth'}}, 'there is no checkpoint nowhere.pth'),
        ({'distill': {'layers': ['bodi']}}, "quant.distill.layers: 'bodi' matches no module"),
        ({'cadyq': {'bits': [4, 9]}}, 'quant.cadyq.bits: [4, 9] given'),
        ({'cadyq': {'bits': [2, 4]}}, 'the highest of quant.cadyq.bits is 4'),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    change: dict[str, Any], said: str, options: dict[str, Any], images: Path, option_file: Any, tmp_path: Path,
    monkeypatch: Any, capsys: Any,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(['train', '-opt', option_file(shortened(options, images, 'EDSR_x4_W8A8_PAMS', None))]) == 0
    capsys.readouterr()
    start = 'experiments/EDSR_x4_W8A8_PAMS/models/net_g_latest.pth'
    opt = shortened(options, images, 'EDSR_x4_W8A8_CADyQ', start)
    opt['quant'].update(change)
    assert main(['train', '-opt', option_file(opt)]) != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / 'experiments/EDSR_x4_W8A8_CADyQ').exists()


def test_a_teacher_of_another_network_is_refused(
    options: dict[str, Any], images: Path, option_file: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(['train', '-opt', option_file(options)]) == 0
    options['network_g']['num_feat'] = 8
    distill = {'teacher': 'experiments/tiny/models/net_g_latest.pth', 'layers': ['conv_after_body']}
    data = {'dataroot_lq': str(images / 'lq.lmdb'), 'io_backend': {'type': 'lmdb'}}
    options['quant'] = {'method': 'pams', 'distill': distill, 'calibration': {'dataset': data}}
    options['name'] = 'other'
    capsys.readouterr()
    assert main(['train', '-opt', option_file(options)]) != 0
    said = capsys.readouterr().err
    assert 'quant.distill.teacher: ' in said and 'is not of this network' in said
    options['quant']['distill']['teacher'] = 'start'
    assert main(['train', '-opt', option_file(options)]) != 0
    assert "'start' is path.pretrain_network_g, which is not given" in capsys.readouterr().err


def test_both_stages_of_one_option_file(options: dict[str, Any], images: Path) -> None:
    whole = shortened(options, images, 'EDSR_x4_W8A8_CADyQ', 'fp32.pth')
    whole['train']['scheduler'] = {'type': 'MultiStepLR', 'milestones': [100, 300], 'gamma': 0.5}
    whole['train']['total_iter'] = 400
    whole['quant']['distill']['teacher'] = 'fp32'
    whole['quant']['first_stage'] = {'total_iter': 40, 'lr': 2e-4, 'options': {'init': 'mse'}}
    first, second = _two_stages.stages_of(whole, 'experiments')
    assert first['name'] == 'EDSR_x4_W8A8_CADyQ_pams' and first['path'] == whole['path']
    assert first['quant'] == {
        'method': 'pams', 'pams': {'init': 'mse'},
        **{k: whole['quant'][k] for k in ('w_bits', 'a_bits', 'scope', 'skip', 'calibration')},
    }  # fmt: skip
    assert first['train']['total_iter'] == 40 and first['train']['optim_g']['lr'] == 2e-4
    assert first['train']['scheduler']['milestones'] == [10, 30]
    assert second['path']['pretrain_network_g'] == f'experiments/{first["name"]}/models/net_g_latest.pth'
    assert second['quant']['distill']['teacher'] == 'fp32.pth' and second['train'] == whole['train']
    assert 'first_stage' not in second['quant'] and 'first_stage' in whole['quant']
    assert 'debug_' in _two_stages.stages_of(whole, '', debug=True)[1]['path']['pretrain_network_g']


@pytest.mark.slow
def test_one_option_file_trains_both_stages(
    options: dict[str, Any], images: Path, option_file: Any, tmp_path: Path, monkeypatch: Any, said: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    opt = shortened(options, images, 'EDSR_x4_W8A8_CADyQ', None)
    opt['quant']['first_stage'] = {'total_iter': 2}
    file = option_file(opt)
    assert main(['train', '-opt', file, '--force_yml', 'train:total_iter=3']) == 0
    models = [tmp_path / f'experiments/EDSR_x4_W8A8_CADyQ{end}/models/net_g_latest.pth' for end in ('_pams', '')]
    pams, cadyq = (torch.load(model, weights_only=True) for model in models)
    assert pams['quant']['plan']['method'] == 'pams'
    assert cadyq['params']['quant_measures.progress.steps'] == 3
    assert any(line.startswith('Teacher: ') and '_pams/models/net_g_latest.pth' in line for line in said)
    written = models[0].stat().st_mtime_ns
    assert main(['train', '-opt', file, '--auto_resume']) == 0  # goes on with the second to iteration 4
    assert models[0].stat().st_mtime_ns == written
    assert torch.load(models[1], weights_only=True)['params']['quant_measures.progress.steps'] == 4
    assert main(['test', '-opt', file]) == 0  # the same file


@pytest.mark.parametrize(
    ('change', 'flags', 'said'),
    [
        ({'method': 'lsq', 'first_stage': {}}, [], "quant.first_stage is given, but method 'lsq' has one stage"),
        ({'first_stage': {'total': 3}}, [], "quant.first_stage.total is not an option (did you mean 'total_iter'?)"),
        ({'first_stage': {'options': {'bits': 3}}}, [], 'quant.first_stage.options.bits is not an option'),
        ({'first_stage': {}, 'cadyq': {'bits': [4, 12]}}, [], 'quant.cadyq.bits: [4, 12] given'),
        ({'first_stage': {}, 'distill': {'layers': ['bodi']}}, [], "quant.distill.layers: 'bodi' matches no module"),
        ({'first_stage': {}}, ['--launcher', 'pytorch'], 'quant.first_stage runs in one process'),
    ],
)
def test_a_first_stage_that_leads_nowhere_is_not_begun(
    change: dict[str, Any], flags: list[str], said: str, options: dict[str, Any], images: Path, option_file: Any,
    tmp_path: Path, monkeypatch: Any, capsys: Any,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    opt = shortened(options, images, 'EDSR_x4_W8A8_CADyQ', None)
    opt['quant'].update(change)
    if change.get('method'):
        del opt['quant']['cadyq'], opt['quant']['distill']
    assert main(['train', '-opt', option_file(opt), *flags]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / 'experiments').exists()


def test_another_train_script_is_told_that_it_trains_one_stage(options: dict[str, Any]) -> None:
    from basicsr_quant import seam

    options['quant'] = {'method': 'cadyq', 'first_stage': {}}
    given = argparse.Namespace(auto_resume=False, debug=False)
    with pytest.raises(QuantError, match=r'quant\.first_stage is a training of its own'):
        seam._prepare(options, 'train', '.', True, given)


def test_a_batch_of_mixed_sizes_is_one_sentence(
    options: dict[str, Any], option_file: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / 'uncropped.py').write_text(
        'import torch\nfrom basicsr.utils.registry import DATASET_REGISTRY\n\n\n'
        '@DATASET_REGISTRY.register()\nclass Uncropped(torch.utils.data.Dataset):\n'
        '    def __init__(self, opt):\n        self.opt = opt\n\n'
        '    def __len__(self):\n        return 6\n\n'
        '    def __getitem__(self, i):\n'
        '        return {"lq": torch.zeros(3, 8 + i, 8), "gt": torch.zeros(3, 16 + 2 * i, 16)}\n'
    )
    options['imports'] = ['uncropped']
    options['datasets']['train'].update(type='Uncropped', num_worker_per_gpu=1)
    assert main(['train', '-opt', option_file(options)]) == 2
    said = capsys.readouterr().err
    assert 'basicsr: error: datasets.train gives images of several sizes, [3, ' in said and 'Traceback' not in said
