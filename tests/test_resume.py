"""N iterations, a resume and N more equal 2N iterations to the bit."""

from __future__ import annotations

import copy
import importlib
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from basicsr_quant import compat
from basicsr_quant.errors import QuantError

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')


@pytest.fixture
def train(option_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Run the host's training pipeline in a folder of its own; return the folder of the experiment."""
    compat.apply()
    monkeypatch.chdir(tmp_path)
    pipeline = importlib.import_module('basicsr.train').train_pipeline

    def run(options: dict[str, Any], *flags: str) -> Path:
        monkeypatch.setattr(sys, 'argv', ['train.py', '-opt', option_file(options), *flags])
        pipeline(str(tmp_path))
        return tmp_path / 'experiments' / options['name']

    return run


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
                         options: dict[str, Any], train: Callable[..., Path], images: Path,
                         whole: dict[Any, Any]) -> None:
    options['train']['ema_decay'] = ema
    if backend == 'lmdb':
        for data in options['datasets'].values():
            data.update(dataroot_gt=str(images / 'gt.lmdb'), dataroot_lq=str(images / 'lq.lmdb'),
                        io_backend={'type': 'lmdb'})
    if (ema, backend) not in whole:  # one run for all workers and prefetchers: none may change the outcome
        whole[ema, backend] = tensors(train({**copy.deepcopy(options), 'name': 'whole'}), 8)

    options['datasets']['train'].update(num_worker_per_gpu=workers, prefetch_mode=prefetch, pin_memory=True)
    options['logger']['save_checkpoint_freq'] = first
    options['train']['total_iter'] = first
    folder = train(options)
    options['train']['total_iter'] = 8
    options['logger']['save_checkpoint_freq'] = 8
    flags = ['--auto_resume']
    if flag == 'resume_state':
        options['path']['resume_state'] = str(folder / 'training_states' / f'{first}.state')
        flags = []
    train(options, *flags)
    assert_same(tensors(folder, 8), whole[ema, backend])


def twice(options: dict[str, Any], train: Callable[..., Path], first: int, last: int) -> tuple[Path, Path]:
    """Train to `last` at once, and to `first` and from there to `last`; return both folders."""
    options['train']['total_iter'] = options['logger']['save_checkpoint_freq'] = last
    whole = train({**copy.deepcopy(options), 'name': 'whole'})
    options['train']['total_iter'] = options['logger']['save_checkpoint_freq'] = first
    train(options)
    options['train']['total_iter'] = options['logger']['save_checkpoint_freq'] = last
    return whole, train(options, '--auto_resume')


@pytest.fixture(scope='module')
def noisy_model() -> str:
    """A user's model that draws from every random state in training and in validation; returns its name."""
    compat.apply()
    registry = importlib.import_module('basicsr.utils.registry').MODEL_REGISTRY
    base = importlib.import_module('basicsr.models.sr_model').SRModel

    class NoisyModel(base):  # type: ignore[misc, valid-type]

        def feed_data(self, data: Any) -> None:
            super().feed_data(data)
            self.lq = self.lq + torch.randn_like(self.lq) * random.random() * float(np.random.rand())

    registry.register(NoisyModel)
    return 'NoisyModel'


@pytest.mark.parametrize(('first', 'prefetch'), [(2, None), (3, None), (2, 'cpu')])
def test_what_a_model_draws_goes_on_as_well(first: int, prefetch: str | None, options: dict[str, Any],
                                            train: Callable[..., Path], noisy_model: str) -> None:
    options['model_type'] = noisy_model
    options['datasets']['train']['prefetch_mode'] = prefetch
    whole, resumed = twice(options, train, first, 6)
    assert_same(tensors(whole, 6), tensors(resumed, 6))


def test_validation_changes_nothing(options: dict[str, Any], train: Callable[..., Path], noisy_model: str) -> None:
    options['model_type'] = noisy_model
    with_validation = tensors(train(options), 8)
    del options['val'], options['datasets']['val']
    assert_same(with_validation, tensors(train({**options, 'name': 'without'}), 8))


