"""Option files on disk: finding one, reading it safely, and checking the command line's changes to it."""

from __future__ import annotations

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from .errors import QuantError, nearest

_PACKAGE = Path(__file__).resolve().parent


def installed() -> dict[str, Path]:
    """Return the option files that come with the package, by name (``EDSR_x4_W4A4_ODM.yml``)."""
    for folder in (_PACKAGE / 'options', _PACKAGE.parent / 'options'):  # in a wheel; in the repository
        if folder.is_dir():
            return {path.name: path for path in sorted(folder.glob('*.yml'))}
    return {}


def find(path: str) -> str:
    """Return ``path``, or the installed option file of that bare name where no such file exists here.

    Raises:
        QuantError: there is neither.
    """
    if Path(path).is_file():
        return path
    if Path(path).is_dir():
        raise QuantError(f'-opt {path} is a folder; give a YAML file')
    known = installed()
    if Path(path).name == path and path in known:
        return str(known[path])
    beside = [str(file) for file in Path(path).parent.glob('*.yml')]
    raise QuantError(f'-opt {path} does not exist{nearest(path, [*beside, *known])}')


def read(path: str) -> dict[str, Any]:
    """Read an option file with YAML's safe loader.

    Raises:
        QuantError: not readable, not YAML (the message gives the line), or not a mapping.
    """
    try:
        options = yaml.safe_load(Path(path).read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise QuantError(f'{path} cannot be read: {error}') from None
    except yaml.YAMLError as error:
        mark, problem = getattr(error, 'problem_mark', None), getattr(error, 'problem', None)
        where = f', line {mark.line + 1}' if mark else ''
        raise QuantError(f'{path}{where}: not valid YAML ({problem or error})') from None
    if not isinstance(options, dict):
        raise QuantError(f'{path} holds {type(options).__name__}, not the key: value pairs of an option file')
    return options


def check_force_yml(options: Mapping[str, Any], entries: Iterable[str] | None) -> None:
    """Refuse ``--force_yml`` entries that the host cannot carry out, or would carry out as something else.

    The host runs each entry as Python code. It wants ``key:key=value`` with keys that the file has, and evaluates
    values that begin with ``[``.

    Args:
        options: the option file's content.
        entries: what followed ``--force_yml``; None for nothing.

    Raises:
        QuantError: an entry that is not of this form, a key that is not in the file, or a list that is no literal.
    """
    for entry in entries or ():
        keys, equals, value = entry.partition('=')
        if not equals or '=' in value or not keys.strip():
            raise QuantError(f'--force_yml {entry} is not of the form key:key=value')
        _check_keys(options, entry, keys.strip().split(':'))
        if value.strip().startswith('['):
            try:
                ast.literal_eval(value.strip())
            except (ValueError, SyntaxError):
                raise QuantError(f'--force_yml {entry}: {value.strip()} is not a list of plain values') from None


def _check_keys(options: Mapping[str, Any], entry: str, keys: list[str]) -> None:
    inner: Any = options
    for depth, key in enumerate(keys):
        if not isinstance(inner, Mapping) or key not in inner:
            known = inner if isinstance(inner, Mapping) else ()
            where = f'{":".join(keys[:depth])} has' if depth else 'the option file has'
            hint = nearest(key, [str(name) for name in known])
            raise QuantError(f"--force_yml {entry}: {where} no key '{key}'{hint}; new keys cannot be made here")
        inner = inner[key]
