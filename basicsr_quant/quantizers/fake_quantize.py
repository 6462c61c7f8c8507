"""The one fake-quantize function that every method of this package stands on."""

from __future__ import annotations

import math
from typing import Any, Union

import torch
from torch import Tensor
from torch.nn import Parameter

Bits = Union[int, float, Tensor]

_LN2 = math.log(2.0)
# torch 2.1 has it elsewhere
_is_compiling = getattr(torch.compiler, 'is_compiling', None) or torch._dynamo.is_compiling


def num_steps(bits: Bits, narrow_range: bool = False) -> float | Tensor:
    """Return the number of steps n between the lowest and the highest code: 2^b - 1, or 2^b - 2 in narrow range.

    >>> num_steps(4), num_steps(4, narrow_range=True)
    (15.0, 14.0)
    """
    levels = torch.exp2(bits) if isinstance(bits, Tensor) else 2.0**bits
    return levels - (2 if narrow_range else 1)


def align_zero_point(lower: Tensor, upper: Tensor, bits: Bits, narrow_range: bool = False) -> tuple[Tensor, Tensor]:
    """Shift a range by less than half a step so that real zero becomes one of its codes.

    With s = (u - l) / n and z = clamp(round(-l / s), 0, n) the aligned range is [-z s, (n - z) s]: what an integer
    engine with scale s and zero point z computes. A range that does not hold zero is first widened to hold it.
    Gradients treat the rounding as a constant offset (straight-through).

    Args:
        lower, upper: Bounds l < u, any shapes that broadcast.
        bits: Number of bits b, a number or a tensor that broadcasts.
        narrow_range: Use n = 2^b - 2 steps instead of 2^b - 1.
    """
    lower, upper = lower.clamp(max=0.0), upper.clamp(min=0.0)
    n = num_steps(bits, narrow_range)
    step = _width(lower, upper) / n
    exact = -lower / step
    shift = (exact.round() - exact).detach() * step
    return lower - shift, upper - shift


def fake_quantize(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    bits: Bits,
    *,
    zero_point: str = 'float',
    narrow_range: bool = False,
) -> Tensor:
    r"""Round ``x`` to a uniform grid of 2^bits levels on [lower, upper], with straight-through gradients.

    With n = 2^b - 1, s = (u - l) / n, v = (clip(x, l, u) - l) / s and r = round(v) (half to even):
    q = r s + l. This is the asymmetric range quantizer of ODM and AdaBM; ``lower = -upper`` with ``narrow_range``
    (n = 2^b - 2) is the symmetric quantizer of PAMS and CADyQ, ``[-Q_N s, Q_P s]`` is LSQ.

    Gradients, closed form (identity through the rounding; the tests compare them with finite differences):

    =====  ==============================  =====  =====
    ..     l <= x <= u                     x > u  x < l
    =====  ==============================  =====  =====
    dq/dx  1                               0      0
    dq/du  (r - v) / n                     1      0
    dq/dl  (v - r) / n                     0      1
    dq/db  (u - l) (v - r) 2^b ln 2 / n^2  0      0
    =====  ==============================  =====  =====

    Args:
        x: Tensor of any shape and floating dtype. Half precision is computed in float32 and returned as given.
        lower, upper: Bounds that broadcast against ``x``: one value, (C,1,1,1) per channel, (N,1,1,1) per sample.
            A range of no width sends everything to ``lower``; the result is finite in every case.
        bits: Number of bits b > 0: a number, or a floating tensor that broadcasts and may want a gradient.
        zero_point: ``float`` is the papers' grid, which need not hold zero. ``integer`` first applies
            :func:`align_zero_point`, so that zero is a code and an integer engine can compute the same values.
        narrow_range: Leave out one level: n = 2^b - 2.

    Returns:
        Tensor of the shape and dtype of ``x``.

    Raises:
        ValueError: if ``zero_point`` is neither ``float`` nor ``integer``.

    >>> fake_quantize(torch.tensor([-1.0, 0.1, 0.6, 9.0]), torch.tensor(0.0), torch.tensor(3.0), 2)
    tensor([0., 0., 1., 3.])
    """
    if zero_point not in ('float', 'integer'):
        raise ValueError(f"zero_point must be 'float' or 'integer', not {zero_point!r}")
    dtype = _compute_dtype(x)
    lower, upper = lower.to(dtype), upper.to(dtype)
    if zero_point == 'integer':
        lower, upper = align_zero_point(lower, upper, bits, narrow_range)
    return _FakeQuantize.apply(x, lower, upper, bits, narrow_range, zero_point == 'integer')


