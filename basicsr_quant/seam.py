"""The one seam with BasicSR: the ``parse_options`` that its train and test modules hold.

The host parses, renames the old experiment, opens data and only then builds a model: too late to refuse anything. So
everything is checked before its parser runs, and the options are rewritten right after it. Nothing else of the host is
replaced here (faults are mended in :mod:`basicsr_quant.compat`).
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import option_file
from .errors import QuantError

_REQUEST: dict[str, Any] = {}


def request(**wanted: Any) -> None:
    """Note what the command line asked for and the host's flags cannot say: ``command``, ``checkpoint``."""
    _REQUEST.clear()
    _REQUEST.update(wanted)


def install() -> None:
    """Wrap the host's ``parse_options``; called by :func:`basicsr_quant.enable`, after ``compat.apply``."""
    importlib.import_module('basicsr_quant.archs')
    importlib.import_module('basicsr_quant.models.quantized_model')
    for name in ('train', 'test'):
        module: Any = importlib.import_module(f'basicsr.{name}')
        if not hasattr(module.parse_options, '__wrapped__'):
            module.parse_options = _wrap(module.parse_options)


def _wrap(host: Any) -> Any:
    @functools.wraps(host)
    def parse_options(root_path: str, is_train: bool = True) -> Any:
        given = _read_command_line()
        command = 'train' if is_train else _REQUEST.get('command', 'test')
        raw = option_file.read(given.opt)
        force(raw, given.force_yml)
        import_components(raw.get('imports'))
        if not is_train:
            _keep_test_sets(raw)
        prepared = _prepare(raw, command, root_path, is_train, given)
        opt, args = host(root_path, is_train=is_train)
        if not is_train:
            _keep_test_sets(opt)
            opt['val'] = {'save_img': False, 'suffix': None, **(opt.get('val') or {})}
        if prepared is not None:
            _rewrite(opt, prepared)
        return opt, args

    return parse_options


def _read_command_line() -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument('-opt', required=True)
    parser.add_argument('--force_yml', nargs='+')
    parser.add_argument('--debug', action='store_true')
    parser.add_argument('--auto_resume', action='store_true')
    return parser.parse_known_args(sys.argv[1:])[0]


def force(raw: dict[str, Any], entries: list[str] | None) -> None:
    """Apply ``--force_yml`` to our copy of the options as the host will to its own."""
    from basicsr.utils.options import _postprocess_yml_value

    option_file.check_force_yml(raw, entries)
    for entry in entries or ():
        keys, value = entry.split('=')
        *parents, last = keys.strip().split(':')
        inner = raw
        for key in parents:
            inner = inner[key]
        inner[last] = _postprocess_yml_value(value.strip())


def import_components(names: Any) -> None:
    """Import the modules of the option ``imports:``, which register the user's own components."""
    if names is None:
        return
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        raise QuantError(f'imports must be a list of module names such as [my_project.archs], not {names!r}')
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise QuantError(f'imports: {name} cannot be imported ({error}); is it on PYTHONPATH?') from None


def _keep_test_sets(opt: dict[str, Any]) -> None:
    """One option file serves every command: test reads ``test*``, or ``val*`` where there is none."""
    sets = opt.get('datasets')
    if not isinstance(sets, Mapping):
        return
    for kind in ('test', 'val'):
        kept = {k: v for k, v in sets.items() if k.split('_')[0] == kind}
        if kept:
            opt['datasets'] = kept
            return
    raise QuantError(f"datasets holds {', '.join(sets) or 'nothing'}; `basicsr test` needs a data set test* or val*")


def _prepare(
    raw: dict[str, Any], command: str, root: str, is_train: bool, given: argparse.Namespace
) -> dict[str, Any] | None:
    from .data.check import check_checkpoints, check_options
    from .models.preparation import can_report, prepare

    resuming = is_train and _resumes(raw, root, given)
    sparse = raw.get('sparsity') is not None
    ours = sparse or raw.get('quant') is not None or bool(_REQUEST and command != 'train')
    check_options(raw, is_train, resuming, own_reader=ours)
    block = raw.get('quant')
    if block is None and sparse:
        block = {'method': 'none'}
    if block is None:
        # `basicsr test` on a stock file: the host's test, and our result files where the network permits.
        if not ours or not can_report(raw):
            check_checkpoints(raw['path'], resuming)
            return None
        block = {'method': 'none'}
    if is_train and isinstance(block, Mapping) and block.get('first_stage') is not None:
        raise QuantError('quant.first_stage is a training of its own that only `basicsr train` runs; use that command')
    wanted = {'command': command, 'root': root, 'is_train': is_train, 'debug': given.debug}
    return prepare(raw, block, resuming=resuming, asked=_REQUEST, **wanted)


def _resumes(raw: Mapping[str, Any], root: str, given: argparse.Namespace) -> bool:
    path, name = raw.get('path'), raw.get('name')
    if isinstance(path, Mapping) and path.get('resume_state'):
        return True
    states = Path(root, 'experiments', str(name), 'training_states')
    return bool(given.auto_resume and any(states.glob('*.state')))


def _rewrite(opt: dict[str, Any], prepared: dict[str, Any]) -> None:
    """Point the host at our registered network and model; ``network_g`` keeps its own keys flat."""
    network = opt['network_g']
    base = network.pop('type')
    opt['network_g'] = {'type': 'QuantizedNetwork', 'base_type': base, 'plan': prepared['plan'], **network}
    prepared['model_type'] = opt['model_type']
    opt['model_type'] = 'QuantizedModel'
    opt['quant_run'] = prepared
    if prepared.get('checkpoint') is not None:
        opt['path']['pretrain_network_g'] = prepared['checkpoint']
        if prepared.get('param_key') is not None:
            opt['path']['param_key_g'] = prepared['param_key']
