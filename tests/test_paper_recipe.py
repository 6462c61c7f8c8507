"""The option file of the paper, as it ships: nothing overridden but paths, iterations, batch and workers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from basicsr_quant import compat
from basicsr_quant.cli import main

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')

FILE = str(Path(__file__).parents[1] / 'options' / 'EDSR_x4_W4A4_ODM.yml')


def test_without_data_one_sentence_says_how_to_get_them(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(['train', '-opt', FILE]) == 2
    error = capsys.readouterr().err
    assert error.count('\n') == 1 and 'python tools/prepare_div2k.py' in error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_trains_four_iterations_and_tests(tmp_path: Path, monkeypatch: Any) -> None:
    data = pytest.importorskip('skimage.data')
    monkeypatch.chdir(tmp_path)
    overrides = paths(tmp_path, data.astronaut()[..., ::-1])
    overrides += [
        'train:total_iter=4',
        'datasets:train:batch_size_per_gpu=1',
        'datasets:train:num_worker_per_gpu=0',
    ]
    assert main(['train', '-opt', FILE, '--force_yml', *overrides]) == 0
    assert main(['test', '-opt', FILE, '--force_yml', *overrides]) == 0
    found = json.loads((tmp_path / 'results/EDSR_x4_W4A4_ODM/metrics.json').read_text())
    assert set(found['datasets']) == {'Set5', 'Set14'}
    assert found['checkpoint'].endswith('experiments/EDSR_x4_W4A4_ODM/models/net_g_latest.pth')
    assert found['cost']['macs'] == 114_230_476_800 and found['datasets']['Set5']['fab'] == 4.0
    assert sum(layer['a_bits'] == 4 for layer in found['plan']) == 32


def paths(folder: Path, photograph: Any) -> list[str]:
    """Make what the file reads from one photograph; return the overrides of its paths."""
    import cv2

    compat.apply()  # the host is imported below, perhaps for the first time

    from basicsr_quant.data.bicubic import low_resolution
    from basicsr_quant.data.sub_images import entries, write_lmdb
    from basicsr_quant.models.preparation import build_float
    from basicsr_quant.option_file import read

    lr = low_resolution(photograph, 4)
    write_lmdb(folder / 'hr.lmdb', [entries('astronaut', photograph, 240, 136)])
    write_lmdb(folder / 'lr.lmdb', [entries('astronaut', lr, 60, 34)])
    for kind, image, name in (('HR', photograph[:128, :160], 'a'), ('LR', lr[:32, :40], 'ax4')):
        (folder / kind).mkdir()
        cv2.imwrite(str(folder / kind / f'{name}.png'), image)
    compat.apply()
    torch.manual_seed(0)
    network = folder / 'fp32.pth'
    torch.save({'params': build_float(read(FILE)['network_g']).state_dict()}, network)
    made = [f'datasets:train:dataroot_gt={folder}/hr.lmdb', f'datasets:train:dataroot_lq={folder}/lr.lmdb']
    for val in ('val_1', 'val_2'):
        made += [f'datasets:{val}:dataroot_gt={folder}/HR', f'datasets:{val}:dataroot_lq={folder}/LR']
    return [*made, f'path:pretrain_network_g={network}']
