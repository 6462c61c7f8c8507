"""The ``basicsr`` command.

A subcommand is a module in this folder with four names: ``name``, ``help`` (one line), ``add_arguments(parser)`` and
``run(args)``, which returns an exit code or None. Modules whose name begins with an underscore are not subcommands.
Everything heavy (torch, BasicSR) is imported inside ``run``, so that ``basicsr --help`` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NoReturn

from ..compat import has_host, missing_host
from ..errors import QuantError, nearest
from ..version import __version__

_ORDER = ('train', 'calibrate', 'test', 'plan', 'prune', 'export', 'upscale', 'report', 'bench')
_EXAMPLES = """
examples:
  basicsr train -opt options/EDSR_x4_W4A4_ODM.yml
  basicsr test -opt options/EDSR_x4_W4A4_ODM.yml --force_yml num_gpu=0

`basicsr COMMAND --help` explains one command.
"""


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are user errors like all others: one sentence."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, 'allow_abbrev': False})

    def error(self, message: str) -> NoReturn:
        raise QuantError(f'{message} (see {self.prog} --help)')


def commands() -> dict[str, ModuleType]:
    """Return the subcommand modules by name, in the order in which one uses them."""
    names = [info.name for info in pkgutil.iter_modules(__path__) if not info.name.startswith('_')]
    modules = [importlib.import_module(f'{__name__}.{name}') for name in names]
    known = {module.name: module for module in modules}
    return {name: known[name] for name in [*(n for n in _ORDER if n in known), *(n for n in known if n not in _ORDER)]}


def parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command; parsed arguments carry the subcommand's ``run``."""
    top = _Parser(
        prog='basicsr',
        description='Train, calibrate, test and deploy quantized super-resolution networks with BasicSR.',
        epilog=_EXAMPLES,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=20, width=110))
    top.add_argument('--version', action='version', version=f'basicsr_quant {__version__}')
    places = top.add_subparsers(title='commands', dest='command', metavar='COMMAND', parser_class=_Parser)
    for name, module in commands().items():
        place = places.add_parser(name, help=module.help, description=module.help)
        module.add_arguments(place)
        place.set_defaults(run=module.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code: 0, 2 for a user's mistake, 130 when interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _dispatch(arguments)
    except QuantError as error:
        print(f'basicsr: error: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print('basicsr: interrupted', file=sys.stderr)
        return 130


def _dispatch(arguments: list[str]) -> int:
    whole = parser()
    if not arguments:
        if not has_host():
            raise missing_host()
        whole.print_help()
        return 0
    first, known = arguments[0], commands()
    if not first.startswith('-') and first not in known:
        raise QuantError(f"there is no command '{first}'{nearest(first, known)}; commands: {' '.join(known)}")
    args = whole.parse_args(arguments)
    if 'run' not in args:
        raise QuantError(f'no command given; commands: {" ".join(known)}')
    return args.run(args) or 0
