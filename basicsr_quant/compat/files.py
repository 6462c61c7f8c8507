"""Mends of how the host reads and writes files: nothing that can run code, and nothing half-written."""

from __future__ import annotations

import importlib
import io
import os
import pickle
import time
from collections import OrderedDict
from typing import Any

import torch
import yaml

from .patch import mark, marked, view_torch, views

_READERS = ('models.base_model', 'archs.spynet_arch', 'archs.basicvsr_arch', 'archs.tof_arch', 'archs.vgg_arch',
            'archs.inception', 'archs.dfdnet_arch')


def atomic_save(data: Any, path: str) -> None:
    """``torch.save`` to a temporary name in the same folder, then rename: a reader never sees half a file."""
    temporary = f'{path}.{os.getpid()}.tmp'
    try:
        torch.save(data, temporary)
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.remove(temporary)


def safe_options() -> bool:
    """Read option files with a safe loader: the host's full loader builds Python objects that a file names."""
    from basicsr.utils import options

    if marked(options.ordered_yaml):
        return False
    loader_base = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)
    dumper_base = getattr(yaml, 'CSafeDumper', yaml.SafeDumper)

    # Classes of our own: the host registers its constructors on yaml's, for the whole process.
    class OrderedLoader(loader_base):  # type: ignore[misc, valid-type]
        pass

    class OrderedDumper(dumper_base):  # type: ignore[misc, valid-type]
        pass

    mapping = yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG
    OrderedLoader.add_constructor(mapping, lambda loader, node: OrderedDict(loader.construct_pairs(node)))
    OrderedDumper.add_representer(OrderedDict, lambda dumper, data: dumper.represent_dict(data.items()))

    @mark
    def ordered_yaml() -> tuple[Any, Any]:
        return OrderedLoader, OrderedDumper

    options.ordered_yaml = ordered_yaml
    return True


def safe_checkpoints() -> bool:
    """Read checkpoints with ``weights_only=True``: torch below 2.6 runs whatever a file contains."""
    if not _loads_anything():
        return False
    changed = False
    for name in _READERS:
        module = importlib.import_module(f'basicsr.{name}')
        if not views(module, 'load'):
            view_torch(module, load=safe_load)
            changed = True
    return changed


def safe_load(*args: Any, **kwargs: Any) -> Any:
    """``torch.load`` that never builds anything but tensors and plain data."""
    return torch.load(*args, **{**kwargs, 'weights_only': True})


class _Probe:
    """Something that only an unsafe reader builds."""


def _loads_anything() -> bool:
    buffer = io.BytesIO()
    torch.save(_Probe(), buffer)
    buffer.seek(0)
    try:
        torch.load(buffer)
    except pickle.UnpicklingError:
        return False
    return True


def atomic_checkpoints() -> bool:
    """Write checkpoints under a temporary name first: the host leaves half a file behind when it is interrupted."""
    from basicsr.models import base_model

    if views(base_model, 'save'):
        return False
    view_torch(base_model, save=atomic_save)
    return True


def archive_names() -> bool:
    """Wait for a free name when an earlier experiment is archived: the host names it by the second, and a second run
    within that second fails on the folder that the first one left."""
    import basicsr.train
    from basicsr.utils import misc

    host = misc.mkdir_and_rename
    if marked(host):
        return False

    @mark
    def mkdir_and_rename(path: str) -> None:
        while os.path.exists(path) and os.path.exists(f'{path}_archived_{misc.get_time_str()}'):
            time.sleep(0.05)
        host(path)

    misc.mkdir_and_rename = basicsr.train.mkdir_and_rename = mkdir_and_rename
    return True


MENDS = (archive_names, safe_options, safe_checkpoints, atomic_checkpoints)
