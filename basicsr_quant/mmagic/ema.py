"""Averaged weights of a quantized network."""

from __future__ import annotations

from typing import Any

from mmagic.engine.hooks import ExponentialMovingAverageHook
from mmengine.registry import HOOKS
from torch import Tensor


@HOOKS.register_module()
class QuantizedEMAHook(ExponentialMovingAverageHook):
    """MMagic's hook, with which buffers are copied and not averaged.

    The hook of MMagic 1.2.0 subtracts buffers too, which torch refuses for truth values (``calibrated``), and counts
    of bits must not be averaged either. Parameters, ranges among them, are averaged as there.
    """

    @staticmethod
    def lerp(a: Tensor, b: Tensor, *args: Any, trainable: bool = True, **kwargs: Any) -> Tensor:
        """The averaged value of a parameter; ``a`` itself where it is a buffer. Arguments as in MMagic."""
        if not trainable:
            return a
        return ExponentialMovingAverageHook.lerp(a, b, *args, trainable=True, **kwargs)  # type: ignore[no-any-return]
