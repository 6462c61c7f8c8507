"""The option files that ship: what they name fits together and every ``quant:`` block is accepted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from basicsr_quant.config import read_config
from basicsr_quant.sparsity import read_sparsity
from basicsr_quant.sparsity.filter_options import read_filter_pruning

FOLDER = Path(__file__).parents[1] / 'options'
FILES = sorted(FOLDER.glob('*.yml'))


def read(file: Path) -> dict[str, Any]:
    return yaml.safe_load(file.read_text())


def named(files: list[Path]) -> Any:
    return pytest.mark.parametrize('file', files, ids=lambda f: f.stem)


def test_there_is_a_file_for_every_method_and_width():
    stems = {f.stem for f in FILES}
    odm = {f'EDSR_x{scale}_W{bits}A{bits}_ODM' for scale in (2, 4) for bits in (2, 3, 4)}
    baselines = {f'EDSR_x4_W4A4_{m}' for m in ('ODMv1', 'PAMS', 'DAQ', 'AdaBM', 'LSQ', 'auto')}
    mobile = {f'{net}_x2_{kind}' for net in ('ABPN', 'XLSR') for kind in ('FP32', 'W8A8_CFQP')}
    baselines |= {f'EDSR_x4_W4A4_{m}' for m in ('MinMax', 'Percentile', 'MSE')}
    baselines |= {f'EDSR_x4_W{bits}A{bits}_DDTB' for bits in (2, 3, 4)} | {'EDSR_x4_W2A2_DAQ'}
    baselines |= {f'{net}_x4_W8A8_{m}' for net in ('EDSR', 'SRResNetBN', 'CARN', 'IDN') for m in ('PAMS', 'CADyQ')}
    assert odm | baselines | mobile | {'EDSR_x4_W8A8_PAMS', 'EDSR_x4_FP32', 'EDSR_x2_FP32'} <= stems


SPARSE = {
    'EDSR_x4_SLS': 'sls', 'CARN_x4_SLS': 'sls', 'EDSR_x4_SLS_W4A4_ODM': 'sls', 'EDSR_x4_OneShot': 'one_shot',
    'EDSR_x4_SRSTE': 'sr_ste',
}  # fmt: skip


@named([FOLDER / f'{stem}.yml' for stem in SPARSE])
def test_sparsity_block_is_accepted_with_the_published_schedule(file):
    opt = read(file)
    config, train = read_sparsity(opt['sparsity']), opt['train']
    assert (config.method, config.M, config.budget) == (SPARSE[file.stem], 32, 0.25)
    assert (train['total_iter'], train['scheduler']['milestones']) == (300000, [200000])
    data = opt['datasets']['train']
    assert train['optim_g']['lr'] == 1e-4 and (data['batch_size_per_gpu'], data['gt_size']) == (16, 192)
    assert {f.stem for f in FILES if 'sparsity' in read(f)} == {*SPARSE, *PRUNED}


PRUNED = ('SRResNetBN_x4_BNFilter',)


@named([FOLDER / f'{stem}.yml' for stem in PRUNED])
def test_pruning_block_is_accepted(file):
    assert read_filter_pruning(read(file)['sparsity']).method == 'bn_filter'


@named([f for f in FILES if '_FP32' not in f.stem])
def test_every_file_trains_something(file):
    assert {'quant', 'sparsity'} & set(read(file))


@named(FILES)
def test_name_scale_and_network_agree(file):
    opt = read(file)
    scale = opt['scale']
    assert opt['name'] == file.stem and f'_x{scale}_' in file.stem
    assert opt['network_g']['upscale'] == scale
    assert {m['crop_border'] for m in opt['val']['metrics'].values()} == {scale}
    for data in opt['datasets'].values():
        assert f'X{scale}' in data['dataroot_lq'], 'LR images of another scale'


@named([f for f in FILES if '_FP32' not in f.stem and 'quant' in read(f)])
def test_quant_block_is_accepted_and_is_what_the_name_says(file):
    config = read_config(read(file)['quant'])
    _, bits, method = file.stem.rsplit('_', 2)
    assert bits == f'W{config.w_bits}A{config.a_bits}'
    assert method.lower() == config.method.replace('_', '')


OWN_SCHEDULE = ('CADyQ', 'DDTB', 'W2A2_DAQ', *SPARSE)


@named([f for f in FILES if f.stem.startswith('EDSR') and not f.stem.endswith(OWN_SCHEDULE)])
def test_papers_schedule(file):
    opt = read(file)
    train = opt['train']
    assert train['optim_g']['lr'] == 1e-4 and train['pixel_opt']['type'] == 'L1Loss'
    if 'FP32' not in file.stem:
        assert train['total_iter'] == 60000 and train['scheduler']['milestones'] == [15000, 30000, 45000]
        assert opt['datasets']['train']['batch_size_per_gpu'] == 8


@named([f for f in FILES if f.stem.endswith(('DDTB', 'W2A2_DAQ'))])
def test_published_schedules_of_ddtb_and_daq(file):
    opt = read(file)
    train, data, quant = opt['train'], opt['datasets']['train'], opt['quant']
    found = (train['optim_g']['lr'], data['batch_size_per_gpu'], train['total_iter'], train['scheduler']['milestones'])
    assert data['gt_size'] == 192
    if file.stem.endswith('DAQ'):
        assert found == (5e-5, 4, 60000, [150000])
    else:  # the first of 60 epochs trains nothing there
        epochs = [1000 * (epoch - 1) for epoch in (10, 20, 30, 40, 50, 60)]
        assert found == (1e-4, 16, epochs.pop(), epochs)
        assert (quant['ddtb']['warm_up'], quant['ddtb']['dynamic_ratio']) == (4000, 0.3)
        assert quant['distill']['layers'] == {'conv_after_body': 1000}


@named([f for f in FILES if 'CADyQ' in f.stem])
def test_both_stages_of_cadyq_fit_together(file):
    first, second = read(file.with_name(file.name.replace('CADyQ', 'PAMS'))), read(file)
    assert second['path']['pretrain_network_g'] == f'experiments/{first["name"]}/models/net_g_latest.pth'
    assert first['network_g'] == second['network_g']
    assert first['quant'].get('layers') == second['quant'].get('layers')
    carn = file.stem.startswith('CARN')
    train, cadyq = second['train'], second['quant']['cadyq']
    wanted = (600000, [400000]) if carn else (300000, [150000])
    assert (train['total_iter'], train['scheduler']['milestones']) == wanted
    assert train['optim_g']['lr'] * cadyq['selector_lr'] == pytest.approx(1e-3 if carn else 1e-4)
    assert second['datasets']['train']['batch_size_per_gpu'] == 16 and second['datasets']['train']['gt_size'] == 192
    assert sorted(second['quant']['distill']['layers'].values()) == [100, 1000]


@named([f for f in FILES if not f.stem.startswith('demo')])
def test_data_lie_where_the_preparing_tool_puts_them(file):
    opt = read(file)
    train, scale = opt['datasets'].get('train'), opt['scale']
    lq = f'datasets/DIV2K/DIV2K_train_LR_bicubic_X{scale}_sub.lmdb'
    if train is None:  # for `basicsr calibrate` alone
        assert opt['quant']['calibration']['dataset']['dataroot_lq'] == lq
    else:
        assert (train['dataroot_gt'], train['dataroot_lq']) == ('datasets/DIV2K/DIV2K_train_HR_sub.lmdb', lq)
    for key in ('val_1', 'val_2'):
        val = opt['datasets'][key]
        assert val['dataroot_gt'] == f'datasets/{val["name"]}/HR'
        assert val['filename_tmpl'] == f'{{}}x{scale}'


@named([f for f in FILES if f.stem.startswith('demo')])
def test_demo_never_learns_from_what_it_is_measured_on(file):
    opt = read(file)
    seen = [opt['datasets'].get('train', {}), (opt.get('quant', {}).get('calibration') or {}).get('dataset', {})]
    roots = {root for data in seen for key, root in data.items() if key.startswith('dataroot')}
    assert not any('held_out' in root for root in roots)
    assert 'held_out' in opt['datasets']['val']['dataroot_gt']
