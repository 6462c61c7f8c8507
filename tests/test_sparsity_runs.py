"""``sparsity:`` through the host's pipelines: training, resuming, testing, calibrating, and what is refused first."""

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

FAST = {'score_lr': 100, 'cost_weight': 100, 'epoch': 2}


@pytest.fixture
def sparse(options: dict[str, Any], images: Path, tmp_path: Path, monkeypatch: Any) -> dict[str, Any]:
    """The tiny option file with SLS, in a folder of its own; the first step of its EDSR meets the budget soon."""
    monkeypatch.chdir(tmp_path)
    options['network_g']['num_feat'] = 16
    options['sparsity'] = {'method': 'sls', 'M': 8, 'budget': 0.5, 'sls': dict(FAST)}
    return options


def quantized(opt: dict[str, Any], images: Path, **more: Any) -> dict[str, Any]:
    data = {'dataroot_lq': str(images / 'lq.lmdb'), 'io_backend': {'type': 'lmdb'}}
    return {**opt, 'quant': {'method': 'lsq', 'w_bits': 4, 'a_bits': 4, **more,
                             'calibration': {'num_images': 4, 'dataset': data}}}  # fmt: skip


def saved(name: str, label: Any = 'latest') -> dict[str, Any]:
    return torch.load(f'experiments/{name}/models/net_g_{label}.pth', weights_only=True)


@pytest.mark.parametrize('quant', [False, True], ids=['alone', 'with quant'])
def test_train_resume_and_test(quant: bool, sparse: dict[str, Any], images: Path, option_file: Any, said: Any) -> None:
    compat.apply()
    from basicsr_quant.models.preparation import build_float

    torch.save({'params': build_float(sparse['network_g']).state_dict()}, 'fp32.pth')
    sparse['path']['pretrain_network_g'] = 'fp32.pth'
    opt = quantized(sparse, images) if quant else sparse
    whole = {**copy.deepcopy(opt), 'name': 'whole'}
    assert main(['train', '-opt', option_file(whole)]) == 0
    assert any('density: ' in line and 'l_cost: ' in line for line in said)
    opt['train']['total_iter'] = opt['logger']['save_checkpoint_freq'] = 3
    assert main(['train', '-opt', option_file(opt)]) == 0
    opt['train']['total_iter'] = 8
    assert main(['train', '-opt', option_file(opt), '--auto_resume']) == 0
    one, two = saved('whole'), saved('tiny')
    for key in ('params', 'params_ema'):
        assert one[key].keys() == two[key].keys()
        assert not [name for name, value in one[key].items() if not torch.equal(value, two[key][name])]
        kept = [value for name, value in one[key].items() if name.endswith('.kept')]
        assert len(kept) == 4 and all(torch.equal(v, one['params'][n]) for n, v in one[key].items() if 'mask.' in n and
                                      not n.endswith('scores'))  # fmt: skip
    found = one['quant']['plan']['sparsity']
    assert found['method'] == 'sls' and [x['kept'] for x in found['layers']] == [int(v) for v in kept]
    assert main(['test', '-opt', option_file(whole)]) == 0
    metrics = json.loads(Path('results/whole/metrics.json').read_text())
    assert metrics['checkpoint'].endswith('experiments/whole/models/net_g_latest.pth')
    assert metrics['sparsity']['share'] <= 0.5 and metrics['method'] == ('lsq' if quant else 'none')
    cost = metrics['cost']
    assert cost['masked_macs'] < cost['macs'] and cost['masked_weight_bytes'] < cost['weight_bytes']
    assert [x['kept'] for x in metrics['sparsity']['layers']] == [int(v) for v in kept]
    assert any('engines: none has kernels' in note for note in cost['notes'])
    assert any('of these the masks keep' in line and 'bytes with their places' in line for line in said)
    assert '## Sparsity' in Path('results/whole/metrics.md').read_text()


def test_one_shot_needs_no_training(sparse: dict[str, Any], images: Path, option_file: Any) -> None:
    dense = {k: v for k, v in sparse.items() if k != 'sparsity'}
    dense['train']['total_iter'] = 1
    assert main(['train', '-opt', option_file(dense)]) == 0
    start = 'experiments/tiny/models/net_g_latest.pth'
    opt = quantized({**sparse, 'name': 'shot', 'sparsity': {'method': 'one_shot', 'M': 4, 'budget': 0.5}}, images)
    opt['path'] = {'pretrain_network_g': start}
    assert main(['calibrate', '-opt', option_file(opt)]) == 0
    state = saved('shot', 'calibrated')['params']
    fp = torch.load(start, weights_only=True)['params']
    assert torch.equal(state['body.0.conv1.weight'], fp['body.0.conv1.weight']), 'masks change no weight'
    ranks = state['body.0.conv1.weight_mask.ranks']
    assert int(state['body.0.conv1.weight_mask.kept']) == 2 and ranks.dtype == torch.uint8
    assert float((ranks < 2).float().mean()) == 0.5
    assert main(['test', '-opt', option_file(opt)]) == 0
    metrics = json.loads(Path('results/shot/metrics.json').read_text())
    assert metrics['checkpoint'].endswith('net_g_calibrated.pth') and metrics['sparsity']['share'] == 0.5