def _width(lower: Tensor, upper: Tensor) -> Tensor:
    """u - l, kept above zero and finite: neither a collapsed nor an overflowing range may give NaN."""
    floor = torch.maximum(lower.abs(), upper.abs()).detach() * 1e-7 + 1e-30
    return torch.maximum(upper - lower, floor).clamp(max=torch.finfo(lower.dtype).max)


def _compute_dtype(x: Tensor) -> torch.dtype:
    """float32, or float64 for float64: codes of up to 8 bits do not survive arithmetic in half precision."""
    return torch.promote_types(x.dtype, torch.float32)


def _sum_to(grad: Tensor, like: Tensor) -> Tensor:
    return grad.sum_to_size(like.shape) if like.dim() else grad.sum()


def _grid(
    lower: Tensor, upper: Tensor, bits: Bits, narrow: bool, integer: bool
) -> tuple[Tensor, Tensor, Tensor | None, float | Tensor]:
    """Step, whole and fractional part of the zero point, number of steps. An integer zero point has no fraction."""
    n = num_steps(bits, narrow)
    step = _width(lower, upper) / n
    offset = -lower / step
    whole = offset.round()
    if integer:
        return step, whole, None, n
    # What is left of a whole zero point by rounding is dropped: a symmetric grid then holds zero itself.
    fraction = offset - whole
    noise = 4 * torch.finfo(step.dtype).eps * n
    return step, whole, torch.where(fraction.abs() > noise, fraction, 0.0), n


