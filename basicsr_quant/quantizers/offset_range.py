"""A learned range behind a per-channel shift or scale: ODM-v1's selective distribution offsets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .learned_range import LearnedRange


class OffsetRange(LearnedRange):
    """``fake_quantize(scale_c x + shift_c)``, each of the two only in layers that were selected for it.

    shift (in units of the calibrated width) starts at 0 and scale at 1, so that selecting changes nothing at first.
    Both are learned with the ranges. Layers that are not selected compute exactly what :class:`LearnedRange` does.

    Args:
        bits: Bits of the grid.
        channels: Number C of channels of the input (N, C, H, W).
    """

    selected: Tensor

    def __init__(self, bits: int, channels: int, **kwargs: Any) -> None:
        super().__init__(bits, **kwargs)
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))
        self.register_buffer('selected', torch.zeros(2, dtype=torch.bool))

    def select(self, shift: bool, scale: bool) -> None:
        """Switch the shift and the scale of this layer on or off."""
        self.selected.copy_(torch.tensor([shift, scale]))
        self._apply_selection()

    def _apply_selection(self) -> None:
        # Plain attributes beside the saved flags: forward must not read a tensor to decide.
        self.use_shift, self.use_scale = self.selected.tolist()

    use_shift = False
    use_scale = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._apply_selection()

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        if self.enabled and self.use_scale:
            x = x * self.scale
        if self.enabled and self.use_shift:
            x = x + self.shift * self.unit
        return super().forward(x).to(dtype)
