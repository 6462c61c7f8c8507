"""Small means by which the mends change the host: a view of torch for one module, and marks on what was changed."""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, ModuleType
from typing import Any, TypeVar

import torch

_MARK = '_basicsr_quant_mend'
F = TypeVar('F', bound=Callable[..., Any])


class TorchView(ModuleType):
    """``torch`` with a few functions replaced, to stand as the global ``torch`` of one host module.

    Code outside that module keeps the real functions.
    """

    def __init__(self, **replaced: Callable[..., Any]) -> None:
        super().__init__('torch')
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def view_torch(module: ModuleType, **replaced: Callable[..., Any]) -> None:
    """Replace functions of ``torch`` for the code of ``module`` only; earlier replacements there stay."""
    if isinstance(module.torch, TorchView):
        module.torch.__dict__.update(replaced)
    else:
        module.torch = TorchView(**replaced)  # type: ignore[attr-defined]


def views(module: ModuleType, name: str) -> bool:
    """Tell whether ``view_torch`` has replaced ``torch.<name>`` for ``module``."""
    return isinstance(module.torch, TorchView) and name in module.torch.__dict__


def mark(function: F) -> F:
    """Mark a function or class as one of ours, so that a mend finds its fault gone when it looks again."""
    setattr(function, _MARK, True)
    return function


def marked(function: object) -> bool:
    """Tell whether ``function`` (or what it wraps) is one of ours."""
    return getattr(function, _MARK, False) is True


def mentions(function: Callable[..., Any], name: str) -> bool:
    """Tell whether the code of ``function`` uses the attribute, global or constant ``name``.

    This is how a mend sees whether the host still has a fault that cannot be provoked cheaply. Decorated functions
    are unwrapped first.
    """
    while hasattr(function, '__wrapped__'):
        function = function.__wrapped__
    code: CodeType | None = getattr(function, '__code__', None)
    return code is not None and (name in code.co_names or name in code.co_consts)
