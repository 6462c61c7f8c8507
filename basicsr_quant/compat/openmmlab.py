"""What stands in the way of MMagic 1.2.0 on today's torch, mended when it is imported and not before.

On the stack that MMagic's own instructions install (torch up to 2.1, its torchvision, the full mmcv) none of this is
needed and nothing is changed. On torch 2.6 and newer without a CUDA build and with ``mmcv-lite``, two imports fail:

- torchvision names the operators ``nms`` and ``qnms`` although its binary part cannot load;
- ``mmagic.models`` imports operators from ``mmcv._ext``, which ``mmcv-lite`` does not have. A hollow module stands in;
  calling one of its operators raises an error (EDVR, BasicVSR++, TDAN and StyleGAN2 need them, still images do not).

MMagic's tools import it before they read a config, so this has to come first: ``make env-mmagic`` puts the line
``import basicsr_quant.compat.openmmlab`` into a ``.pth`` file of its environment. That costs next to nothing: torch is
not imported until something else imports torchvision.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

_EXTENSION = 'mmcv._ext'


class _BeforeTorchvision(importlib.abc.MetaPathFinder):
    """Finds nothing; declares the operators when torchvision is about to be imported."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        if name == 'torchvision' and self in sys.meta_path:
            sys.meta_path.remove(self)  # the mend looks for torchvision itself
            from .imports import torchvision_operators

            torchvision_operators()


class _HollowExtension(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Stands behind all other finders, so that it is asked only where there is no ``mmcv._ext``."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name == _EXTENSION else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        return _Hollow(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


class _Hollow(ModuleType):
    """A module in which every operator exists and none works."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith('__'):
            raise AttributeError(name)

        def operator(*_: object, **__: object) -> None:
            raise NotImplementedError(f'{name} is an operator of mmcv, and mmcv-lite has none; install the full mmcv')

        return operator


def install() -> None:
    """Put both finders in place; a second call changes nothing."""
    if not any(isinstance(finder, _HollowExtension) for finder in sys.meta_path):
        sys.meta_path.insert(0, _BeforeTorchvision())
        sys.meta_path.append(_HollowExtension())


install()