def test_a_sparse_file_is_quantized_afterwards_with_its_masks(
    sparse: dict[str, Any], images: Path, option_file: Any
) -> None:
    assert main(['train', '-opt', option_file(sparse)]) == 0
    start = 'experiments/tiny/models/net_g_latest.pth'
    opt = quantized({**sparse, 'name': 'ptq', 'path': {'pretrain_network_g': start}}, images)
    assert main(['calibrate', '-opt', option_file(opt)]) == 0
    one, two = torch.load(start, weights_only=True)['params'], saved('ptq', 'calibrated')['params']
    masks = [name for name in one if '.weight_mask.' in name]
    assert masks and all(torch.equal(one[name], two[name]) for name in masks)
    assert json.loads(Path('results/ptq/metrics.json').read_text())['method'] == 'lsq'


@pytest.mark.parametrize(
    ('command', 'change', 'said'),
    [
        ('train', {'M': 12}, 'sparsity.M: 12 given, allowed: 4 | 8 | 16 | 32; the nearest is 8'),
        ('train', {'budget': 0.01}, 'at least 0.125 of the MACs remain; give 0.125 or more, or a larger M than 8'),
        ('calibrate', {}, "sparsity.method: 'sls' learns its masks in training, but"),
        ('test', {}, 'run `basicsr train` first, or use one_shot'),
    ],
)
def test_refused_before_anything_is_written(
    command: str, change: dict[str, Any], said: str, sparse: dict[str, Any], images: Path, option_file: Any,
    capsys: Any,
) -> None:  # fmt: skip
    compat.apply()
    from basicsr_quant.models.preparation import build_float

    torch.save({'params': build_float(sparse['network_g']).state_dict()}, 'fp32.pth')
    sparse['path']['pretrain_network_g'] = 'fp32.pth'
    sparse['sparsity'].update(change)
    assert main([command, '-opt', option_file(sparse)]) == 2
    assert said in capsys.readouterr().err
    assert not Path('experiments').exists()


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        (None, 'was made with sparsity, the option file has no sparsity block'),
        ({'method': 'one_shot', 'M': 8, 'budget': 0.5}, 'was made with sparsity.method sls, the option file'),
        ({'method': 'sls', 'M': 16, 'budget': 0.5}, 'was made with sparsity.M 8, the option file says 16'),
        ({'method': 'sls', 'M': 8, 'layers': {'upsample*': 'dense'}, 'budget': 0.5}, "has layer 'upsample.0' masked"),
    ],
)
def test_a_file_with_other_masks_is_refused(
    change: Any, said: str, sparse: dict[str, Any], option_file: Any, capsys: Any
) -> None:
    sparse['train']['total_iter'] = 1
    assert main(['train', '-opt', option_file(sparse)]) == 0
    opt = {**sparse, 'sparsity': change, 'quant': {'method': 'none'}}
    capsys.readouterr()
    assert main(['test', '-opt', option_file(opt)]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    'stem', ['EDSR_x4_SLS', 'CARN_x4_SLS', 'EDSR_x4_SLS_W4A4_ODM', 'EDSR_x4_OneShot', 'EDSR_x4_SRSTE']
)
def test_shipped_files_run_with_small_networks_and_data(
    stem: str, options: dict[str, Any], images: Path, option_file: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = yaml.safe_load((Path(__file__).parents[1] / 'options' / f'{stem}.yml').read_text())
    small = {'num_feat': 8, 'upscale': 2, **({} if stem.startswith('CARN') else {'num_block': 2})}
    opt = {**options, 'name': stem, 'network_g': {**shipped['network_g'], **small}, 'sparsity': shipped['sparsity']}
    if 'quant' in shipped:
        opt = quantized(opt, images)
        opt['quant'] = {**shipped['quant'], 'calibration': opt['quant']['calibration']}
    opt['train'] = {**options['train'], 'optim_g': shipped['train']['optim_g'], 'total_iter': 2}
    opt['logger']['save_checkpoint_freq'] = 2
    opt['datasets']['val'].pop('filename_tmpl', None)
    assert main(['train', '-opt', option_file(opt)]) == 0
    assert main(['test', '-opt', option_file(opt)]) == 0
    found = json.loads(Path(f'results/{stem}/metrics.json').read_text())
    assert found['sparsity']['method'] == shipped['sparsity']['method'] and found['datasets']['Val']['psnr'] > 0
    assert len(found['sparsity']['layers']) == {'CARN': 31, 'EDSR': 6}[stem[:4]]
