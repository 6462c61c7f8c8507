"""CADyQ's activations: one learned bound for each candidate width, and a selector that chooses the width by content."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .adaptive_range import per_sample
from .fake_quantize import fake_quantize
from .image_bits import image_gradients
from .quantizer import RelativeRange
from .standardized import channel_statistics
from .symmetric_range import SymmetricRange

_LEAST_BOUND = 1e-3
_CHUNK = 1 << 15  # values: a chunk of input, gradient and codes stays in a core's cache


class SelectedRange(RelativeRange):
    r"""K symmetric ranges [-a_k, a_k] at b_k bits, of which each image of a batch uses one in each layer (CADyQ).

    Selector: p = softmax(W f + c) over the features f = (1000 mean |Sobel_x|, 1000 mean |Sobel_y| of the gray network
    input, standard deviation of each channel of this layer's input), all constants to autograd. The candidate with
    the largest p quantizes, q = round(clip(x, -a_k, a_k) m_k / a_k) a_k / m_k with m_k = 2^(b_k - 1) - 1.

    Gradients: those of q = sum_k w_k q_k(x) with w = onehot(argmax p) - sg(p) + p, so x and a_k learn through the
    chosen candidate, and p through <dL/dq, q_k> of every candidate. Only the chosen one is computed forward, see
    :func:`select`.

    Args:
        candidates: Bits b_k, rising.
        channels: Channels of the layer's input.
        name: The layer, under which bits and expected bits (N,) of a pass stand in the context.
        tells: Leave the choice in the context too, for a weight that follows it.

    State: ``alphas`` (K,), relative to ``unit``; ``selector`` (weights 1, biases 0 but 1 for the highest candidate, as
    published, so that it is the one chosen at the start); ``std_scale``, what deviations are multiplied with: 1 / c
    brings those of a network with feature scale c to the 0-255 features that the published learning rate is meant for;
    ``feature_mean`` and ``feature_std`` (C + 2,), 0 and 1 as published: the selector reads (f - mean) / std.
    """

    std_scale: Tensor
    feature_mean: Tensor
    feature_std: Tensor
    candidate_bits: Tensor

    def __init__(self, candidates: Sequence[int], channels: int, name: str = '', tells: bool = False) -> None:
        super().__init__(candidates[-1], zero_point='integer', narrow_range=True)
        self.name, self.candidates, self.tells = name, tuple(candidates), tells
        self.alphas = nn.Parameter(torch.ones(len(candidates)))
        self.selector = nn.utils.skip_init(nn.Linear, channels + 2, len(candidates))  # draws no random numbers
        nn.init.ones_(self.selector.weight)
        with torch.no_grad():
            self.selector.bias.copy_(functional.one_hot(torch.tensor(len(candidates) - 1), len(candidates)))
        self.register_buffer('std_scale', torch.tensor(1.0))
        self.register_buffer('feature_mean', torch.zeros(channels + 2))
        self.register_buffer('feature_std', torch.ones(channels + 2))
        self.register_buffer('candidate_bits', torch.tensor(candidates, dtype=torch.float32), persistent=False)

    def bounds(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of all candidates, (K,)."""
        alphas = self.alphas * self.unit
        return -alphas, alphas

    @torch.no_grad()
    def set_range(self, lower: Tensor, upper: Tensor) -> None:
        """One range for all candidates, as at the start."""
        alpha = torch.maximum(lower.abs(), upper.abs())
        self._set_unit(alpha)
        self.alphas.copy_((alpha.to(self.unit) / self.unit).expand_as(self.alphas))

    @torch.no_grad()
    def at_bits(self, bits: int) -> SymmetricRange:
        """The static quantizer that this one is for images that choose ``bits`` bits, one of the candidates."""
        static = SymmetricRange(bits, learn=False, zero_point='integer')
        static.alpha.copy_(self.alphas[self.candidates.index(bits)])
        static.unit.copy_(self.unit)
        static.calibrated.copy_(self.calibrated)
        return static

    @torch.no_grad()
    def set_candidate(self, index: int, bound: Tensor) -> None:
        """The bound of one candidate, in units of the input, at most that of the highest."""
        self.alphas[index] = torch.minimum(bound.to(self.unit) / self.unit, self.alphas[-1]).clamp(min=_LEAST_BOUND)

    def range_parameters(self) -> list[nn.Parameter]:
        return [self.alphas]

    @torch.no_grad()
    def clamp_range(self) -> None:
        self.alphas.clamp_(min=_LEAST_BOUND)

    def features(self, x: Tensor) -> Tensor:
        """f of each image (row) of the layer's input ``x`` (R, C, H, W), before it is normalized: (R, C + 2)."""
        if self.context is None:
            raise RuntimeError('a bit selector reads the image, so it works inside its network only')
        slopes = self.context.measure('image_gradients', image_gradients)
        parts = x.shape[0] // len(slopes)  # windows or frames of one image lie one after another
        deviation = channel_statistics(x)[1].flatten(1) * self.std_scale
        return torch.cat([slopes.repeat_interleave(parts, dim=0), deviation], dim=1).to(self.selector.weight)

    def probabilities(self, x: Tensor) -> Tensor:
        """p of each row of ``x``: (R, K)."""
        features = (self.features(x) - self.feature_mean) / self.feature_std
        return self.selector(features).softmax(dim=1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def normalize(self, features: Tensor) -> None:
        """Read features from now on relative to the mean and deviation of these, (rows, C + 2); what is constant in
        them stays in its own unit."""
        deviation, mean = torch.std_mean(features, dim=0, correction=0)
        self.feature_mean.copy_(mean)
        self.feature_std.copy_(torch.where(deviation > 0, deviation, 1.0))

    def forward(self, x: Tensor) -> Tensor:
        if not self.enabled:
            return x
        p = self.probabilities(x)
        chosen = p.detach().argmax(dim=1)
        bits = self.candidate_bits[chosen]
        if self.context is not None:
            self.context.bits[self.name] = bits
            self.context.expected_bits[self.name] = p @ self.candidate_bits
            if self.tells:
                hard = functional.one_hot(chosen, len(self.candidates)).to(p.dtype)
                self.context.choices[self.name] = hard + (p - p.detach())
        alphas = self.bounds(x)[1]
        alpha = per_sample(alphas[chosen], x)
        q = fake_quantize(x, -alpha, alpha, per_sample(bits, x), zero_point='integer', narrow_range=True)
        if p.requires_grad and len(self.candidates) > 1:
            q = select(q, x, p, chosen, alphas, self.candidates)
        return q

    def extra_repr(self) -> str:
        return f'candidates={self.candidates}, zero_point={self.zero_point}, narrow'


def select(q: Tensor, x: Tensor, p: Tensor, chosen: Tensor, alphas: Tensor, candidates: Sequence[int]) -> Tensor:
    """Return ``q`` as it is; backward gives p the gradient that the sum over all candidates would give it.

    d L / d p_k = <dL/dq, q_k(x)> for each row. The candidates that were not chosen are rounded in the backward pass,
    chunk by chunk, and never stand in memory.

    Args:
        q: x rounded by the chosen candidates, (R, ...).
        x: What was rounded.
        p: (R, K).
        chosen: Index of each row's candidate, (R,).
        alphas: (K,); their gradient comes through ``q``.
        candidates: Bits, (K).
    """
    steps = tuple(2 ** (bits - 1) - 1 for bits in candidates)
    return _Select.apply(q, x.detach(), p, chosen, alphas.detach(), steps)  # type: ignore[no-any-return]


class _Select(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, x: Tensor, p: Tensor, chosen: Tensor, alphas: Tensor, steps: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(q, x, chosen, alphas)
        ctx.steps, ctx.dtype = steps, p.dtype
        return q.view_as(q)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, x, chosen, alphas = ctx.saved_tensors
        fits = all(t.device.type == 'cpu' and t.dtype == torch.float32 for t in (grad, x))
        products = _products_in_chunks if fits else _products
        return grad, None, products(grad, q, x, chosen, alphas, ctx.steps).to(ctx.dtype), None, None, None


def _products(
    grad: Tensor, q: Tensor, x: Tensor, chosen: Tensor, alphas: Tensor, steps: tuple[int, ...]
) -> Tensor:
    """<grad, q_k> of each row and candidate, (R, K)."""
    grad, x = (t.to(torch.promote_types(t.dtype, torch.float32)).flatten(1) for t in (grad, x))
    products = torch.empty(len(x), len(steps), dtype=x.dtype, device=x.device)
    for k, m in enumerate(steps):
        step = alphas[k].to(x.dtype) / m
        products[:, k] = torch.linalg.vecdot(grad, (x / step).round_().clamp_(-m, m)) * step
    return products


def _products_in_chunks(
    grad: Tensor, q: Tensor, x: Tensor, chosen: Tensor, alphas: Tensor, steps: tuple[int, ...]
) -> Tensor:
    """The same on the CPU, with the chosen candidate's rounding reused and the others' kept within the cache."""
    rows = [t.contiguous().flatten(1) for t in (grad, q, x)]
    sizes = [alpha / m for alpha, m in zip(alphas.tolist(), steps)]
    size = rows[0].shape[1]
    chunk = math.ceil(size / math.ceil(size / _CHUNK)) if size else 1
    code = torch.empty(chunk)
    found = []
    for g, done, values, own in zip(*rows, chosen.tolist()):
        sums = [0.0] * len(steps)
        for part, rounded, value in zip(g.split(chunk), done.split(chunk), values.split(chunk)):
            out = code[: len(part)]
            for k, m in enumerate(steps):
                if k == own:
                    sums[k] += float(torch.dot(part, rounded))
                else:
                    torch.div(value, sizes[k], out=out)
                    sums[k] += float(torch.dot(part, out.round_().clamp_(-m, m))) * sizes[k]
        found.append(sums)
    return grad.new_tensor(found)
