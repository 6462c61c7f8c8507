"""N iterations, a resume and N more equal 2N iterations to the bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from basicsr_quant.cli import main
from basicsr_quant.compat import has_host

pytestmark = pytest.mark.skipif(not has_host(), reason='BasicSR is not installed')


def train(options: dict[str, Any], option_file: Any, *flags: str) -> Path:
    """Train in the working directory; return the folder of the experiment."""
    assert main(['train', '-opt', option_file(options), *flags]) == 0
    return Path('experiments') / options['name']


def tensors(folder: Path, iteration: int) -> dict[str, torch.Tensor]:
    """Every tensor of a saved network, EMA included, and of the optimizer."""
    network = torch.load(folder / 'models' / f'net_g_{iteration}.pth', weights_only=True)
    state = torch.load(folder / 'training_states' / f'{iteration}.state', weights_only=True)
    found = {f'{group}.{name}': tensor for group, named in network.items() for name, tensor in named.items()}
    for number, entry in state['optimizers'][0]['state'].items():
        found.update({f'optimizer.{number}.{name}': value for name, value in entry.items()})
    return found


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture(scope='module')
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Uninterrupted runs that tests share, by what could change their outcome and must not."""
    return {}


@pytest.mark.parametrize(('workers', 'prefetch', 'first', 'backend', 'flag', 'ema'), [
    # 3 batches an epoch: 4 ends inside an epoch, 3 and 6 between two.
    (0, None, 4, 'disk', 'resume_state', 0.9),
    (0, None, 3, 'disk', 'auto_resume', 0),
    (0, 'cpu', 4, 'lmdb', 'auto_resume', 0.9),
    (2, None, 4, 'disk', 'auto_resume', 0),
    (2, None, 6, 'lmdb', 'resume_state', 0.9),
    (2, 'cpu', 4, 'disk', 'resume_state', 0.9),
    (1, 'cuda', 4, 'disk', 'auto_resume', 0.9),
])
def test_resume_is_exact(workers: int, prefetch: str | None, first: int, backend: str, flag: str, ema: float,
                         options: dict[str, Any], option_file: Any, images: Path, whole: dict[Any, Any],
                         tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options['train']['ema_decay'] = ema
    if backend == 'lmdb':
        for data in options['datasets'].values():
            data.update(dataroot_gt=str(images / 'gt.lmdb'), dataroot_lq=str(images / 'lq.lmdb'),
                        io_backend={'type': 'lmdb'})
    if (ema, backend) not in whole:  # one run for all workers and prefetchers: none may change the outcome
        whole[ema, backend] = tensors(train({**copy.deepcopy(options), 'name': 'whole'}, option_file), 8)

    options['datasets']['train'].update(num_worker_per_gpu=workers, prefetch_mode=prefetch, pin_memory=True)
    options['logger']['save_checkpoint_freq'] = first
    options['train']['total_iter'] = first
    folder = train(options, option_file)
    options['train']['total_iter'] = 8
    options['logger']['save_checkpoint_freq'] = 8
    flags = ['--auto_resume']
    if flag == 'resume_state':
        options['path']['resume_state'] = str(folder / 'training_states' / f'{first}.state')
        flags = []
    train(options, option_file, *flags)
    assert_same(tensors(folder, 8), whole[ema, backend])
