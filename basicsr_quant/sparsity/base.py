"""What a method of N:M sparsity is to the rest of the package."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from ..network.masking import apply_masks, masks
from ..network.sparsity_plan import SparseLayer, SparsityPlan
from ..nn import WeightMask
from ..registry import Registry
from ..schema import read

SPARSITY: Registry[type[SparsityMethod]] = Registry('sparsity method')
"""Methods by the name that ``sparsity.method`` takes."""


@dataclass(frozen=True)
class NoOptions:
    """For methods without options of their own."""


class SparsityMethod:
    """Base class: N is the same in every layer, the largest that meets the budget; masks stay as they start.

    Args:
        plan: The plan in force.

    Class attributes:
        Options: Frozen dataclass of the options under the method's own key.
        learns: Whether masks come out of training, so that calibration and tests need a trained file.
        chooses_kept: Whether N does; all weights are kept at the start.
        leaves_parameters_unused: Whether some parameters get no gradient in some steps, which a distributed wrapper
            has to know.
    """

    name: ClassVar[str]
    Options: ClassVar[type] = NoOptions
    learns: ClassVar[bool] = False
    chooses_kept: ClassVar[bool] = False
    leaves_parameters_unused: ClassVar[bool] = False

    def __init__(self, plan: SparsityPlan) -> None:
        self.plan = plan
        self.options: Any = read(self.Options, plan.options, f'sparsity.{self.name}')

    @classmethod
    def first_kept(cls, plan: SparsityPlan) -> int:
        """N at the start, the same for every layer of ``plan``, whose budget can be met."""
        if cls.chooses_kept:
            return plan.group
        return max(n for n in range(1, plan.group + 1) if n == 1 or plan.share(n) <= plan.budget)

    def make_mask(self, layer: SparseLayer, shape: tuple[int, ...]) -> WeightMask:
        """Build the mask of a weight."""
        return WeightMask(shape, self.plan.group, layer.kept)

    def complete(self, net: nn.Module) -> None:
        """Add to the network, which has its masks by now, what the method keeps of its own."""

    def parameter_groups(self, net: nn.Module, groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
        """Split an optimizer's groups where the method's own parameters train at another rate."""
        return groups

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> SparseTraining:
        """Make ``optimizer`` train ``net``, the bare network with started masks, as the method says."""
        return SparseTraining(net, optimizer, self.plan)


class SparseTraining:
    """A running training: what happens after each optimizer step, and figures for the log."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer, plan: SparsityPlan) -> None:
        self.net, self.plan = net, plan
        found = masks(net)
        self.masks: list[Any] = [found[layer.layer] for layer in plan.layers]
        optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, *_: object) -> None:
        """Nothing: the masks stay."""

    def share(self) -> float:
        """MACs that remain of those of the masked layers."""
        kept = torch.stack([mask.kept for mask in self.masks]).tolist()
        layers = self.plan.layers
        now = sum(layer.macs * layer.density(self.plan.group, n) for layer, n in zip(layers, kept))
        return now / sum(layer.macs for layer in layers)

    def log(self) -> dict[str, float]:
        """``density``: MACs that remain of those of the masked layers."""
        return {'density': self.share()}


def sparsity_of(plan: SparsityPlan) -> SparsityMethod:
    """The method that a plan names."""
    return SPARSITY[plan.method](plan)


def apply_sparsity(net: nn.Module, plan: SparsityPlan) -> nn.Module:
    """Give ``net`` the masks of ``plan`` in place, after quantizers or without any, and return it."""
    method = sparsity_of(plan)
    apply_masks(net, plan, method.make_mask)
    method.complete(net)
    return net


def split_off(
    groups: Iterable[dict[str, Any]], own: Iterable[nn.Parameter], factor: float, lr: float
) -> list[dict[str, Any]]:
    """Give the parameters ``own`` groups of their own, at ``factor`` times their learning rate, without decay."""
    ids = {id(p) for p in own}
    split = []
    for group in groups:
        mine = [p for p in group['params'] if id(p) in ids]
        others = [p for p in group['params'] if id(p) not in ids]
        if others:
            split.append({**group, 'params': others})
        if mine:
            split.append({**group, 'params': mine, 'lr': group.get('lr', lr) * factor, 'weight_decay': 0.0})
    return split
