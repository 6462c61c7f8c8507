"""BasicSR's face: registered models. Network files (:mod:`.checkpoint`, :mod:`.conventions`) need no host."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .quantized_model import QuantizedModel, QuantizedModelMixin


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import quantized_model

        return getattr(quantized_model, name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


__all__ = ['QuantizedModel', 'QuantizedModelMixin']
