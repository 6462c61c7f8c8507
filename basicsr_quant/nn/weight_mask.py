"""N:M masks of weights: at most N weights are kept of each M consecutive input channels, at each kernel position."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

GROUPS = (4, 8, 16, 32)
"""What M may be: the published 32 and its halves, the 4 of GPUs among them."""


def rank_in_groups(weight: Tensor, group: int) -> Tensor:
    """Rank of each weight by magnitude among its group of input channels, 0 the largest.

    Ranks of a group are all different (of equal magnitudes the first channel wins), so "rank < N" keeps exactly
    min(N, size) of them.

    Args:
        weight: (out, in, ...); groups are ``group`` consecutive indices of dimension 1, for each output and each
            kernel position by itself. Where ``group`` does not divide ``in``, the last group is shorter.
        group: M.

    Returns:
        uint8, of the weight's shape.
    """
    channels = weight.shape[1]
    rows = weight.detach().abs().movedim(1, -1)
    missing = -channels % group
    rows = nn.functional.pad(rows, (0, missing), value=-1.0)  # below every magnitude: takes the last ranks
    rows = rows.unflatten(-1, (-1, group))
    order = rows.argsort(dim=-1, descending=True, stable=True)
    places = torch.arange(group, device=weight.device).expand_as(order)
    ranks = torch.empty_like(order).scatter_(-1, order, places)
    return ranks.flatten(-2)[..., :channels].movedim(-1, 1).to(torch.uint8).contiguous()


def group_sizes(channels: int, group: int) -> list[int]:
    """Sizes of the groups of ``channels`` input channels.

    >>> group_sizes(70, 32)
    [32, 32, 6]
    """
    full, rest = divmod(channels, group)
    return [group] * full + [rest] * bool(rest)


def density(channels: int, group: int, kept: int) -> float:
    """Share of the weights that N:M keeps, short groups counted as they are.

    >>> density(64, 32, 8), density(34, 32, 8)
    (0.25, 0.29411764705882354)
    """
    return sum(min(kept, size) for size in group_sizes(channels, group)) / channels


class SparsityModule(nn.Module):
    """A module that sparsity adds to a network; its tensors are saved, and none is one of the FP32 network."""


class WeightMask(SparsityModule):
    """The mask of one weight: its ``kept`` largest weights of each group.

    Ranks change when :meth:`rank` is called and never in a forward pass. State dict: ``ranks`` (uint8, of the weight's
    shape: one byte a weight, whatever M) and ``kept`` (int64, 0-dim; N).

    Args:
        shape: Of the weight.
        group: M.
        kept: N to start with.
    """

    ranks: Tensor
    kept: Tensor

    def __init__(self, shape: tuple[int, ...], group: int, kept: int) -> None:
        super().__init__()
        self.group = group
        self.register_buffer('ranks', torch.zeros(shape, dtype=torch.uint8))
        self.register_buffer('kept', torch.tensor(kept))

    def rank(self, weight: Tensor) -> None:
        """Rank by the magnitudes of ``weight`` from now on."""
        self.ranks.copy_(rank_in_groups(weight, self.group))

    def keep(self) -> Tensor:
        """Which weights are kept, bool."""
        return self.ranks < self.kept

    def forward(self, weight: Tensor) -> Tensor:
        """The weight with zeros where the mask is; gradients go to the kept weights alone."""
        return weight * self.keep().to(weight.dtype)

    def extra_repr(self) -> str:
        return f'{self.kept.item()}:{self.group}' if not self.kept.is_meta else f'group={self.group}'


class RefinedMask(WeightMask):
    """SR-STE's mask: masked weights learn too, and are drawn to zero (Zhou et al., ICLR 2021).

    Forward as :class:`WeightMask`. Backward with g the gradient of the masked weight: dL/dW = g + decay (1 - mask) W.

    Args:
        decay: The paper's lambda_W.
    """

    def __init__(self, shape: tuple[int, ...], group: int, kept: int, decay: float) -> None:
        super().__init__(shape, group, kept)
        self.decay = decay

    def forward(self, weight: Tensor) -> Tensor:
        return _Refined.apply(weight, self.keep(), self.decay)  # type: ignore[no-any-return]


class _Refined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, keep: Tensor, decay: float) -> Tensor:
        ctx.save_for_backward(weight, keep)
        ctx.decay = decay
        return weight * keep.to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        weight, keep = ctx.saved_tensors
        return grad + ctx.decay * (weight * (~keep).to(weight.dtype)), None, None


def priorities(scores: Tensor) -> Tensor:
    """SLS's b of the M - 1 units behind the first, from scores (..., M - 1): 1 where their cumulative product exceeds
    0.5, else 0; the gradient is the cumulative product's (straight-through)."""
    p = torch.cumprod(scores, dim=-1)
    return (p > 0.5).to(p.dtype) + (p - p.detach())


class PriorityMask(WeightMask):
    """SLS's mask: N learned through M - 1 priority scores (Oh et al., CVPR 2022).

    p_i = s_1 ... s_i, b_i = [p_i > 0.5], N = 1 + sum b_i; the weight of rank i is multiplied by b_i (rank 0 by 1), so
    masks of growing N are nested. dL/ds goes through p (straight-through); a masked weight has no gradient itself.

    State dict: as :class:`WeightMask`, with ``scores`` (M - 1, a parameter, starts at 1) and ``frozen`` (bool, 0-dim).
    In evaluation, and once frozen, the mask is "rank < kept" and reads no score. So an averaged copy (EMA), whose
    scores are means, has the mask of the network itself, and scores that an optimizer might still move change nothing.

    Attributes:
        learns: ``not frozen``, known without looking at the tensor.
    """

    frozen: Tensor

    def __init__(self, shape: tuple[int, ...], group: int) -> None:
        super().__init__(shape, group, group)
        self.scores = nn.Parameter(torch.ones(group - 1))
        self.register_buffer('frozen', torch.tensor(False))
        self.learns = True

    def forward(self, weight: Tensor) -> Tensor:
        if not (self.training and self.learns):
            return super().forward(weight)
        units = torch.cat([self.scores.new_ones(1), priorities(self.scores)])
        mask = units.index_select(0, self.ranks.flatten().int()).view_as(weight)
        return weight * mask.to(weight.dtype)

    @torch.no_grad()
    def follow_scores(self, highest: float) -> None:
        """After an optimizer step: clamp the scores to [0, ``highest``], and let N be what they say."""
        self.scores.clamp_(0.0, highest)
        self.kept.copy_(1 + (torch.cumprod(self.scores, 0) > 0.5).sum())

    def freeze(self) -> None:
        """Keep N from now on; the scores get no gradient any more."""
        self.frozen.fill_(True)
        self.learns = False

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.frozen.is_meta:
            self.learns = not bool(self.frozen)