class _FakeQuantize(torch.autograd.Function):
    """q and its gradients. One range on the CPU takes a path with scalar bounds and few passes over memory, sample by
    sample where each has bits of its own; every other case takes the plain one, which is the reference. With an integer
    zero point they agree to the bit, with a float one up to float32 rounding (tested)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lower: Tensor, upper: Tensor, bits: Bits, narrow: bool, integer: bool) -> Tensor:
        step, whole, fraction, n = _grid(lower, upper, bits, narrow, integer)
        ctx.narrow, ctx.integer = narrow, integer
        ctx.scalar = _is_scalar_case(x, lower, upper, bits)
        ctx.samples = not ctx.scalar and _is_sample_case(x, lower, upper, bits)
        if ctx.scalar:
            q = _quantize_scalar(x, float(step), float(whole), 0.0 if fraction is None else float(fraction), float(n))
        elif ctx.samples:
            rows = _per_sample(len(x), step, whole, 0.0 if fraction is None else fraction, n)
            q = torch.empty_like(x)
            for source, target, (step_, whole_, fraction_, n_) in zip(x, q, rows):
                _quantize_scalar(source, step_, whole_, fraction_, n_, out=target)
        else:
            q = _quantize(x, step, whole, fraction, n).to(x.dtype)
        bits_tensor = bits if isinstance(bits, Tensor) else None
        ctx.bits = None if bits_tensor is not None else bits
        ctx.save_for_backward(x, q if q.dtype == lower.dtype else None, lower, upper, bits_tensor)
        return q

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, q, lower, upper, bits_tensor = ctx.saved_tensors
        need_x, need_lower, need_upper, need_bits = ctx.needs_input_grad[:4]
        if ctx.scalar:
            gx, gl, gu, _ = _gradients_scalar(grad, x, q, lower, upper, need_lower or need_upper)
            return gx, gl, gu, None, None, None
        if ctx.samples:
            return (*_gradients_samples(grad, x, q, lower, upper, bits_tensor, ctx), None, None)
        dtype = lower.dtype
        x, grad_f = x.to(dtype), grad.to(dtype)
        above, below = x > upper, x < lower
        outside = above | below
        inside = grad_f.masked_fill(outside, 0.0)
        gl = gu = gb = None
        if need_lower or need_upper or need_bits:
            if q is None:  # half precision: a q rounded to it would drown q - x at eight bits
                bits = ctx.bits if bits_tensor is None else bits_tensor
                q = _quantize(x, *_grid(lower, upper, bits, ctx.narrow, ctx.integer))
            rounding = inside * (q - x).masked_fill(outside, 0.0)  # both factors: zero times an infinite x is NaN
        if need_lower or need_upper:
            share = rounding / _width(lower, upper)
            gu = _sum_to(share + grad_f * above, upper)
            gl = _sum_to(grad_f * below - share, lower)
        if need_bits:
            levels = torch.exp2(bits_tensor)
            n = levels - (2 if ctx.narrow else 1)
            gb = _sum_to(-rounding * (levels * _LN2 / n), bits_tensor)
        return (inside.to(grad.dtype) if need_x else None), gl, gu, gb, None, None


def _quantize(x: Tensor, step: Tensor, whole: Tensor, fraction: Tensor | None, n: float | Tensor) -> Tensor:
    # The zero point is split into a whole and a fractional part: with an integer zero point the fraction is absent,
    # zero maps to exactly zero, and the codes are those of an integer engine, round(x / s) + z.
    code = x.to(step.dtype) / step
    if fraction is not None:
        code = code + fraction
    code = torch.minimum(torch.maximum(code.round(), -whole), n - whole)
    if fraction is not None:
        code = code - fraction
    return code * step


def _is_scalar_case(x: Tensor, lower: Tensor, upper: Tensor, bits: Bits) -> bool:
    return (
        not _is_compiling()
        and type(x) in (Tensor, Parameter)  # not a tensor that only stands for one, such as FakeTensor
        and x.device.type == 'cpu'
        and x.dtype == torch.float32
        and lower.numel() == 1
        and upper.numel() == 1
        and not isinstance(bits, Tensor)
    )


def _is_sample_case(x: Tensor, lower: Tensor, upper: Tensor, bits: Bits) -> bool:
    """One range and bits of their own for each sample, (N, 1, ..., 1): as many scalar cases."""
    samples = (x.shape[0], *[1] * (x.dim() - 1)) if x.dim() else ()
    return (
        not _is_compiling()
        and type(x) in (Tensor, Parameter)
        and x.device.type == 'cpu'
        and x.dtype == torch.float32
        and isinstance(bits, Tensor)
        and bits.dim() == x.dim()
        and bits.shape[1:] == samples[1:]
        and bits.shape[0] in (1, x.shape[0])
        and all(b.numel() == 1 or b.shape == samples for b in (lower, upper))
    )


def _per_sample(count: int, *values: float | Tensor) -> list[tuple[float, ...]]:
    columns = [v.reshape(-1).expand(count).tolist() if isinstance(v, Tensor) else [v] * count for v in values]
    return list(zip(*columns))


def _quantize_scalar(
    x: Tensor, step: float, whole: float, fraction: float, n: float, out: Tensor | None = None
) -> Tensor:
    # add() with alpha multiplies and adds in one pass; division stays where an engine's codes must be met exactly.
    scaled = torch.add(x.new_tensor(fraction), x, alpha=1.0 / step, out=out) if fraction else None
    code = torch.div(x, step, out=out) if scaled is None else scaled
    code.round_().clamp_(-whole, n - whole)
    return torch.add(x.new_tensor(-fraction * step), code, alpha=step, out=code) if fraction else code.mul_(step)


def _gradients_scalar(
    grad: Tensor, x: Tensor, q: Tensor, lower: Tensor, upper: Tensor, need_range: bool
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for x, lower and upper, and the sum of gradient times rounding error over the inside."""
    # hardtanh's backward masks in one pass, but leaves out the bounds themselves; one float beyond them keeps them in.
    infinity = torch.tensor(math.inf)
    low, high = torch.nextafter(lower.detach(), -infinity), torch.nextafter(upper.detach(), infinity)
    inside = torch.ops.aten.hardtanh_backward(grad, x, float(low), float(high))
    if not need_range:
        return inside, None, None, None
    outside = grad - inside
    above = torch.ops.aten.threshold_backward(outside, x, float(upper)).sum()
    below = outside.sum() - above
    width = _width(lower, upper)
    rounding = torch.dot(inside.reshape(-1), (q - x).reshape(-1)) / width
    if not rounding.isfinite():  # an infinite x (zero times infinity), or a range whose sums overflow
        rounding = (inside * ((q - x) / width).nan_to_num_(0.0, 0.0, 0.0)).sum()
    ranges = (below - rounding).reshape(lower.shape), (above + rounding).reshape(upper.shape)
    return inside, *ranges, (rounding * width).reshape(())


def _gradients_samples(
    grad: Tensor, x: Tensor, q: Tensor, lower: Tensor, upper: Tensor, bits: Tensor, ctx: Any
) -> tuple[Tensor | None, ...]:
    _, need_lower, need_upper, need_bits = ctx.needs_input_grad[:4]
    need = need_lower or need_upper or need_bits
    bounds = [b.reshape(-1).expand(len(x)) for b in (lower, upper)]
    gx = torch.empty_like(grad)
    sums = []
    for i, (low, high) in enumerate(zip(*bounds)):
        gx[i], *found = _gradients_scalar(grad[i], x[i], q[i], low, high, need)
        sums.append(found)
    if not need:
        return gx, None, None, None
    columns = (torch.stack(column) for column in zip(*sums))  # type: ignore[arg-type]  # asked for, so there
    gl, gu, rounding = (column.reshape(-1, *[1] * (x.dim() - 1)) for column in columns)
    levels = torch.exp2(bits)
    gb = -rounding * (levels * _LN2 / (levels - (2 if ctx.narrow else 1)))
    return gx, *(_sum_to(g, like) for g, like in ((gl, lower), (gu, upper), (gb, bits)))
