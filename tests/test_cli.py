"""The command: what it says, its exit codes, and that it runs the host's pipelines with the host's flags."""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import basicsr_quant
from basicsr_quant import cli, compat, option_file
from basicsr_quant.errors import QuantError

needs_host = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """Run a command that must be refused; return its one sentence."""
    assert cli.main(argv) == 2
    lines = capsys.readouterr().err.strip().split('\n')
    assert len(lines) == 1 and lines[0].startswith('basicsr: error: ')
    return lines[0]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as done:
        cli.main(['--help'])
    text = capsys.readouterr().out
    assert done.value.code == 0
    for name, module in cli.commands().items():
        assert name in text and module.help.split()[0] in text
    assert text.count('  basicsr t') == 2  # examples


@pytest.mark.parametrize('name', list(cli.commands()))
def test_a_command_is_a_module(name: str) -> None:
    module = cli.commands()[name]
    assert module.name == name and '\n' not in module.help
    module.add_arguments(argparse.ArgumentParser())
    assert callable(module.run)


def test_help_imports_nothing_heavy() -> None:
    code = ('import sys\nfrom basicsr_quant.cli import parser\nparser().format_help()\n'
            'print([m for m in ("torch", "numpy", "cv2", "basicsr") if m in sys.modules])')
    assert subprocess.check_output([sys.executable, '-c', code], text=True).strip() == '[]'


@pytest.mark.parametrize(('argv', 'sentence'), [
    (['trian'], "there is no command 'trian' (did you mean 'train'?); commands: train calibrate test"),
    (['train'], 'the following arguments are required: -opt (see basicsr train --help)'),
    (['train', '-opt', 'no.yml'], '-opt no.yml does not exist'),
    (['train', '-opt', '.'], '-opt . is a folder; give a YAML file'),
    (['test', '-opt', 'EDSR_x4_W4A4_OMD.yml'], "does not exist (did you mean 'EDSR_x4_W4A4_ODM.yml'?)"),
    (['train', '-opt', 'a.yml', '--lancher', 'none'], 'unrecognized arguments: --lancher none'),
    (['train', '-opt', 'a.yml', '--launcher', 'mpi'], "argument --launcher: invalid choice: 'mpi'"),
    (['train', '-opt', 'a.yml', '--checkpoint', 'x.pth'], 'unrecognized arguments: --checkpoint'),
    (['--nonsense'], 'unrecognized arguments: --nonsense'),
])
def test_mistakes_on_the_command_line(argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str],
                                      tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert sentence in said(capsys, *argv)


