"""Filter pruning for the host: from an option file and its FP32 checkpoint to a smaller network with a file of its own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import yaml
from torch import nn

from ..compat.files import atomic_save
from ..errors import QuantError
from ..report.files import write_text
from ..seam import import_components
from ..sparsity.filter_options import FilterPruning
from ..sparsity.filter_pruning import PruningReport, prune
from . import checkpoint
from .preparation import build_float

ARCH = 'PrunedNetwork'


@dataclass(frozen=True)
class Pruned:
    """A pruned network and what was written for it; ``name`` is that of the new option file."""

    net: nn.Module
    report: PruningReport
    name: str
    source: str
    checkpoint: str
    option_file: str


def prune_file(raw: Mapping[str, Any], options: FilterPruning, asked: str | None, root: str, made_by: str) -> Pruned:
    """Prune the network of an option file.

    Writes ``experiments/<name>/models/net_g_pruned.pth`` and ``experiments/<name>/<name>_pruned.yml``, the same
    options with the smaller network, which every command takes.

    Args:
        raw: The option file.
        options: How to prune.
        asked: ``--checkpoint``; None takes ``path.pretrain_network_g``.
        root: The working directory, root of ``experiments/``.
        made_by: A line on the command, for the head of the new option file.

    Raises:
        QuantError: if there is no FP32 checkpoint, or nothing to prune.
    """
    for needed in ('name', 'network_g'):
        if needed not in raw:
            raise QuantError(f'{needed} is missing in the option file; `basicsr prune` reads it')
    import_components(raw.get('imports'))
    paths = raw.get('path') or {}
    source = asked or paths.get('pretrain_network_g')
    if source is None:
        raise QuantError('path.pretrain_network_g is missing; `basicsr prune` prunes that FP32 network')
    source = os.path.expanduser(source)
    file = checkpoint.read_network_file(source)
    if file.plan is not None:
        raise QuantError(f'{source} is quantized; filters are pruned first, then the smaller network is quantized')
    net = build_float(raw['network_g']).eval()
    checkpoint.load_state(net, file, paths.get('param_key_g', 'params'))
    report = prune(net, options)
    network = raw['network_g']
    again = network if network['type'] == ARCH else {'base': dict(network), 'widths': {}}
    smaller = {'type': ARCH, 'base': again['base'], 'widths': {**again['widths'], **report.widths}}
    state = net.state_dict()
    checkpoint.load_state(build_float(smaller), checkpoint.NetworkFile(source, {'params': state}, None, {}), 'params')
    name = f'{raw["name"]}_pruned'
    folder = os.path.join(root, 'experiments', raw['name'])
    target = os.path.join(folder, 'models', 'net_g_pruned.pth')
    os.makedirs(os.path.dirname(target), exist_ok=True)
    atomic_save({'params': state}, target)
    written = {k: v for k, v in raw.items() if k != 'sparsity'}
    kept = {k: v for k, v in paths.items() if k != 'resume_state'}
    written.update(name=name, network_g=smaller, path={
        **kept, 'pretrain_network_g': os.path.relpath(target, root), 'param_key_g': 'params', 'strict_load_g': True,
    })  # fmt: skip
    option_file = os.path.join(folder, f'{name}.yml')
    text = yaml.safe_dump(written, sort_keys=False, allow_unicode=True, width=100)
    write_text(option_file, f'# {made_by}\n{text}')
    return Pruned(net, report, name, source, target, os.path.relpath(option_file, root))
