"""Mends that make resuming exact on the CPU: N iterations, a resume and N more equal 2N iterations to the bit.

What is drawn for the data is a function of (manual_seed, epoch, position), so it does not depend on workers or on
where a run was cut; everything else that draws goes on from random states that the training state holds. The order of
the data is the host's own (a function of the epoch). A state also holds the seed, which wins over the option file's,
and the best validation results.
"""

from __future__ import annotations

import functools
import logging
import math
import os
import pickle
from dataclasses import dataclass
from typing import Any

import torch

from .. import random_state
from ..data.draws import Draw, SeededDataset
from ..errors import QuantError
from .files import atomic_save
from .patch import mark, marked, mentions

_KEY = 'basicsr_quant'  # our entry in a training state; the host ignores it


@dataclass
class Run:
    """The training that this process is in; the host hands none of this from one of its functions to the next."""

    state: dict[str, Any] | None = None
    batches: int = 0  # full batches in an epoch
    epoch: int = 0  # where this process began: epoch,
    iter: int = 0  # iteration,
    skip: int = 0  # and batches of that epoch which an earlier process consumed

    def begin(self, loader: Any, sampler: Any) -> None:
        """Note the loader, and make the sampler go on where a resumed run stopped."""
        self.batches, self.epoch, self.iter, self.skip = len(loader), 0, 0, 0
        if self.state is not None:
            self.epoch, self.iter = self.state['epoch'], self.state['iter']
            ours = self.state.get(_KEY, {'batches': self.batches, 'consumed': self.iter - self.epoch * self.batches})
            # Where the data or the batch size changed since, the epoch cannot be continued; it starts anew.
            if ours['batches'] == self.batches and 0 <= ours['consumed'] <= self.batches:
                self.skip = ours['consumed']
        sampler.begin(self.epoch, self.skip * loader.batch_size)

    def last_epoch(self, total_iter: int) -> int:
        """The epoch in which iteration ``total_iter`` falls."""
        return self.epoch + math.ceil(max(total_iter - self.iter + self.skip, 0) / self.batches) - 1

    def consumed(self, epoch: int, iteration: int) -> int:
        """Batches of ``epoch`` that are used up after ``iteration``."""
        return iteration - self.iter + self.skip - (epoch - self.epoch) * self.batches


RUN = Run()