def test_a_seed_that_was_drawn_is_kept(options: dict[str, Any], train: Callable[..., Path]) -> None:
    """Without `manual_seed` the host draws one at each start; a resumed run must go on with the first."""
    del options['manual_seed']
    folder = train({**options, 'train': {**options['train'], 'total_iter': 4}})
    seed = torch.load(folder / 'training_states' / '4.state', weights_only=True)['basicsr_quant']['manual_seed']
    resumed = tensors(train(options, '--auto_resume'), 8)
    assert_same(resumed, tensors(train({**options, 'name': 'whole', 'manual_seed': seed}), 8))


def test_best_results_survive(options: dict[str, Any], train: Callable[..., Path]) -> None:
    folder = train({**options, 'train': {**options['train'], 'total_iter': 4}})
    state = torch.load(folder / 'training_states' / '4.state', weights_only=True)
    record = state['basicsr_quant']['best_metric_results']['Val']['psnr']
    assert record['iter'] == 2  # the state of iteration 4 is saved before its validation
    assert 0 < record['val'] < 100


def test_a_state_of_the_host_resumes(options: dict[str, Any], train: Callable[..., Path]) -> None:
    """A state that this package did not write lacks our entry; the data go on at the right place all the same."""
    whole, _ = twice(options, train, 4, 8)
    options['train']['total_iter'] = 4
    folder = train({**options, 'name': 'old', 'logger': {**options['logger'], 'save_checkpoint_freq': 4}})
    file = folder / 'training_states' / '4.state'
    state = torch.load(file, weights_only=True)
    del state['basicsr_quant']
    torch.save(state, file)
    options['train']['total_iter'] = 8
    assert_same(tensors(whole, 8), tensors(train({**options, 'name': 'old'}, '--auto_resume'), 8))


def test_other_batches_begin_the_epoch_anew(options: dict[str, Any], train: Callable[..., Path]) -> None:
    train({**options, 'train': {**options['train'], 'total_iter': 4}})
    options['datasets']['train']['batch_size_per_gpu'] = 2
    folder = train(options, '--auto_resume')
    assert (folder / 'training_states' / '8.state').is_file()


@pytest.mark.parametrize(('batch', 'per_epoch'), [(3, 3), (6, 1), (10, 1)])
def test_total_iter_is_reached(batch: int, per_epoch: int, options: dict[str, Any],
                               train: Callable[..., Path]) -> None:
    """The host counts the batch that it drops, and would stop after 6 of 8 iterations or earlier."""
    options['datasets']['train']['batch_size_per_gpu'] = batch
    folder = train(options)
    state = torch.load(folder / 'training_states' / '8.state', weights_only=True)
    assert (state['iter'], state['epoch']) == (8, 7 // per_epoch)


def test_less_than_a_batch_is_refused(options: dict[str, Any], train: Callable[..., Path]) -> None:
    options['datasets']['train']['batch_size_per_gpu'] = 11
    with pytest.raises(QuantError, match='one batch of 11'):
        train(options)


@pytest.mark.parametrize(('damage', 'said'), [
    (lambda folder: (folder / 'training_states' / '4.state').write_bytes(b'PK'), 'cannot be read as a training state'),
    (lambda folder: torch.save({'iter': 4}, folder / 'training_states' / '4.state'), 'is no training state: it lacks'),
    (lambda folder: (folder / 'models' / 'net_g_4.pth').unlink(), 'its network .*net_g_4.pth is missing'),
])
def test_a_damaged_state_is_refused(damage: Callable[[Path], Any], said: str, options: dict[str, Any],
                                    train: Callable[..., Path]) -> None:
    options['train']['total_iter'] = 4
    damage(train(options))
    with pytest.raises(QuantError, match=said):
        train(options, '--auto_resume')


def test_an_interrupted_save_leaves_nothing(tmp_path: Path) -> None:
    from basicsr_quant.compat.files import atomic_save

    file = tmp_path / 'net.pth'
    atomic_save({'a': 1}, str(file))
    with pytest.raises(Exception, match='pickle'):
        atomic_save({'a': lambda: 0}, str(file))
    assert torch.load(file, weights_only=True) == {'a': 1}
    assert [path.name for path in tmp_path.iterdir()] == ['net.pth']
