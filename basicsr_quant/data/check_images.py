"""Check that the images of a data set are there and belong together: folders, lists and LMDB."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from ..errors import QuantError
from .check_lmdb import read_keys

_BACKENDS = ('disk', 'lmdb', 'memcached')
_PREPARED = (
    (re.compile(r'(^|/)datasets/DIV2K(/|$)'), 'python tools/prepare_div2k.py --source DIV2K_train_HR'),
    (re.compile(r'(^|/)datasets/(Set5|Set14|B100|Urban100|Manga109)(/|$)'),
     'python tools/prepare_div2k.py --benchmarks FOLDER_WITH_THE_SETS'),
    (re.compile(r'(^|/)datasets/demo(/|$)'), 'make demo'),
)
Size = tuple[int, int]


def count_images(data: Mapping[str, Any], where: str, training: bool) -> int:
    """Check one ``PairedImageDataset`` or ``SingleImageDataset`` and return how many images it has.

    Args:
        data: its options; for pairs with ``scale``, the HR pixels per LR pixel.
        where: its path in the option file, for example ``datasets.train``.
        training: pairs must fit to the pixel and be large enough for ``gt_size``.

    Raises:
        QuantError: a folder, list, database or image is missing, or a pair does not fit.
    """
    backend = data['io_backend']['type']
    if backend not in _BACKENDS:
        raise QuantError(f"{where}.io_backend.type is '{backend}'; allowed: {' '.join(_BACKENDS)}")
    roots = {key: os.path.expanduser(data[key]) for key in ('dataroot_gt', 'dataroot_lq') if data.get(key)}
    for key, root in roots.items():
        check_folder(root, f'{where}.{key}')
    if backend == 'lmdb':
        return _check_databases(data, roots, where, training)
    names = _listed(data, where) if data.get('meta_info_file') else None
    if 'dataroot_gt' not in roots:
        return _check_single(roots['dataroot_lq'], names, where)
    return _check_pairs(data, roots, names, where)


def check_folder(root: str, where: str) -> None:
    """Raise QuantError if there is no such folder; where a command of this project makes it, give the command."""
    if not os.path.isdir(root):
        path = root.replace(os.sep, '/')
        found = [command for pattern, command in _PREPARED if pattern.search(path)]
        raise QuantError(f'{where} {root} does not exist' + (f"; '{found[0]}' prepares it" if found else ''))


def _check_databases(data: Mapping[str, Any], roots: Mapping[str, str], where: str, training: bool) -> int:
    sizes = {key: read_keys(root, f'{where}.{key}') for key, root in roots.items()}
    lq = sizes['dataroot_lq']
    gt = sizes.get('dataroot_gt')
    if gt is None:
        return len(lq)
    if gt.keys() != lq.keys():
        odd = sorted(gt.keys() ^ lq.keys())
        side, other = ('dataroot_gt', 'dataroot_lq') if odd[0] in gt else ('dataroot_lq', 'dataroot_gt')
        raise QuantError(f"{where}.{side} {roots[side]} has the key '{odd[0]}', which {where}.{other} {roots[other]} "
                         f'lacks ({len(odd)} such keys)')
    if training:
        for key in gt:
            _check_fit(key, gt[key], lq[key], where, data['scale'], data['gt_size'])
    return len(gt)


def _check_fit(key: str, gt: Size | None, lq: Size | None, where: str, scale: int, gt_size: int) -> None:
    if gt is None or lq is None:
        return
    if gt != (lq[0] * scale, lq[1] * scale):
        raise QuantError(f"{where}: image '{key}' is {gt[0]}x{gt[1]} in dataroot_gt, {lq[0]}x{lq[1]} in dataroot_lq; "
                         f'that is not scale {scale}')
    if min(gt) < gt_size:
        raise QuantError(f"{where}.gt_size is {gt_size}, but image '{key}' is {gt[0]}x{gt[1]}")


def _listed(data: Mapping[str, Any], where: str) -> list[str]:
    """Names in a meta information file: the first word of each line."""
    path = data['meta_info_file']
    try:
        with open(path) as file:
            return [line.split(' ')[0].strip() for line in file if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise QuantError(f'{where}.meta_info_file {path} cannot be read') from None


def _files(root: str) -> set[str]:
    """The files in a folder that the host takes for images: all that are not hidden."""
    with os.scandir(root) as entries:
        return {entry.name for entry in entries if entry.is_file() and not entry.name.startswith('.')}


def _check_single(root: str, names: list[str] | None, where: str) -> int:
    files = _files(root)
    if not files:
        raise QuantError(f'{where}.dataroot_lq {root} holds no images')
    missing = [name for name in names or () if not os.path.isfile(os.path.join(root, name))]
    if missing:
        raise QuantError(f'{where}.meta_info_file names {missing[0]}, which is not in dataroot_lq {root}')
    return len(files if names is None else names)


def _check_pairs(data: Mapping[str, Any], roots: Mapping[str, str], names: list[str] | None, where: str) -> int:
    gt_root, lq_root = roots['dataroot_gt'], roots['dataroot_lq']
    template = data.get('filename_tmpl', '{}')
    if names is None:
        gt, lq = _files(gt_root), _files(lq_root)
        if not gt:
            raise QuantError(f'{where}.dataroot_gt {gt_root} holds no images')
        if len(gt) != len(lq):
            raise QuantError(f'{where}: dataroot_gt {gt_root} holds {len(gt)} images and dataroot_lq {lq_root} '
                             f'{len(lq)}; they must be pairs')
        names = sorted(gt)
    for name in names:
        if not os.path.isfile(os.path.join(gt_root, name)):
            raise QuantError(f'{where}.meta_info_file names {name}, which is not in dataroot_gt {gt_root}')
        partner = _partner(name, template, where)
        if not os.path.isfile(os.path.join(lq_root, partner)):
            raise QuantError(f'{where}.dataroot_lq {lq_root} lacks {partner}, the partner of {name} by filename_tmpl '
                             f"'{template}'")
    return len(names)


def _partner(name: str, template: str, where: str) -> str:
    stem, extension = os.path.splitext(os.path.basename(name))
    try:
        return template.format(stem) + extension
    except (IndexError, KeyError, ValueError, AttributeError):
        raise QuantError(f"{where}.filename_tmpl is '{template}'; it must hold {{}} once, for the name in "
                         'dataroot_gt') from None
