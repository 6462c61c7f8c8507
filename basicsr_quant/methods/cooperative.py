"""Combining the gradients of two losses: reconstruction, and a regularizer on the quantized activations (ODM).

Pure functions first; :class:`CooperativeTraining` hangs them onto a network and its optimizer, whatever the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..network.surgery import quant_layers
from ..quantizers import Quantizer, RelativeRange
from .base import Training

_EPS = 1e-12


def mismatch(x: Tensor, q: Tensor, detach_target: bool = True) -> Tensor:
    """ODM's mismatch ||x - q||_2 of one layer: a norm over the whole batch tensor, not squared and not averaged.

    The grid values q are a constant target (our reading: with plain straight-through gradients d(x - q)/dx is zero
    inside the range, and nothing would pull values onto the grid). ``detach_target=False`` is the other reading.
    """
    return _Mismatch.apply(x, q.detach() if detach_target else q)


class _Mismatch(torch.autograd.Function):
    """sqrt(sum (x - q)^2 + eps). Keeps x and q, which the layer keeps anyway, instead of a difference a layer."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, q: Tensor) -> Tensor:
        norm = ((_wide(x) - _wide(q)).square_().sum() + _EPS).sqrt()
        ctx.save_for_backward(x, q, norm)
        return norm

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x, q, norm = ctx.saved_tensors
        away = (_wide(x) - _wide(q)).mul_(grad / norm)
        need_x, need_q = ctx.needs_input_grad
        return (away.to(x.dtype) if need_x else None), (-away.to(q.dtype) if need_q else None)


def deviation(x: Tensor) -> Tensor:
    """ODM-v1's regularizer of one layer: the standard deviation of its input over all values."""
    return (_wide(x).var(unbiased=False) + _EPS).sqrt()


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def cooperation(
    first: Sequence[Tensor], second: Sequence[Tensor], granularity: str, gate: str = 'cosine'
) -> tuple[list[Tensor], Tensor]:
    """How far each gradient of ``second`` goes the way of ``first``: sim = (cos + 1) / 2 in [0, 1].

    Args:
        first, second: Gradients of the two losses, tensor by tensor.
        granularity: What cos is taken over: each ``element`` (where it is the sign gate of ODM-v1: 1 for equal signs,
            0 for opposite ones), each parameter ``tensor``, or the whole network (``global``).
        gate: ``cosine``; ``sign`` is the same as granularity ``element``; ``none`` gives 1 everywhere, the naive sum.

    Returns:
        sim for each tensor (0-dim, or of the tensor's shape for ``element``), and the mean cosine weighted by
        elements (0-dim), for the log.
    """
    if not first:
        return [], torch.tensor(0.0)
    size = sum(g.numel() for g in first)
    if gate == 'sign' or granularity == 'element':
        signs = [torch.sign(a) * torch.sign(b) for a, b in zip(first, second)]
        mean = torch.stack([s.sum() for s in signs]).sum() / size
        sims = [(s + 1) / 2 for s in signs]
    elif granularity == 'global':
        mean = _cosine(
            torch.stack([_dot(a, b) for a, b in zip(first, second)]).sum(),
            torch.stack([_dot(a, a) for a in first]).sum(),
            torch.stack([_dot(b, b) for b in second]).sum(),
        )
        sims = [(mean + 1) / 2] * len(first)
    else:
        cosines = [_cosine(_dot(a, b), _dot(a, a), _dot(b, b)) for a, b in zip(first, second)]
        mean = torch.stack([c * a.numel() for c, a in zip(cosines, first)]).sum() / size
        sims = [(c + 1) / 2 for c in cosines]
    if gate == 'none':
        sims = [torch.ones_like(s) for s in sims]
    return sims, mean


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return torch.dot(_wide(a.flatten()), _wide(b.flatten()))


def _cosine(ab: Tensor, aa: Tensor, bb: Tensor) -> Tensor:
    # Each root by itself: the product of two small squares would vanish in float32 and the quotient explode.
    return (ab / (aa.sqrt() * bb.sqrt()).clamp(min=torch.finfo(torch.float32).tiny)).clamp(-1.0, 1.0)


