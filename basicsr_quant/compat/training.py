"""Mends of the training loop: the EMA copy, validation, and the number of epochs."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from ..data.check import phases
from ..errors import QuantError
from ..random_state import preserved
from .patch import mark, marked
from .resume import RUN


def ema_buffers() -> bool:
    """Copy buffers into the EMA network: the host averages parameters and leaves buffers as they were at the start."""
    from basicsr.models.base_model import BaseModel

    host = BaseModel.model_ema
    if not _forgets_buffers(host):
        return False

    @mark
    @functools.wraps(host)
    def model_ema(self: Any, decay: float = 0.999) -> None:
        host(self, decay)
        source = dict(self.get_bare_model(self.net_g).named_buffers())
        with torch.no_grad():
            for name, buffer in self.net_g_ema.named_buffers():
                buffer.copy_(source[name])

    BaseModel.model_ema = model_ema
    return True


def _forgets_buffers(model_ema: Any) -> bool:
    net, copy = torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)
    net.running_mean.fill_(7)  # type: ignore[union-attr]
    model_ema(SimpleNamespace(net_g=net, net_g_ema=copy, get_bare_model=lambda wrapped: wrapped), 0)
    return bool(copy.running_mean != net.running_mean)


def bare_validation() -> bool:
    """Validate on the networks without their DDP wrapper, and leave the random states alone: the host runs the wrapper
    on rank 0 only, and a loader draws its seed from the state that training goes on with."""
    from basicsr.models.base_model import BaseModel

    host = BaseModel.validation
    if marked(host):
        return False

    @mark
    @functools.wraps(host)
    def validation(self: Any, *args: Any, **kwargs: Any) -> None:
        wrapped = {name: net for name, net in vars(self).items() if isinstance(net, DistributedDataParallel)}
        vars(self).update({name: net.module for name, net in wrapped.items()})
        try:
            with preserved():
                host(self, *args, **kwargs)
        finally:
            vars(self).update(wrapped)

    BaseModel.validation = validation
    return True


def loaders() -> bool:
    """Count epochs by the batches there are, and pass test sets over: the host also counts the last batch, which it
    drops, and so ends before ``total_iter`` where an epoch is short; and it refuses a file that names test sets."""
    import basicsr.train as host

    create = host.create_train_val_dataloader
    if marked(create):
        return False

    @mark
    @functools.wraps(create)
    def create_train_val_dataloader(opt: dict[str, Any], logger: Any) -> tuple[Any, ...]:
        datasets = {name: opt['datasets'][name] for name in phases(opt['datasets'], is_train=True)}
        loader, sampler, val_loaders, _, total_iter = create({**opt, 'datasets': datasets}, logger)
        if len(loader) == 0:
            raise QuantError(
                f'datasets.train gives {len(sampler)} images an epoch and rank, which is less than one batch of '
                f'{loader.batch_size}; lower batch_size_per_gpu or raise dataset_enlarge_ratio')
        RUN.begin(loader, sampler)
        last = RUN.last_epoch(total_iter)
        logger.info(f'Full batches in an epoch: {RUN.batches}; the training ends in epoch {last} (from 0).')
        return loader, sampler, val_loaders, last, total_iter

    host.create_train_val_dataloader = create_train_val_dataloader
    return True


MENDS = (ema_buffers, bare_validation, loaders)
