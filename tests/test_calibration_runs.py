"""``basicsr calibrate`` as its user meets it: stages, files, BatchNorm, bad input; through the host's pipelines."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from basicsr_quant import compat
from basicsr_quant.cli import main

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')

ARCH = '''
import torch
from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

class NormBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.act = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.PReLU()
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)

    def forward(self, x):
        return x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))

if 'NormNet' not in ARCH_REGISTRY:
    @ARCH_REGISTRY.register()
    class NormNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 4, 3, padding=1)
            self.body = nn.Sequential(NormBlock(), NormBlock())
            self.up = nn.Sequential(nn.Conv2d(4, 12, 3, padding=1), nn.PixelShuffle(2))

        def forward(self, x):
            return self.up(self.body(self.first(x)))
'''


class Project:
    """A folder with an FP32 network of each kind, and option files to run."""

    def __init__(self, folder: Path, options: dict[str, Any], images: Path, write: Any) -> None:
        self.folder, self._write, self.images = folder, write, images
        self.options = copy.deepcopy(options)
        self.options['quant'] = {
            'method': 'minmax', 'w_bits': 8, 'a_bits': 8,
            'calibration': {'num_images': 3, 'dataset': {'dataroot_lq': str(images / 'lq.lmdb'),
                                                         'io_backend': {'type': 'lmdb'}}},
        }  # fmt: skip
        self.options['path']['pretrain_network_g'] = str(folder / 'float.pth')

    def with_norms(self) -> Project:
        """Take the network with BatchNorm, its statistics set."""
        (self.folder / 'norm_arch.py').write_text(ARCH)
        self.options.update(imports=['norm_arch'], network_g={'type': 'NormNet'})
        return self

    def save_float(self) -> None:
        from basicsr_quant.models.preparation import build_float
        from basicsr_quant.seam import import_components

        import_components(self.options.get('imports'))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            net = build_float(self.options['network_g'])
            for module in net.modules():
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.running_mean.normal_(0, 0.1)
                    module.running_var.uniform_(0.5, 2)
        torch.save({'params': net.state_dict()}, self.folder / 'float.pth')

    def run(self, command: str, *flags: str, **block: Any) -> int:
        self.options['quant'].update(block)
        return main([command, '-opt', self._write(self.options), *flags])

    def metrics(self) -> dict[str, Any]:
        return json.loads((self.folder / 'results/tiny/metrics.json').read_text())

    def network(self, label: str = 'calibrated') -> dict[str, Any]:
        return torch.load(self.folder / f'experiments/tiny/models/net_g_{label}.pth', weights_only=True)


@pytest.fixture
def project(
    tmp_path: Path, options: dict[str, Any], images: Path, option_file: Any, monkeypatch: pytest.MonkeyPatch
) -> Project:
    compat.apply()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return Project(tmp_path, options, images, option_file)


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ------------------------------------------------------------------------------------------------------- what it leaves


@pytest.mark.parametrize('method', ['minmax', 'percentile', 'mse', 'daq'])
def test_two_runs_are_equal_to_the_bit_and_so_are_folder_and_database(project: Project, method: str) -> None:
    project.save_float()
    copied = shutil.copytree(project.images / 'lq', project.folder / 'copied')  # the test set itself is refused
    folder = {'dataroot_lq': str(copied), 'io_backend': {'type': 'disk'}}
    found = []
    for dataset in (None, None, folder):
        if dataset is not None:
            project.options['quant']['calibration']['dataset'] = dataset
        assert project.run('calibrate', method=method, bias_correction='empirical', equalize=True) == 0
        found.append(project.network())
    assert same(found[0]['params'], found[1]['params']) and found[0]['quant'] == found[1]['quant']
    assert same(found[0]['params'], found[2]['params'])


def test_result_files_say_how_it_was_calibrated(project: Project) -> None:
    project.save_float()
    assert project.run('calibrate', method='daq', bias_correction='empirical') == 0
    found = project.metrics()['calibration']
    assert found['images'] == 3 and found['choices']['step_table'] in ('optimal', 'reference')
    assert list(found['seconds']) == [
        'observing activations', 'choosing step tables', 'comparing outputs', 'correcting biases'
    ]  # fmt: skip
    assert all(0 <= value < 60 for value in found['seconds'].values())
    page = (project.folder / 'results/tiny/metrics.md').read_text()
    assert 'Calibrated on 3 images in ' in page and '- step_table: ' in page
    assert project.run('test') == 0  # of the calibrated file
    assert project.metrics()['calibration'] == {**found, 'seconds': None}


def test_the_hosts_own_test_script_calibrates_alike(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    project.save_float()
    assert project.run('calibrate', method='mse', w_bits=3, a_bits=3, bias_correction='empirical') == 0
    found = project.metrics()
    shutil.rmtree(project.folder / 'experiments')
    script = Path(__file__).parents[1] / 'tools/test.py'
    monkeypatch.setattr(sys, 'argv', [str(script), '-opt', str(project.folder / 'options.yml')])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name='__main__')
    assert not end.value.code
    again = project.metrics()
    assert again['datasets']['Val']['psnr'] == found['datasets']['Val']['psnr']
    assert again['calibration']['images'] == 3 and set(again['calibration']['seconds']) == set(
        found['calibration']['seconds']
    )


# ------------------------------------------------------------------------------------------------------------ BatchNorm


def test_a_network_with_norms_is_folded_saved_loaded_and_tested(project: Project, capsys: Any) -> None:
    project.with_norms().save_float()
    assert project.run('calibrate', scope='all') == 0
    file = project.network()
    folds = {f'body.{i}.bn{j}': f'body.{i}.conv{j}' for i in (0, 1) for j in (1, 2)}
    assert file['quant']['plan']['settings']['folded'] == folds
    assert not any('.bn' in name for name in file['params']) and 'body.0.conv1.bias' in file['params']
    first = project.metrics()['datasets']['Val']['psnr']
    assert project.run('test') == 0
    assert project.metrics()['datasets']['Val']['psnr'] == first
    assert project.run('test', fold_bn=False) == 2
    assert 'made with 4 BatchNorm layers folded, the option file folds 0; set quant.fold_bn: true' in (
        capsys.readouterr().err
    )
    shutil.rmtree(project.folder / 'experiments')
    assert project.run('test', fold_bn=False) == 0  # the FP32 file again
    assert abs(project.metrics()['datasets']['Val']['psnr'] - first) < 0.3
    assert project.run('plan', fold_bn=None) == 0
    assert 'BatchNorm: 4 of 4 folded' in capsys.readouterr().out


@pytest.mark.parametrize(('fold', 'equalize'), [(None, False), (True, False), (True, True)])
def test_training_folds_if_it_is_asked_to(project: Project, fold: bool | None, equalize: bool) -> None:
    project.with_norms().save_float()
    project.options['train'].update(total_iter=2)
    del project.options['quant']['calibration']['dataset']
    project.options['datasets']['train'].update(
        {k: f'{project.images}/{n}.lmdb' for k, n in (('dataroot_gt', 'gt'), ('dataroot_lq', 'lq'))},
        io_backend={'type': 'lmdb'},
    )
    block = {} if fold is None else {'fold_bn': fold}
    assert project.run('train', method='odm', w_bits=4, a_bits=4, equalize=equalize, **block) == 0
    file = project.network('latest')
    assert any('.bn' in name for name in file['params']) == (fold is None)
    assert set(file['params']) == set(file['params_ema'])
    assert project.run('test') == 0  # where the option file leaves it open, the checkpoint decides
    assert project.metrics()['checkpoint'].endswith('net_g_latest.pth')


@pytest.mark.parametrize('block', [
    {'fold_bn': 'yes'}, {'equalize': 1}, {'bias_correction': 'analytic'}, {'bias_correction': True},
])  # fmt: skip
def test_options_out_of_range(project: Project, block: dict[str, Any], capsys: Any) -> None:
    project.save_float()
    assert project.run('calibrate', **block) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and f'quant.{next(iter(block))}' in said[0]


# ------------------------------------------------------------------------------------------------------------ bad input


def folder_with(project: Project, name: str, **files: Any) -> str:
    """A new folder of calibration images; bytes are written as they are."""
    cv2 = pytest.importorskip('cv2')
    folder = project.folder / name
    folder.mkdir()
    for stem, content in files.items():
        data = content if isinstance(content, bytes) else cv2.imencode('.png', content)[1].tobytes()
        (folder / f'{stem}.png').write_bytes(data)
    return str(folder)


def photo(*shape: int, dtype: Any = np.uint8) -> np.ndarray:
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max, shape).astype(dtype)


def png(image: np.ndarray) -> bytes:
    import cv2

    return cv2.imencode('.png', image)[1].tobytes()


BAD_FOLDERS = {
    'none': ({}, 'holds no images'),
    'fewer': ({'a': photo(16, 16, 3)}, '3 given, but'),
    'truncated': (
        {'a': photo(16, 16, 3), 'b': png(photo(16, 16, 3))[:300], 'c': photo(16, 16, 3)}, 'b.png cannot be read'
    ),
    'no image': ({'a': photo(16, 16, 3), 'b': photo(16, 16, 3), 'c': b'a text'}, 'c.png cannot be read'),
}  # fmt: skip


@pytest.mark.parametrize('kind', BAD_FOLDERS)
def test_folders_that_cannot_serve_are_one_sentence(project: Project, kind: str, capsys: Any) -> None:
    files, words = BAD_FOLDERS[kind]
    project.save_float()
    given = {'num_images': 3, 'dataset': {'dataroot_lq': folder_with(project, 'given', **files)}}
    assert project.run('calibrate', calibration=given) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert words in said[-1] and 'quant.calibration' in said[-1] and not any('Traceback' in line for line in said)
    assert not (project.folder / 'experiments/tiny/models/net_g_calibrated.pth').exists()


def test_small_gray_and_deep_images_are_handled_and_said(project: Project, said: list[str]) -> None:
    project.save_float()
    deep = photo(100, 100, 3, dtype=np.uint16)
    files = {'a': photo(20, 100, 3), 'b': photo(100, 100), 'c': deep, 'd': photo(100, 100, dtype=np.uint16)}
    calibration = {'dataset': {'dataroot_lq': folder_with(project, 'given', **files)}}
    assert project.run('calibrate', calibration=calibration, method='daq', bias_correction='empirical') == 0
    told = [line for line in said if line.startswith('Calibration: ')]
    assert [line[:29] for line in told] == [
        'Calibration: 1 of 4 images ar', 'Calibration: 2 of 4 images ar', 'Calibration: 2 of 4 images ar'
    ]  # once, though the images are gone through several times
    assert 'smaller than quant.calibration.patch_size 96' in told[0] and '16-bit' in told[1] and 'grayscale' in told[2]
    shutil.rmtree(project.folder / 'given')
    files.update(b=np.dstack([files['b']] * 3), c=(deep >> 8).astype(np.uint8),
                 d=np.dstack([(files['d'] >> 8).astype(np.uint8)] * 3))  # fmt: skip
    folder_with(project, 'given', **files)
    first = project.network()['params']
    assert project.run('calibrate') == 0
    assert same(first, project.network()['params'])


@pytest.mark.parametrize(('value', 'where', 'words'), [
    (float('nan'), 'body.0.conv1.weight', "holds values that are not finite, in 'body.0.conv1.weight'"),
    (3e38, 'conv_first.weight', "not finite: the input of layer 'body.0.conv1' holds"),
])  # fmt: skip
def test_numbers_that_are_not_finite_name_the_layer(
    project: Project, value: float, where: str, words: str, capsys: Any
) -> None:
    project.save_float()
    file = torch.load(project.folder / 'float.pth', weights_only=True)
    file['params'][where].fill_(value)
    torch.save(file, project.folder / 'float.pth')
    assert project.run('calibrate') == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert words in said[-1] and not any('Traceback' in line for line in said)


@pytest.mark.parametrize('method', ['minmax', 'percentile', 'mse', 'daq', 'pams', 'lsq', 'odm'])
def test_a_constant_layer_is_handled_and_said_once(project: Project, method: str, said: list[str]) -> None:
    project.save_float()
    file = torch.load(project.folder / 'float.pth', weights_only=True)
    for name in ('weight', 'bias'):
        file['params'][f'body.0.conv1.{name}'].zero_()  # nothing but zeros reaches conv2
    torch.save(file, project.folder / 'float.pth')
    assert project.run('calibrate', method=method, w_bits=4, a_bits=4, equalize=True) == 0
    told = [line for line in said if 'same value everywhere' in line]
    assert len(told) == 1 and "['body.0.conv2']" in told[0]
    assert all(v.isfinite().all() for v in project.network()['params'].values())
    assert np.isfinite(project.metrics()['datasets']['Val']['psnr'])
