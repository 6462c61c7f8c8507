"""Running one of the host's pipelines with the host's own flags."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys

from .. import option_file
from ..errors import QuantError

_MIXED = re.compile(r'stack expects each tensor to be equal size, but got (\[[^]]*\]) at entry \d+ and (\[[^]]*\])')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that BasicSR's train.py and test.py take."""
    parser.add_argument('-opt', required=True, metavar='FILE', help='option file (YAML); a bare name may be one that '
                        'comes with the package')
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm'], default='none',
                        help='how the job was launched (default: none; pytorch under torchrun)')
    parser.add_argument('--auto_resume', action='store_true', help='go on from the newest training state')
    parser.add_argument('--debug', action='store_true', help='log and validate every few iterations')
    parser.add_argument('--local_rank', type=int, default=0, help='set by old launchers; not used')
    parser.add_argument('--force_yml', nargs='+', metavar='KEY:KEY=VALUE',
                        help='change options of the file, for example train:ema_decay=0.999')


def run(command: str, pipeline: str, args: argparse.Namespace, **request: object) -> None:
    """Run ``basicsr.<pipeline>.<pipeline>_pipeline`` here, in the working directory.

    Args:
        command: the subcommand the user gave.
        pipeline: 'train' or 'test'.
        args: parsed arguments of ``add_arguments``.
        request: what the host's flags cannot say; handed to ``basicsr_quant.seam.request``.
    """
    path = option_file.find(args.opt)
    option_file.check_force_yml(option_file.read(path), args.force_yml)

    import basicsr_quant
    basicsr_quant.enable()
    from basicsr_quant import seam
    seam.request(command=command, **request)
    host = importlib.import_module(f'basicsr.{pipeline}')
    before = sys.argv
    sys.argv = [f'basicsr {command}', *_host_flags(path, args)]  # the host parses these, and writes them to its logs
    try:
        getattr(host, f'{pipeline}_pipeline')(os.getcwd())
    except RuntimeError as error:
        sizes = _MIXED.search(str(error))
        if sizes is None:
            raise
        raise QuantError(
            f'datasets.train gives images of several sizes, {sizes[1]} and {sizes[2]} among them, which no batch can '
            'hold; crop them to one size, or set batch_size_per_gpu: 1'
        ) from None
    finally:
        sys.argv = before
        seam.request()  # a pipeline that is run later in this process asked for nothing
        _leave_group()


def _host_flags(path: str, args: argparse.Namespace) -> list[str]:
    flags = ['-opt', path, '--launcher', args.launcher, '--local_rank', str(args.local_rank)]
    flags += ['--auto_resume'] if args.auto_resume else []
    flags += ['--debug'] if args.debug else []
    return flags + (['--force_yml', *args.force_yml] if args.force_yml else [])


def _leave_group() -> None:
    """Leave the process group that the host joined and forgets, which torch would complain about."""
    from torch import distributed
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
