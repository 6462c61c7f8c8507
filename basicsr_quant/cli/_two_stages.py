"""``quant.first_stage``: a recipe of two trainings from one option file."""

from __future__ import annotations

import argparse
import contextlib
import copy
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import QuantError


def asked_for(raw: Mapping[str, Any]) -> bool:
    """Whether an option file has a first stage."""
    block = raw.get('quant')
    return isinstance(block, Mapping) and block.get('first_stage') is not None


def stages_of(raw: Mapping[str, Any], experiments: str, debug: bool = False) -> tuple[dict[str, Any], dict[str, Any]]:
    """The option files of both stages.

    The first one trains the method that the second starts from, as experiment ``<name>_<method>``, from the file's
    ``path.pretrain_network_g``; bits, scope, data and calibration are the file's, the schedule is the file's shortened
    to ``first_stage.total_iter``. The second one is the file, started from what the first leaves; its teacher ``fp32``
    is the network that the first started from.

    Args:
        raw: The option file, ``--force_yml`` applied.
        experiments: The folder of experiments.
        debug: The host's ``--debug``, which puts ``debug_`` before names.

    Raises:
        QuantError: as :func:`~basicsr_quant.config.read_config`.
    """
    from ..config import read_config
    from ..methods import METHODS

    config = read_config(raw['quant'])
    stage = config.first_stage
    assert stage is not None
    method = METHODS[config.method].starts_from[0]
    first, second = copy.deepcopy(dict(raw)), copy.deepcopy(dict(raw))
    first['name'] = f'{raw["name"]}_{method}'
    left_out = ('method', 'first_stage', 'distill', config.method)
    block = {k: v for k, v in first['quant'].items() if k not in left_out}
    first['quant'] = {'method': method, **block, **({method: dict(stage.options)} if stage.options else {})}
    _shorten(first.setdefault('train', {}), stage.total_iter, stage.lr)
    del second['quant']['first_stage']
    given = (raw.get('path') or {}).get('pretrain_network_g')
    if config.distill is not None and config.distill.teacher == 'fp32':
        if given is None:
            raise QuantError("quant.distill.teacher: 'fp32' is path.pretrain_network_g, which is not given")
        second['quant']['distill']['teacher'] = given
    folder = ('debug_' if debug and not first['name'].startswith('debug') else '') + first['name']
    start = os.path.join(experiments, folder, 'models', 'net_g_latest.pth')
    second['path'] = {**(raw.get('path') or {}), 'pretrain_network_g': start}
    return first, second


def _shorten(train: dict[str, Any], total: int | None, lr: float | None) -> None:
    before = train.get('total_iter')
    if total is not None and before:
        scheduler = train.get('scheduler') or {}
        for key in ('milestones', 'periods', 'restarts'):
            if key in scheduler:
                scheduler[key] = [max(1, round(moment * total / before)) for moment in scheduler[key]]
        train['total_iter'] = total
    if lr is not None and 'optim_g' in train:
        train['optim_g']['lr'] = lr


@contextlib.contextmanager
def first_stage(args: argparse.Namespace, raw: dict[str, Any]) -> Iterator[str]:
    """Train the first stage in a process of its own, and give the option file of the second.

    With ``--auto_resume`` a first stage that is finished is not repeated, an unfinished one goes on; with
    ``path.resume_state`` only the second runs.

    Raises:
        QuantError: for what is wrong in either stage's options, and for several processes.
    """
    if args.launcher != 'none':
        raise QuantError(
            f'quant.first_stage runs in one process, and --launcher {args.launcher} is given; train the stages from '
            'two option files'
        )
    first, second = stages_of(raw, os.path.join(os.getcwd(), 'experiments'), args.debug)
    _check_second(second)
    done = Path(second['path']['pretrain_network_g']).is_file() and args.auto_resume
    with tempfile.TemporaryDirectory() as folder:
        if not done and not second['path'].get('resume_state'):
            # A process of its own, because the host sets up its log once a process.
            flags = [flag for flag in ('auto_resume', 'debug') if getattr(args, flag)]
            command = ['train', '-opt', _write(folder, first), *(f'--{flag}' for flag in flags)]
            code = subprocess.run([sys.executable, '-m', 'basicsr_quant', *command], check=False).returncode
            if code:
                raise QuantError(f'the first stage, {first["name"]}, ended with exit code {code}')
        yield _write(folder, second)


def _check_second(raw: dict[str, Any]) -> None:
    """What can be said of the second stage before there is a network for it to start from."""
    from ..config import read_config
    from ..methods.distillation import layer_weights
    from ..models.preparation import build_float
    from ..network.trace import trace
    from ..seam import import_components

    import_components(raw.get('imports'))
    config, net = read_config(raw['quant']), build_float(raw['network_g'])
    config.plan(net, trace(net), training=True)
    if config.distill is not None:
        layer_weights(net, config.distill.layer_weights(), config.distill.weight)


def _write(folder: str, options: dict[str, Any]) -> str:
    path = Path(folder, f'{options["name"]}.yml')
    path.write_text(yaml.safe_dump(options, sort_keys=False))
    return str(path)
