"""Refuse an option file that cannot work, before the host builds or renames anything."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import QuantError, nearest
from .check_images import check_folder, count_images

# What the host's pipelines read without asking; a missing one would be a KeyError in the middle of a run.
_ALWAYS = ('name', 'model_type', 'num_gpu', 'datasets', 'network_g', 'path')
_TRAIN = {
    'train': ('total_iter', 'optim_g', 'scheduler'),
    'train.optim_g': ('type', ),
    'train.scheduler': ('type', ),
    'logger': ('print_freq', 'save_checkpoint_freq', 'use_tb_logger'),
}
_LOADER = ('batch_size_per_gpu', 'num_worker_per_gpu')
_DATASET: dict[str, tuple[str, ...]] = {
    'PairedImageDataset': ('dataroot_gt', 'dataroot_lq', 'io_backend'),
    'SingleImageDataset': ('dataroot_lq', 'io_backend'),
}
_AUGMENT: dict[str, tuple[str, ...]] = {'PairedImageDataset': ('gt_size', 'use_hflip', 'use_rot')}
_PHASES = ('train', 'val', 'test')


def check_options(
    opt: Mapping[str, Any], is_train: bool, resuming: bool = False, own_reader: bool = False
) -> None:
    """Check the options that the host reads, its data sets and its checkpoints.

    Call it after the user's ``imports:``, so that their components are registered. The ``quant:`` block is not looked
    at. In training the data sets ``train`` and ``val*`` are checked, else ``test*``, or ``val*`` where there is none.
    Of data sets of other types than the host's image data sets only the folders are checked.

    Args:
        opt: the option file's content, before the host's ``parse_options`` adds to it.
        is_train: for training; else for testing and calibrating.
        resuming: the run goes on from a training state, so ``path.pretrain_network_*`` are not read.
        own_reader: ``path.pretrain_network_g`` is read by this package, which takes more kinds of files than the host;
            the file is not looked into here.

    Raises:
        QuantError: one sentence that names the option, what was given and what is allowed.
    """
    _require(opt, '', _ALWAYS)
    for name in ('datasets', 'network_g', 'path'):
        _mapping(opt, name)
    _require(opt['network_g'], 'network_g.', ('type', ))
    _check_types(opt)
    _check_devices(opt['num_gpu'])
    if is_train:
        _check_training(opt)
    scale = {'scale': opt['scale']} if 'scale' in opt else {}
    for phase in phases(opt['datasets'], is_train):
        data = {**_mapping(opt, f'datasets.{phase}'), **scale}
        images = check_dataset(data, f'datasets.{phase}', training=phase == 'train')
        if phase == 'train':
            _check_batches(opt, data, images)
    check_checkpoints(opt['path'], resuming, skip=('pretrain_network_g',) if own_reader else ())


def phases(datasets: Mapping[str, Any], is_train: bool) -> list[str]:
    """Return the names of the data sets that a run reads.

    Raises:
        QuantError: a name that begins with none of ``train``, ``val``, ``test``; or there is none to read.
    """
    for name in datasets:
        if name.split('_')[0] not in _PHASES or (name != 'train' and name.startswith('train')):
            raise QuantError(f'datasets.{name} is no data set the host knows{nearest(name, _PHASES)}; allowed are '
                             'train, val, val_1, val_2 ..., test, test_1 ...')

    def named(*kinds: str) -> list[str]:
        return [name for name in datasets if name.split('_')[0] in kinds]

    if is_train:
        if 'train' not in datasets:
            raise QuantError('datasets.train is missing; training needs it')
        return named('train', 'val')
    found = named('test') or named('val')
    if not found:
        raise QuantError('datasets holds neither test nor val sets; testing needs one')
    return found


def _mapping(opt: Mapping[str, Any], path: str) -> Mapping[str, Any]:
    inner: Any = opt
    for key in path.split('.'):
        inner = inner[key]
    if not isinstance(inner, Mapping):
        raise QuantError(f'{path} is {inner!r}; it must hold key: value pairs')
    return inner


def _require(options: Mapping[str, Any], where: str, keys: Iterable[str]) -> None:
    for key in keys:
        if key not in options or options[key] is None:
            others = [str(name) for name in options if name not in keys]
            hint = nearest(key, others)
            raise QuantError(f'{where}{key} is missing{hint.replace("did you mean", "there is")}')


def _check_types(opt: Mapping[str, Any]) -> None:
    """Refuse names that nobody registered, if the host is loaded and can tell."""
    registry = sys.modules.get('basicsr.utils.registry')
    if registry is None:
        return
    wanted = [('model_type', opt['model_type'], registry.MODEL_REGISTRY),
              ('network_g.type', opt['network_g']['type'], registry.ARCH_REGISTRY)]
    wanted += [(f'datasets.{phase}.type', data['type'], registry.DATASET_REGISTRY)
               for phase, data in opt['datasets'].items() if isinstance(data, Mapping) and data.get('type')]
    for path, name, known in wanted:
        names = [key[:-len('_basicsr')] if key.endswith('_basicsr') else key for key, _ in known]
        if name not in known and name not in names:
            raise QuantError(f"{path} is '{name}', which is not registered{nearest(name, names)}; known: "
                             f'{" ".join(sorted(names))}')


def _check_devices(num_gpu: Any) -> None:
    if num_gpu == 'auto':
        return
    if isinstance(num_gpu, bool) or not isinstance(num_gpu, int) or num_gpu < 0:
        raise QuantError(f"num_gpu is {num_gpu!r}; allowed are 'auto' and whole numbers from 0")
    if num_gpu:
        import torch
        if num_gpu > torch.cuda.device_count():
            raise QuantError(f'num_gpu is {num_gpu}, but torch sees {torch.cuda.device_count()} GPUs here; give '
                             "'num_gpu: auto', or 'num_gpu: 0' for the CPU")


def _check_training(opt: Mapping[str, Any]) -> None:
    for path, keys in _TRAIN.items():
        _require(opt, '', (path.split('.')[0], ))
        _require(_mapping(opt, path), f'{path}.', keys)
    if opt.get('val') is not None:
        _require(_mapping(opt, 'val'), 'val.', ('val_freq', 'save_img'))
    total = opt['train']['total_iter']
    if isinstance(total, bool) or not isinstance(total, (int, float)) or total < 1:
        raise QuantError(f'train.total_iter is {total!r}; it must be a number from 1 (in YAML 6e4 is text: write 60000 '
                         'or !!float 6e4)')


def check_dataset(data: Mapping[str, Any], where: str, training: bool = False) -> int | None:
    """Check the options of one data set, and that its images are there.

    Args:
        data: options of a BasicSR data set, ``scale`` included.
        where: its path in the option file, for example ``datasets.train``.
        training: whether it is trained on: then it needs a loader's options, and pairs must fit to the pixel.

    Returns:
        The number of images; None for data sets of other types than the host's image data sets.

    Raises:
        QuantError: one sentence that names the option.
    """
    _require(data, f'{where}.', ('name', 'type'))
    kind = data['type']
    _require(data, f'{where}.', (*_DATASET.get(kind, ()), *((*_AUGMENT.get(kind, ()), *_LOADER) if training else ())))
    if kind not in _DATASET:
        for key, path in data.items():
            if str(key).startswith('dataroot') and isinstance(path, str):
                check_folder(os.path.expanduser(path), f'{where}.{key}')
        return None
    if 'dataroot_gt' in _DATASET[kind] and data.get('scale') is None:
        raise QuantError(f'scale is missing; {kind} needs it')
    _require(_mapping(data, 'io_backend'), f'{where}.io_backend.', ('type', ))
    return count_images(data, where, training)


def _check_batches(opt: Mapping[str, Any], data: Mapping[str, Any], images: int | None) -> None:
    for key, low in (('batch_size_per_gpu', 1), ('num_worker_per_gpu', 0)):
        if isinstance(data[key], bool) or not isinstance(data[key], int) or data[key] < low:
            raise QuantError(f'datasets.train.{key} is {data[key]!r}; it must be a whole number from {low}')
    ranks = int(os.environ.get('WORLD_SIZE', 1))
    gpus = opt['num_gpu'] if isinstance(opt['num_gpu'], int) and ranks == 1 else 1
    ratio = data.get('dataset_enlarge_ratio', 1)
    needed = data['batch_size_per_gpu'] * max(gpus, 1) * ranks
    if images is not None and images * ratio < needed:
        raise QuantError(f'datasets.train.batch_size_per_gpu is {data["batch_size_per_gpu"]}, but {images} images with '
                         f'dataset_enlarge_ratio {ratio} do not fill one batch of {needed}')


def check_checkpoints(path: Mapping[str, Any], resuming: bool, skip: tuple[str, ...] = ()) -> None:
    """Check the files that ``path`` names, as the host reads them; of those in ``skip`` only that they exist."""
    state = path.get('resume_state')
    if state and not os.path.isfile(os.path.expanduser(state)):
        raise QuantError(f'path.resume_state {state} does not exist')
    for key, file in path.items():
        if key.startswith('pretrain_network') and file and not (resuming or state):
            if key in skip and os.path.isfile(os.path.expanduser(file)):
                continue
            param_key = path.get(key.replace('pretrain_network', 'param_key'), 'params')
            read_checkpoint(os.path.expanduser(file), f'path.{key}', param_key)


def read_checkpoint(file: str, where: str, param_key: str | None = 'params') -> dict[str, Any]:
    """Read a checkpoint in the host's format without running anything in it.

    Args:
        file: path of the file.
        where: what to call it in messages, for example ``path.pretrain_network_g``.
        param_key: entry that holds the network; None where the file is the network's state dict itself. As in the
            host, ``params`` stands in for an entry that is missing.

    Returns:
        The whole file.

    Raises:
        QuantError: the file is missing, is not a checkpoint, or lacks the entry.
    """
    import torch
    if not os.path.isfile(file):
        raise QuantError(f'{where} {file} does not exist')
    try:
        content = torch.load(file, map_location='cpu', weights_only=True)
    except Exception as error:  # a damaged file may raise nearly anything
        reason = str(error).strip().split('\n')[0].rstrip('.')
        raise QuantError(f'{where} {file} cannot be read with torch.load(weights_only=True): {reason}') from None
    if not isinstance(content, dict):
        raise QuantError(f'{where} {file} holds {type(content).__name__}, not a checkpoint')
    if param_key is not None and param_key not in content and 'params' not in content:
        entries = ' '.join(str(key) for key in list(content)[:5])
        option = where.replace('pretrain_network', 'param_key')
        raise QuantError(f"{where} {file} has no entry '{param_key}', but {entries} ...; if the file is a plain state "
                         f"dict, give '{option.split('.')[-1]}: ~' under path")
    return content
