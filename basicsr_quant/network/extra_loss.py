"""Losses of a method's own, added to whatever loss the host takes of the network's output."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

_FACTOR: ContextVar[float] = ContextVar('factor of extra losses', default=1.0)


def scale_extra_losses(factor: float) -> None:
    """Multiply the losses of later :func:`with_loss` by ``factor``, as the host multiplies its own.

    For a host that multiplies its loss before the backward pass: by a gradient scaler, or by 1 / n where n passes
    accumulate their gradients.
    """
    _FACTOR.set(float(factor))


def with_loss(output: Any, loss: Tensor) -> Any:
    """Return ``output`` unchanged in value; whoever differentiates a loss of it also differentiates ``loss``, once.

    The host computes its losses, its backward pass, its distributed reduction and its accumulation as ever; the extra
    loss is a branch of the same graph. Where the host calls backward several times on one output, the extra loss counts
    each time; where it multiplies its loss by a factor, it has to say so (:func:`scale_extra_losses`).

    Args:
        output: What a network returned: a tensor, or tensors in lists, tuples and dictionaries, of which the first with
            a gradient carries the loss.
        loss: 0-dim.
    """
    leaves, structure = tree_flatten(output)
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and leaf.requires_grad:
            leaves[index] = _WithLoss.apply(leaf, loss)
            return tree_unflatten(leaves, structure)
    return output


class _WithLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor) -> Tensor:
        # Read now: the backward pass may run in a thread of its own.
        ctx.grad = torch.full_like(loss, _FACTOR.get())
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return grad, ctx.grad
