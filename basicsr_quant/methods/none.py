"""No quantization: the FP32 network through the same pipeline, for reference figures."""

from __future__ import annotations

from dataclasses import dataclass

from .base import METHODS, Method


@dataclass(frozen=True)
class NoOptions:
    """``method: none`` takes no options."""


@METHODS.register('none')
class NoQuantization(Method):
    """Leaves every layer in floating point."""

    name = 'none'
    Options = NoOptions