def seeded_data() -> bool:
    """Draw order and augmentation from (seed, epoch, position) and each loader's seeds from its own generator: the
    host's depend on the number of workers and on what the process drew before."""
    import basicsr.train as host

    if marked(host.build_dataloader):
        return False
    build = host.build_dataloader

    class ResumableSampler(host.EnlargedSampler):  # type: ignore[misc, name-defined]
        """The host's order, as ``Draw`` indices, able to start inside an epoch."""

        start = 0, 0

        def begin(self, epoch: int, samples: int) -> None:
            self.start = epoch, samples

        def __iter__(self) -> Any:
            epoch = self.epoch
            first = self.start[1] if epoch == self.start[0] else 0
            for number, index in enumerate(super().__iter__()):
                if number >= first:
                    yield Draw(index, epoch, number * self.num_replicas + self.rank)

    @mark
    @functools.wraps(build)
    def build_dataloader(dataset: Any, dataset_opt: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        seed = kwargs.get('seed') or 0
        if dataset_opt['phase'] == 'train':
            dataset = SeededDataset(dataset, seed)
        loader = build(dataset, dataset_opt, *args, **kwargs)
        loader.generator = torch.Generator().manual_seed(seed)
        return loader

    host.EnlargedSampler, host.build_dataloader = ResumableSampler, build_dataloader
    return True


def read_state() -> bool:
    """Read training states on the CPU with ``weights_only=True``: the host asks for the GPU's number. An unreadable
    state, or one without its network, is refused before anything is built."""
    import basicsr.train as host

    if not mentions(host.load_resume_state, 'current_device'):
        return False

    @mark
    def load_resume_state(opt: dict[str, Any]) -> dict[str, Any] | None:
        RUN.state = None
        if opt['auto_resume']:
            _newest_state(opt, host.scandir)
        path = opt['path'].get('resume_state')
        if not path:
            return None
        state = _read(path)
        host.check_resume(opt, state['iter'])
        for name in (key for key in opt if key.startswith('network_')):
            network = opt['path'].get(f'pretrain_{name}')
            if network is not None and not os.path.isfile(network):
                raise QuantError(f'path.resume_state {path} is of iteration {state["iter"]}, but its network {network} '
                                 'is missing')
        opt['manual_seed'] = state.get(_KEY, {}).get('manual_seed', opt['manual_seed'])
        RUN.state = state
        return state

    host.load_resume_state = load_resume_state
    return True


def _newest_state(opt: dict[str, Any], scandir: Any) -> None:
    """--auto_resume: the state of most iterations; without one, training begins anew."""
    folder = os.path.join('experiments', opt['name'], 'training_states')
    names = list(scandir(folder, suffix='.state')) if os.path.isdir(folder) else []
    numbers = [int(name[:-len('.state')]) for name in names if name[:-len('.state')].isdigit()]
    if numbers:
        opt['path']['resume_state'] = os.path.join(folder, f'{max(numbers)}.state')


def _read(path: str) -> dict[str, Any]:
    try:
        state = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise QuantError(f'path.resume_state {path} does not exist') from None
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = str(error).strip().split('\n')[0].rstrip('.')
        raise QuantError(f'path.resume_state {path} cannot be read as a training state ({reason})') from None
    missing = [key for key in ('epoch', 'iter', 'optimizers', 'schedulers') if key not in state]
    if missing:
        raise QuantError(f'path.resume_state {path} is no training state: it lacks {", ".join(missing)}')
    return state


def write_state() -> bool:
    """Save with a training state what exact resuming needs, and put it back: the host saves the optimizers only."""
    from basicsr.models.base_model import BaseModel

    if marked(BaseModel.resume_training):
        return False
    host_resume = BaseModel.resume_training

    @mark
    def save_training_state(self: Any, epoch: int, current_iter: int) -> None:
        if current_iter == -1:
            return
        path = os.path.join(self.opt['path']['training_states'], f'{current_iter}.state')
        draws = random_state.capture()
        if self.opt['rank'] != 0:
            atomic_save(draws, _rank_file(path, self.opt['rank']))
            return
        state = {
            'epoch': epoch,
            'iter': current_iter,
            'optimizers': [optimizer.state_dict() for optimizer in self.optimizers],
            'schedulers': [scheduler.state_dict() for scheduler in self.schedulers],
            _KEY: {
                'manual_seed': self.opt['manual_seed'],
                'batches': RUN.batches,
                'consumed': RUN.consumed(epoch, current_iter),
                'random': draws,
                'best_metric_results': _plain(getattr(self, 'best_metric_results', {})),
                'pool': _pool(self),
            },
        }
        try:
            atomic_save(state, path)
        except OSError as error:  # as in the host, a full disk ends no training
            logging.getLogger('basicsr').warning(f'Training state {path} could not be saved: {error}')

    @mark
    @functools.wraps(host_resume)
    def resume_training(self: Any, resume_state: dict[str, Any]) -> None:
        host_resume(self, resume_state)
        ours = resume_state.get(_KEY)
        if ours is None:
            return
        if ours['best_metric_results']:
            self.best_metric_results = ours['best_metric_results']
        for name, value in ours['pool'].items():
            setattr(self, name, value.to(self.device) if torch.is_tensor(value) else value)
        draws = ours['random']
        if self.opt['rank'] != 0:
            path = _rank_file(self.opt['path']['resume_state'], self.opt['rank'])
            if not os.path.isfile(path):
                return
            draws = torch.load(path, weights_only=True)
        random_state.restore(draws)

    BaseModel.save_training_state, BaseModel.resume_training = save_training_state, resume_training
    return True


def _rank_file(state_path: str, rank: int) -> str:
    return f'{state_path[:-len(".state")]}.rank{rank}.random'


def _pool(model: Any) -> dict[str, Any]:
    """The training-pair pool of the RealESR models; on the CPU only, where exactness is promised: it is large."""
    if model.device.type != 'cpu':
        return {}
    return {name: getattr(model, name) for name in ('queue_lr', 'queue_gt', 'queue_ptr') if hasattr(model, name)}


def _plain(results: dict[str, Any]) -> dict[str, Any]:
    """Metric records with NumPy's numbers as Python's, which is what ``weights_only`` reads."""
    return {
        dataset: {metric: {'better': record['better'], 'val': float(record['val']), 'iter': record['iter']}
                  for metric, record in records.items()}
        for dataset, records in results.items()
    }


MENDS = (seeded_data, read_state, write_state)