@pytest.mark.parametrize(('text', 'sentence'), [
    ('name: a\npath: {b: [1, 2\nc: 3\n', 'a.yml, line 3: not valid YAML'),
    ('name: !!python/object/apply:os.getcwd []\n', 'a.yml, line 1: not valid YAML (could not determine a constructor'),
    ('- 1\n- 2\n', 'a.yml holds list, not the key: value pairs of an option file'),
    ('', 'a.yml holds NoneType'),
])
def test_mistakes_in_the_file(text: str, sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path,
                              monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path('a.yml').write_text(text)
    assert sentence in said(capsys, 'train', '-opt', 'a.yml')
    assert os.listdir() == ['a.yml']


@pytest.mark.parametrize(('entry', 'sentence'), [
    ('train:ema_decay', '--force_yml train:ema_decay is not of the form key:key=value'),
    ('name=a=b', 'not of the form'),
    ('=1', 'not of the form'),
    ('train:total_itr=4', "train has no key 'total_itr' (did you mean 'total_iter'?); new keys cannot be made here"),
    ('tran:total_iter=4', "the option file has no key 'tran' (did you mean 'train'?)"),
    ('name:x=4', "name has no key 'x'"),
    ('train:scheduler:milestones=[__import__("os").getcwd()]', 'is not a list of plain values'),
    ('x"]=1;import os;opt["name=4', 'not of the form'),
])
def test_force_yml_is_checked_before_the_host_runs_it(entry: str, sentence: str, options: dict[str, Any]) -> None:
    with pytest.raises(QuantError) as caught:
        option_file.check_force_yml(options, ['num_gpu=0', entry])
    assert sentence in str(caught.value)


def test_force_yml_that_is_right(options: dict[str, Any]) -> None:
    entries = ['train:total_iter=4', 'train:scheduler:milestones=[1, 2]', 'path : x=1'.replace(' : x', ':resume_state')]
    option_file.check_force_yml(options, entries)
    option_file.check_force_yml(options, None)


def test_an_installed_option_file_is_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name = next(iter(option_file.installed()))
    assert Path(option_file.find(name)).name == name
    Path(name).write_text('a: 1')
    assert option_file.find(name) == name  # one's own comes first


def test_interruption_and_errors_of_ours(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    module = cli.commands()['train']

    def interrupted(args: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, 'run', interrupted)
    assert cli.main(['train', '-opt', 'x']) == 130
    assert capsys.readouterr().err == 'basicsr: interrupted\n'


@pytest.mark.parametrize('argv', [[], ['train', '-opt', 'EDSR_x4_W4A4_ODM.yml']])
def test_without_the_host(argv: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(compat, 'has_host', lambda: False)
    monkeypatch.setattr(cli, 'has_host', lambda: False)
    monkeypatch.setattr(compat, '_done', False)
    assert cli.main(argv) == 2
    lines = capsys.readouterr().err.strip().split('\n')
    assert [line.strip() for line in lines[1:]] == list(compat.INSTALL)


def test_python_m_and_version() -> None:
    code = [sys.executable, '-m', 'basicsr_quant', '--version']
    assert subprocess.check_output(code, text=True).strip() == f'basicsr_quant {basicsr_quant.__version__}'


@needs_host
def test_train_and_test_run_the_pipelines(options: dict[str, Any], option_file: Any, tmp_path: Path,
                                          monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    options['datasets']['test_1'] = {**options['datasets']['val'], 'name': 'Other'}  # one file for every command
    path = option_file(options)
    assert cli.main(['train', '-opt', path, '--force_yml', 'train:total_iter=2', 'logger:save_checkpoint_freq=2']) == 0
    folder = Path('experiments/tiny')
    assert {file.name for file in (folder / 'models').iterdir()} == {'net_g_2.pth', 'net_g_latest.pth'}
    assert '# basicsr train -opt' in (folder / 'options.yml').read_text()  # what the host writes down of the command
    caplog.set_level(logging.INFO, 'basicsr')
    logging.getLogger('basicsr').addHandler(caplog.handler)  # the host stops propagation
    try:
        assert cli.main(['test', '-opt', path, '--checkpoint', str(folder / 'models' / 'net_g_2.pth')]) == 0
    finally:
        logging.getLogger('basicsr').removeHandler(caplog.handler)
    assert 'net_g_2.pth' in caplog.text
    assert 'Testing Other' in caplog.text and 'Testing Val' not in caplog.text
    assert Path('results/tiny').is_dir()


@needs_host
@pytest.mark.parametrize(('command', 'key', 'value', 'sentence'), [
    ('train', 'model_type', 'SRModle', "model_type is 'SRModle', which is not registered (did you mean 'SRModel'?)"),
    ('train', 'path', None, 'path is missing'),
    ('test', 'datasets', {}, 'test'),
    ('train', 'num_gpu', 64, 'num_gpu is 64, but torch sees'),
])
def test_nothing_is_made_or_renamed_when_a_file_is_refused(
        command: str, key: str, value: Any, sentence: str, options: dict[str, Any], option_file: Any, tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for kind in ('experiments', 'results'):
        (tmp_path / kind / 'tiny').mkdir(parents=True)
    path = option_file({**options, key: value})
    before = sorted(str(file) for file in tmp_path.rglob('*'))
    assert sentence in said(capsys, command, '-opt', path)
    assert sorted(str(file) for file in tmp_path.rglob('*')) == before


def torchrun(path: str, folder: Path, *flags: str) -> None:
    """Train on two CPU processes, which meet by gloo."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node=2', '-m',
               'basicsr_quant', 'train', '-opt', path, '--launcher', 'pytorch', *flags]
    source = str(Path(basicsr_quant.__file__).parent.parent)
    environment = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': source}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@needs_host
@pytest.mark.slow
def test_two_processes_train_validate_and_resume(options: dict[str, Any], option_file: Any, tmp_path: Path) -> None:
    """A network with buffers, drop path (which draws), validation on rank 0, and spawned workers."""
    options['model_type'] = 'SwinIRModel'
    options['network_g'] = {
        'type': 'SwinIR', 'upscale': 2, 'in_chans': 3, 'img_size': 8, 'window_size': 4, 'img_range': 1.0,
        'depths': [2], 'embed_dim': 8, 'num_heads': [2], 'mlp_ratio': 2, 'upsampler': 'pixelshuffledirect',
        'resi_connection': '1conv', 'drop_path_rate': 0.5,
    }
    options['datasets']['train'].update(batch_size_per_gpu=2, dataset_enlarge_ratio=3)
    options['logger']['save_checkpoint_freq'] = 3
    found = {}
    for name, totals in (('whole', (6, )), ('parts', (3, 6))):
        for total in totals:
            options['name'], options['train']['total_iter'] = name, total
            options['datasets']['train']['num_worker_per_gpu'] = 1 if total == 3 else 0
            torchrun(option_file(options), tmp_path, '--auto_resume')
        file = tmp_path / 'experiments' / name / 'models' / 'net_g_6.pth'
        found[name] = torch.load(file, weights_only=True)
    for group in ('params', 'params_ema'):
        whole, parts = found['whole'][group], found['parts'][group]
        assert not [key for key in whole if not torch.equal(whole[key], parts[key])]
