"""Mends for machines without a GPU, and for ``num_gpu: 0`` on machines that have one."""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from ..errors import QuantError
from .patch import mark, marked, mentions, view_torch, views


def distributed_backend() -> bool:
    """Launch with gloo where there is no GPU, and with gloo beside nccl where there is: the host knows nccl only."""
    from basicsr.utils import dist_util

    if not mentions(dist_util._init_dist_pytorch, 'set_device') or marked(dist_util._init_dist_pytorch):
        return False
    host_slurm = dist_util._init_dist_slurm

    @mark
    def init_pytorch(backend: str, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ['RANK']) % torch.cuda.device_count())
        # None is torch's "gloo for CPU tensors, nccl for CUDA tensors".
        dist.init_process_group(backend=None if torch.cuda.is_available() else 'gloo', **kwargs)

    @mark
    def init_slurm(backend: str, port: int | None = None) -> None:
        if not torch.cuda.is_available():
            raise QuantError('--launcher slurm needs a GPU on every node; without one use --launcher pytorch or none')
        host_slurm(backend, port)

    dist_util._init_dist_pytorch = init_pytorch
    dist_util._init_dist_slurm = init_slurm
    return True


def model_to_device() -> bool:
    """Wrap for DDP without device ids on the CPU and without broadcasting buffers: the host asks for a GPU's number,
    and validates on rank 0 alone, where a broadcast would wait for ranks that never come."""
    from basicsr.models.base_model import BaseModel

    host = BaseModel.model_to_device
    if marked(host) or not mentions(host, 'current_device'):
        return False

    @mark
    @functools.wraps(host)
    def to_device(self: Any, net: torch.nn.Module) -> torch.nn.Module:
        if not self.opt['dist']:
            return host(self, net)
        return DistributedDataParallel(
            net.to(self.device),
            device_ids=[torch.cuda.current_device()] if self.device.type == 'cuda' else None,
            broadcast_buffers=False,
            find_unused_parameters=self.opt.get('find_unused_parameters', False))

    BaseModel.model_to_device = to_device
    return True


def video_metrics() -> bool:
    """Keep the metric tables of the video models on the CPU where there is no GPU: the host writes device='cuda'."""
    names = 'video_base_model', 'video_recurrent_model'
    modules = [importlib.import_module(f'basicsr.models.{name}') for name in names]
    if torch.cuda.is_available() or all(views(module, 'zeros') for module in modules):
        return False

    def zeros(*args: Any, **kwargs: Any) -> torch.Tensor:
        return torch.zeros(*args, **{**kwargs, 'device': 'cpu'})

    for module in modules:
        view_torch(module, zeros=zeros)
    return True


def realesr_devices() -> bool:
    """Let RealESRNet and RealESRGAN keep their degradations where the model is: the host calls ``.cuda()``."""
    changed = False
    for name, class_name in (('realesrnet_model', 'RealESRNetModel'), ('realesrgan_model', 'RealESRGANModel')):
        module: Any = importlib.import_module(f'basicsr.models.{name}')
        model = getattr(module, class_name)
        if marked(model.__init__) or not mentions(model.__init__, 'cuda'):
            continue
        module.DiffJPEG, module.USMSharp = _staying(module.DiffJPEG), _staying(module.USMSharp)
        model.__init__ = _init_on_device(model.__init__)
        model._dequeue_and_enqueue = _pool_on_device(model._dequeue_and_enqueue)
        changed = True
    return changed


def _staying(base: Any) -> Any:
    """Derive a class whose ``.cuda()`` does nothing; the model moves it afterwards."""

    def cuda(self: Any, device: Any = None) -> Any:
        return self

    return type(base.__name__, (base,), {'cuda': cuda})


def _init_on_device(host: Any) -> Any:

    @mark
    @functools.wraps(host)
    def init(self: Any, opt: dict[str, Any]) -> None:
        host(self, opt)
        self.jpeger.to(self.device)
        self.usm_sharpener.to(self.device)

    return init


def _pool_on_device(host: Any) -> Any:

    @mark
    @functools.wraps(host)
    def dequeue_and_enqueue(self: Any) -> None:
        # The host makes the pool at its first use, on the GPU; it takes one that is already there.
        if not hasattr(self, 'queue_lr'):
            size, batch = self.queue_size, len(self.lq)
            if size % batch:
                raise QuantError(f'queue_size is {size}; it must be a multiple of the batch size {batch}')
            self.queue_lr = self.lq.new_zeros(size, *self.lq.shape[1:])
            self.queue_gt = self.gt.new_zeros(size, *self.gt.shape[1:])
            self.queue_ptr = 0
        host(self)

    return dequeue_and_enqueue


def cuda_prefetcher() -> bool:
    """Let ``prefetch_mode: cuda`` prefetch for the CPU where there is no GPU: the host makes a CUDA stream."""
    import basicsr.train as host

    if torch.cuda.is_available() or marked(host.CUDAPrefetcher):
        return False
    prefetcher = host.CPUPrefetcher

    @mark
    def cpu_prefetcher(loader: Any, opt: dict[str, Any]) -> Any:
        return prefetcher(loader)

    host.CUDAPrefetcher = cpu_prefetcher
    return True


MENDS = (distributed_backend, model_to_device, video_metrics, realesr_devices, cuda_prefetcher)
