"""Options as frozen dataclasses: one check, with the option's path in every message."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from .errors import QuantError, nearest

T = TypeVar('T')


def option(default: Any, *, choices: tuple[Any, ...] = (), low: float | None = None, high: float | None = None) -> Any:
    """A dataclass field that knows what it allows: one of ``choices``, or a number from ``low`` to ``high``."""
    return dataclasses.field(default=default, metadata={'choices': choices, 'low': low, 'high': high})


def read(cls: type[T], given: Any, path: str) -> T:
    """Build the dataclass ``cls`` from the mapping ``given`` (None: all defaults).

    Number-like text is a number (YAML reads ``1e-5`` as text), whole floats are integers.

    Args:
        cls: A dataclass of numbers, texts, truth values and raw mappings, made with :func:`option`.
        given: What stands in the option file.
        path: The option's path, e.g. ``quant.odm``.

    Raises:
        QuantError: for an unknown key (with the nearest known one), a wrong type or a value out of range.

    >>> @dataclasses.dataclass(frozen=True)
    ... class Demo:
    ...     rate: float = option(1.0, low=0)
    >>> read(Demo, {'rate': '1e-5'}, 'quant.demo')
    Demo(rate=1e-05)
    >>> read(Demo, {'rte': 1}, 'quant.demo')
    Traceback (most recent call last):
    basicsr_quant.errors.QuantError: quant.demo.rte is not an option (did you mean 'rate'?); allowed: rate
    """
    if given is None:
        return cls()
    known = {f.name: f for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    check_keys(given, known, path)
    hints = typing.get_type_hints(cls)
    values = {k: _value(v, hints[k], known[k].metadata, f'{path}.{k}') for k, v in given.items()}
    return cls(**values)


def check_keys(given: Any, known: typing.Iterable[str], path: str) -> None:
    """Refuse anything but a mapping with known keys."""
    known = list(known)
    if not isinstance(given, Mapping):
        raise QuantError(f'{path} must hold `key: value` pairs, not {given!r}; allowed keys: {" ".join(known)}')
    for key in given:
        if key not in known:
            allowed = f'allowed: {" ".join(known)}' if known else 'it has no options'
            raise QuantError(f'{path}.{key} is not an option{nearest(key, known)}; {allowed}')


def _value(value: Any, hint: Any, metadata: Mapping[str, Any], path: str) -> Any:
    kinds = _kinds(hint)
    if value is None and type(None) in kinds:
        return None
    if dict in kinds and isinstance(value, Mapping):
        return dict(value)
    if tuple in kinds and isinstance(value, (list, tuple)):
        return tuple(value)
    for kind in (bool, int, float, str):
        if kind in kinds:
            ok, converted = _convert(value, kind)
            if ok:
                _check_allowed(converted, metadata, path)
                return converted
    raise QuantError(f'{path}: {value!r} given, {_allowed(metadata, kinds)} needed')


def _kinds(hint: Any) -> tuple[type, ...]:
    if typing.get_origin(hint) in (typing.Union, getattr(types, 'UnionType', typing.Union)):
        return typing.get_args(hint)
    return (hint,)


def _convert(value: Any, kind: type) -> tuple[bool, Any]:
    if kind is bool or kind is str:
        return isinstance(value, kind), value
    if isinstance(value, bool):
        return False, value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return False, value
    if kind is float or not number.is_integer():  # also false for infinities and NaN
        return kind is float and math.isfinite(number), number
    return True, value if isinstance(value, int) else int(number)


def _check_allowed(value: Any, metadata: Mapping[str, Any], path: str) -> None:
    choices, low, high = metadata.get('choices', ()), metadata.get('low'), metadata.get('high')
    if choices and value not in choices:
        names = ' | '.join(str(c) for c in choices)
        raise QuantError(f'{path}: {value!r} given{nearest(value, map(str, choices))}, allowed: {names}')
    numeric = isinstance(value, (int, float)) and not isinstance(value, bool)
    if numeric and ((low is not None and value < low) or (high is not None and value > high)):
        raise QuantError(f'{path}: {value!r} given, {_allowed(metadata, (type(value),))} needed')


def _allowed(metadata: Mapping[str, Any], kinds: tuple[type, ...]) -> str:
    if metadata.get('choices'):
        return 'one of ' + ' | '.join(str(c) for c in metadata['choices'])
    low, high = metadata.get('low'), metadata.get('high')
    names = {
        int: 'a whole number', float: 'a number', bool: 'true or false', str: 'text', dict: '`key: value` pairs',
        tuple: 'a list',
    }  # fmt: skip
    text = ' or '.join(names[k] for k in kinds if k in names)
    if low is not None and high is not None:
        return f'{text} from {low:g} to {high:g}'
    if low is not None:
        return f'{text} of at least {low:g}'
    return text if high is None else f'{text} of at most {high:g}'
