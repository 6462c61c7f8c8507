"""SR-STE: sparse-refined straight-through estimator (Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural
Networks From Scratch", ICLR 2021)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..network.masking import start_masks
from ..network.sparsity_plan import SparseLayer
from ..nn import RefinedMask, WeightMask
from ..schema import option
from .base import SPARSITY, SparseTraining, SparsityMethod


@dataclass(frozen=True)
class SRSTEOptions:
    """Options of SR-STE.

    Args:
        decay: lambda_W, what draws masked weights to zero; 2e-4 in the published code.
    """

    decay: float = option(2e-4, low=0.0)


@SPARSITY.register('sr_ste')
class SRSTE(SparsityMethod):
    """Uniform N:M whose mask follows the magnitudes after every step; masked weights learn too.

    Gradient of a weight: that of the masked weight, plus decay times the weight where it is masked, added to the
    gradient before the optimizer, as published. The paper trains with SGD; under Adam the added term is normalised
    with the rest. lambda_W was published for classification and is taken as it is, whatever the range of the loss.
    """

    name = 'sr_ste'
    Options = SRSTEOptions
    learns = True

    def make_mask(self, layer: SparseLayer, shape: tuple[int, ...]) -> WeightMask:
        return RefinedMask(shape, self.plan.group, layer.kept, self.options.decay)

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> SparseTraining:
        return SRSTETraining(net, optimizer, self.plan)


class SRSTETraining(SparseTraining):
    """Ranks again after every step."""

    @torch.no_grad()
    def _after_step(self, *_: Any) -> None:
        start_masks(self.net)
