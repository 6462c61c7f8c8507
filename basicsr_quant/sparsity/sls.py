"""SLS: layer-wise N:M sparsity (Oh, Kim, Nah, Hong, Choi, Lee, "Attentive Fine-Grained Structured Sparsity for Image
Restoration", CVPR 2022)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..network.calibration import regularizer_weight
from ..network.extra_loss import with_loss
from ..network.masking import masks, start_masks
from ..network.sparsity_plan import SparseLayer, SparsityPlan
from ..nn import PriorityMask, SparsityModule, WeightMask, group_sizes, priorities
from ..schema import option
from .base import SPARSITY, SparseTraining, SparsityMethod, split_off

_HIGHEST = 1.03
"""Scores are kept in [0, 1.03], as published."""


@dataclass(frozen=True)
class SLSOptions:
    """Options of SLS; the defaults are the published code's.

    Args:
        cost_weight: lambda, for a reconstruction loss in 0-255 and a cost that is 1 for dense layers. The published
            1e-10 counts MACs at LR 48x48, of which CARN x4's masked layers have 3.6e9.
        score_lr: Learning rate of the scores as a multiple of the network's.
        epoch: Iterations between two rankings, and two looks at the cost.
        gain: Each second epoch a gain in dense cost / cost below this makes the weight grow (0.2 for CARN).
        growth: By how much it grows then.
    """

    cost_weight: float = option(0.36, low=0.0)
    score_lr: float = option(1.0, low=0.0)
    epoch: int = option(1000, low=1)
    gain: float = option(0.05, low=0.0)
    growth: float = option(1.2, low=1.0)


class Progress(SparsityModule):
    """How far a training is; saved with the network.

    State: ``steps`` (int64), ``factor`` (a, what the weight of the cost has grown to), ``ratio`` (dense cost / cost at
    the end of the last odd epoch), all 0-dim.
    """

    steps: Tensor
    factor: Tensor
    ratio: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('steps', torch.tensor(0))
        self.register_buffer('factor', torch.tensor(1.0))
        self.register_buffer('ratio', torch.tensor(1.0))


@SPARSITY.register('sls')
class SLS(SparsityMethod):
    r"""N of each layer is learned: M - 1 scores a layer say how many of the ranks are kept, see :class:`PriorityMask`.

    Loss: lambda a C, C = sum over layers of MACs x density(b) over the sum of their MACs, gradient through b. Each
    second epoch in which dense cost / cost gained less than ``gain``, a grows by ``growth``. Once C is at most the
    budget, N stays, C is dropped, and training goes on as fine-tuning. Ranks are taken anew each epoch.

    Deviations from the published code: C is relative to the dense cost (there absolute MACs of the training patch, so
    that lambda held for one patch size and network), a short last group is counted with its own size (there padded to
    M), and lambda is over 255 for a host's loss in 0-1. Scores are clamped after each step (there in the forward pass,
    where one that has left [0, 1.03] gets no gradient any more). Frozen scores get no gradient and no forward pass
    reads them (there Adam's momentum moves them on). N is what follows the last step, not the one before.
    """

    name = 'sls'
    Options = SLSOptions
    learns = True
    chooses_kept = True
    leaves_parameters_unused = True  # scores, once frozen

    def make_mask(self, layer: SparseLayer, shape: tuple[int, ...]) -> WeightMask:
        mask = PriorityMask(shape, self.plan.group)
        mask.kept.fill_(layer.kept)
        return mask

    def complete(self, net: nn.Module) -> None:
        net.sparsity_progress = Progress().to(next(net.parameters()).device)

    def parameter_groups(self, net: nn.Module, groups: list[dict[str, Any]], lr: float) -> list[dict[str, Any]]:
        scores = [mask.scores for mask in masks(net).values()]
        return split_off(groups, scores, self.options.score_lr, lr)  # type: ignore[arg-type]

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> SparseTraining:
        return SLSTraining(net, optimizer, self.plan, self.options)


class SLSTraining(SparseTraining):
    """Adds the cost to the host's loss, and follows the scores after each step.

    Args:
        net: The bare network.
        optimizer: Its optimizer.
        plan: Its plan.
        options: Weights and intervals.
    """

    def __init__(
        self, net: nn.Module, optimizer: torch.optim.Optimizer, plan: SparsityPlan, options: SLSOptions
    ) -> None:
        super().__init__(net, optimizer, plan)
        self.options = options
        self.progress: Any = net.get_submodule('sparsity_progress')
        self._costs = unit_costs(plan)
        self._figures: dict[str, Tensor] = {}
        net.register_forward_hook(self._add_cost)
        self._freeze_if_met()

    @property
    def learning(self) -> bool:
        """Whether the budget is not met yet."""
        return bool(self.masks[0].learns)

    def _add_cost(self, net: Any, inputs: Any, output: Any) -> Any:
        if not (net.training and torch.is_grad_enabled() and self.learning):
            return None
        b = priorities(torch.stack([mask.scores for mask in self.masks]))
        self._costs = self._costs.to(b)
        cost = self._costs[:, 0].sum() + (b * self._costs[:, 1:]).sum()
        weight = regularizer_weight(self.options.cost_weight, scale=1.0)
        loss = cost * (self.progress.factor * weight)
        self._figures = {'l_cost': loss.detach()}
        return with_loss(output, loss)

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        progress = self.progress
        progress.steps += 1
        if self.learning:
            for mask in self.masks:
                mask.follow_scores(_HIGHEST)
            self._freeze_if_met()
        epoch, within = divmod(int(progress.steps), self.options.epoch)
        if within:
            return
        start_masks(self.net)
        if self.learning:
            ratio = 1.0 / self.share()
            if epoch % 2:
                progress.ratio.fill_(ratio)
            elif ratio - float(progress.ratio) < self.options.gain:
                progress.factor *= self.options.growth

    @torch.no_grad()
    def _freeze_if_met(self) -> None:
        if self.share() > self.plan.budget + 1e-12:
            return
        if self.learning:
            self._fill_budget()
        for mask in self.masks:
            mask.freeze()
        self._figures = {}

    def _fill_budget(self) -> None:
        """Keep the ranks of highest p after all, one by one, as far as the budget allows."""
        costs, left = unit_costs(self.plan).double(), self.plan.budget + 1e-12 - self.share()
        p = torch.stack([torch.cumprod(mask.scores, 0) for mask in self.masks])
        kept = [int(mask.kept) for mask in self.masks]
        while True:
            fitting = [i for i, n in enumerate(kept) if n < self.plan.group and costs[i, n] <= left]
            if not fitting:
                break
            best = max(fitting, key=lambda i: float(p[i, kept[i] - 1]))
            left -= float(costs[best, kept[best]])
            kept[best] += 1
        for mask, n in zip(self.masks, kept):
            mask.kept.fill_(n)

    def log(self) -> dict[str, float]:
        """Adds: ``l_cost``, the weighted cost, and ``annealing``, a; both until the budget is met."""
        figures = {key: float(value) for key, value in self._figures.items()}
        return {**super().log(), **figures, **({'annealing': float(self.progress.factor)} if figures else {})}


def unit_costs(plan: SparsityPlan) -> Tensor:
    """What each unit costs: (layers, M), the share of the dense cost that the weights of rank i have in a layer.

    Ranks that a short group does not have cost nothing there. Rows sum to the layer's share, all of it to 1.
    """
    total = sum(layer.macs for layer in plan.layers)
    rows = []
    for layer in plan.layers:
        sizes = group_sizes(layer.channels, plan.group)
        units = [sum(size > rank for size in sizes) for rank in range(plan.group)]
        rows.append([layer.macs / total * unit / layer.channels for unit in units])
    return torch.tensor(rows)