class CooperativeTraining(Training):
    """Adds lambda sim(g_R, g_M) g_M to the reconstruction gradient g_R before each optimizer step.

    The host stays as it is: after each forward pass in training the regularizer's gradient is taken on the spot (the
    graph is kept for the host's own loss), and a hook before ``optimizer.step()`` combines the two. That way the host's
    losses, its distributed wrapper (g_R arrives averaged) and a gradient scaler (g_R arrives unscaled) need no word of
    their own; g_M is averaged over the ranks here. Over several passes per step (gradient accumulation) g_M is the
    mean over the passes.

    Args:
        net: The bare quantized network (not its distributed wrapper).
        optimizer: The optimizer that steps it.
        term: Regularizer of one layer, a function of the quantizer's input and output.
        weight: lambda in the units of the host's loss and the network's features.
        granularity, gate: See :func:`cooperation`.
    """

    def __init__(
        self,
        net: nn.Module,
        optimizer: torch.optim.Optimizer,
        term: Callable[[Tensor, Tensor], Tensor],
        weight: float,
        granularity: str,
        gate: str,
    ) -> None:
        super().__init__(net, optimizer)
        self.term, self.weight, self.granularity, self.gate = term, weight, granularity, gate
        ranges = {id(p) for q in net.modules() if isinstance(q, RelativeRange) for p in q.range_parameters()}
        # The formula updates the network's parameters; ranges learn from the reconstruction alone.
        self._params = [p for p in net.parameters() if p.requires_grad and id(p) not in ranges]
        self._gradients: list[Tensor] | None = None
        self._passes = 0
        self._begin()
        self._within = False
        self._figures: dict[str, Tensor] = {}
        inputs = [layer.input_quantizer for layer in quant_layers(net).values()]
        for quantizer in (q for q in inputs if isinstance(q, Quantizer)):
            quantizer.register_forward_hook(self._collect)
        self._last = sum(isinstance(q, Quantizer) for q in inputs)  # terms of a pass, until one has been counted
        net.register_forward_pre_hook(self._begin)
        net.register_forward_hook(self._end)
        optimizer.register_step_pre_hook(self._combine)

    def _begin(self, *_: object) -> None:
        self._within = True  # not while layers are called on their own, or again by activation checkpointing
        self._terms: list[Tensor] = []
        self._seen = 0
        self._loss: Tensor | None = None
        self._found: list[Tensor] | None = None  # by this pass; it counts once the pass has come to its end

    def _collect(self, quantizer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        if self.net.training and torch.is_grad_enabled() and inputs[0].requires_grad:
            term = self.term(inputs[0], output)  # always: checkpointing compares what a second run saves
            if not self._within:
                return
            self._terms.append(term)
            self._seen += 1
            if self._seen == self._last:
                # The last term, as the pass before counted them: differentiating here, before the rest of the network
                # runs, keeps the up-sampler's large activations out of this backward's peak of memory.
                self._differentiate()

    def _end(self, *_: object) -> None:
        self._differentiate()
        self._within = False
        self._last = self._seen
        if self._loss is not None and self._found is not None:
            self._gradients = _added(self._gradients, self._found)
            self._passes += 1
            self._figures['l_regularizer'] = self._loss * self.weight

    def _differentiate(self) -> None:
        terms, self._terms = self._terms, []
        wanted = [p for p in self._params if p.requires_grad]  # a host may freeze some meanwhile
        if not terms or not wanted:
            return
        self._within = False
        loss = torch.stack(terms).sum()
        found = dict(zip(wanted, torch.autograd.grad(loss, wanted, retain_graph=True, allow_unused=True)))
        gradients = [g if (g := found.get(p)) is not None else torch.zeros_like(p) for p in self._params]
        self._found = _added(self._found, gradients)
        self._within = True
        self._loss = loss.detach() if self._loss is None else self._loss + loss.detach()

    @torch.no_grad()
    def _combine(self, *_: object) -> None:
        gradients, passes = self._gradients, self._passes
        self._gradients, self._passes = None, 0
        if gradients is None:
            return
        gradients = _average_over_ranks([g / passes for g in gradients] if passes > 1 else gradients)
        pairs = [(p.grad, g) for p, g in zip(self._params, gradients) if p.grad is not None]
        first, second = [a for a, _ in pairs if a is not None], [b for _, b in pairs]
        sims, cosine = cooperation(first, second, self.granularity, self.gate)
        size = torch.stack([_dot(g, g) for g in first]).sum().sqrt() if first else torch.tensor(0.0)
        added = torch.tensor(0.0, device=size.device)
        for grad, other, sim in zip(first, second, sims):
            step = (other * sim).mul_(self.weight)
            step.nan_to_num_(0.0, 0.0, 0.0)  # of a pass whose optimizer step a gradient scaler has skipped
            added += _dot(step, step)
            grad.add_(step.to(grad.dtype))
        tiny = torch.finfo(torch.float32).tiny
        self._figures.update(cosine=cosine, ratio=added.sqrt() / size.clamp(min=tiny))

    def log(self) -> dict[str, float]:
        """Adds: ``l_regularizer`` (lambda L_M), ``cosine`` (mean), ``ratio`` (|lambda sim g_M| / |g_R|)."""
        return {**{k: float(v) for k, v in self._figures.items()}, **super().log()}


def _added(first: list[Tensor] | None, second: list[Tensor]) -> list[Tensor]:
    return second if first is None else [a + b for a, b in zip(first, second)]


def _average_over_ranks(gradients: list[Tensor]) -> list[Tensor]:
    if not (dist.is_available() and dist.is_initialized()) or not gradients:
        return gradients
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    return [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gradients]), gradients)]
