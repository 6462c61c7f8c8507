"""Weights at the bits that a selector chose for the input of their layer, image by image."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .fake_quantize import fake_quantize
from .weight_range import MaxAbsWeight


class SelectedWeight(MaxAbsWeight):
    r"""PAMS's weights, range [-m, m] with m = max \|W\|, at as many bits as the layer's input has for each image.

    Q_n = sum_k w_nk Q_k(W), with w the hard weights of the layer's :class:`SelectedRange` and Q_k the weight at its
    candidate b_k. So the choice also learns from what it does to the weight: d L / d w_nk = <dL/dQ_n, Q_k(W)>.

    Args:
        candidates: Bits b_k, rising.
        name: The layer, under which its choice stands in the context.
        per_channel: One bound for each output channel.
    """

    def __init__(self, candidates: Sequence[int], name: str, per_channel: bool = False) -> None:
        super().__init__(candidates[-1], per_channel)
        self.name, self.candidates = name, tuple(candidates)
        self.register_buffer('candidate_bits', torch.tensor(candidates, dtype=torch.float32), persistent=False)

    def forward(self, weight: Tensor) -> Tensor:
        """Of one image (O, ...), of N images (N, O, ...); (O, ...) at the most bits where nothing was chosen."""
        choice = None if self.context is None else self.context.choices.get(self.name)
        if not self.enabled or choice is None or self.context is None:
            return super().forward(weight)
        self.context.weight_bits[self.name] = choice.detach() @ self.candidate_bits  # type: ignore[operator]
        lower, upper = self.bounds(weight)
        each = torch.stack([fake_quantize(weight, lower, upper, bits, narrow_range=True) for bits in self.candidates])
        mixed = torch.tensordot(choice.to(each.dtype), each, 1)
        return mixed[0] if len(mixed) == 1 else mixed

    def extra_repr(self) -> str:
        return f'candidates={self.candidates}, narrow'
