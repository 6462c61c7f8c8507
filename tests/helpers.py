"""Shared by the tests of the core: reference functions written a second time, and a small network."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from basicsr_quant.methods import quantize, settings_of
from basicsr_quant.network.plan import Plan
from basicsr_quant.network.planning import PlanRequest, make_plan

REFERENCE = Path(__file__).parent / 'data' / 'reference.npz'


def reference() -> Any:
    """The published modules' inputs and outputs, see data/README.md."""
    return np.load(REFERENCE)


# ---------------------------------------------------------------------------------------- the function, second writing


def steps(bits: Any, narrow: bool) -> Any:
    return 2.0**bits - (2 if narrow else 1)


def freeze(
    x: Tensor, lower: Tensor, upper: Tensor, bits: Any, *, zero_point: str = 'float', narrow_range: bool = False
) -> Callable[..., Tensor]:
    """The fake-quantize function with every rounding replaced by the offset it adds at this point.

    That function is smooth but for its clipping, so finite differences of it are what straight-through gradients mean.
    """

    def aligned(lower: Tensor, upper: Tensor, bits: Any, whole: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Bounds after the zero point is moved by (``whole`` - exact) steps, and the offset that was added."""
        if zero_point == 'float':
            return lower, upper, torch.zeros(())
        lower, upper = torch.clamp(lower, max=0), torch.clamp(upper, min=0)
        step = (upper - lower) / steps(bits, narrow_range)
        added = torch.round(-lower / step) + lower / step if whole is None else whole
        return lower - added * step, upper - added * step, added

    l0, u0, shift = aligned(lower, upper, bits, None)
    s0 = (u0 - l0) / steps(bits, narrow_range)
    v = (torch.minimum(torch.maximum(x, l0), u0) - l0) / s0
    # Bits between two whole numbers (AdaBM learns them) give a last step that is not whole; no code lies beyond u.
    added = torch.minimum(torch.round(v), torch.as_tensor(steps(bits, narrow_range), dtype=v.dtype)) - v

    def frozen(x: Tensor, lower: Tensor, upper: Tensor, bits: Any) -> Tensor:
        low, high, _ = aligned(lower, upper, bits, shift)
        step = (high - low) / steps(bits, narrow_range)
        return torch.minimum(torch.maximum(x, low), high) + added * step

    return frozen


def finite_differences(function: Callable[..., Tensor], args: list[Any], eps: float = 1e-6) -> list[Any]:
    """Central differences of a scalar function for each tensor of ``args`` (None for what is no tensor)."""
    results: list[Any] = []
    for index, arg in enumerate(args):
        if not isinstance(arg, Tensor):
            results.append(None)
            continue
        grad = torch.zeros_like(arg)
        for i in range(arg.numel()):
            values = []
            for sign in (1, -1):
                moved = arg.detach().clone()
                moved.view(-1)[i] += sign * eps
                values.append(float(function(*args[:index], moved, *args[index + 1 :])))
            grad.view(-1)[i] = (values[0] - values[1]) / (2 * eps)
        results.append(grad)
    return results


def gradients(function: Callable[..., Tensor], args: list[Any]) -> list[Any]:
    """Autograd's gradients of a scalar function for each tensor of ``args``."""
    leaves = [a.detach().clone().requires_grad_() if isinstance(a, Tensor) else a for a in args]
    function(*leaves).backward()
    return [a.grad if isinstance(a, Tensor) else None for a in leaves]


def assert_close(found: Any, wanted: Any, rtol: float = 1e-5, atol: float = 1e-7) -> None:
    torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(wanted), rtol=rtol, atol=atol, check_dtype=False)


def quantize_rows(rows: np.ndarray, lower: Any, upper: Any, bits: int, narrow: bool = False) -> np.ndarray:
    """ODM's range quantizer in NumPy, float64: q = round((clip(x, l, u) - l) / s) s + l."""
    lower, upper = (np.asarray(b, dtype=np.float64).reshape(-1, 1) for b in (lower, upper))
    step = np.maximum(upper - lower, 1e-300) / steps(bits, narrow)
    return np.rint((np.clip(rows, lower, upper) - lower) / step) * step + lower


# ---------------------------------------------------------------------------------------------------- a small network


class Block(nn.Module):
    """A residual block, as in EDSR."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.relu(self.conv1(x)))


class Tiny(nn.Module):
    """First layer, two residual blocks, last layer: 4 body layers. Images (N, 3, H, W) in and out."""

    def __init__(self, channels: int = 4, blocks: int = 2) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, channels, 3, padding=1)
        self.body = nn.Sequential(*(Block(channels) for _ in range(blocks)))
        self.last = nn.Conv2d(channels, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


class Distilling(nn.Module):
    """Splits, a concatenation, channel attention, an activation of every kind; each piece but the first goes on."""

    def __init__(self) -> None:
        super().__init__()
        sizes = ((3, 8), (6, 8), (6, 6), (8, 2), (2, 8), (8, 8), (8, 3))
        self.first, self.a, self.b, self.down, self.up, self.c, self.last = (
            nn.Conv2d(c, d, 1 if (c, d) in ((8, 2), (2, 8)) else 3, padding=int((c, d) not in ((8, 2), (2, 8))))
            for c, d in sizes
        )
        self.act, self.prelu = nn.LeakyReLU(0.1, inplace=True), nn.PReLU(8)
        self.gate = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        kept, rest = torch.split(self.prelu(self.first(x)), [2, 6], dim=1)
        more, rest = torch.split(self.act(self.a(rest)), [2, 6], dim=1)
        wide = torch.cat([kept, more, nn.functional.relu(self.b(rest))[:, :4]], dim=1)
        pooled = wide.mean((2, 3), keepdim=True)
        wide = wide * self.gate(self.up(torch.relu(self.down(pooled + pooled.square()))))
        return self.last(nn.functional.gelu(self.c(wide)))


def distilling() -> Distilling:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Distilling()


BODY = ['body.0.conv1', 'body.0.conv2', 'body.1.conv1', 'body.1.conv2']


def tiny(seed: int = 0, **kwargs: Any) -> Tiny:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Tiny(**kwargs)


def images(count: int = 2, size: int = 8, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def plan_of(net: nn.Module, method: str = 'odm', bits: int = 4, rectified: Any = (), **settings: Any) -> Plan:
    layers = settings.pop('layers', {})
    scope = settings.pop('scope', 'body')
    request = PlanRequest(method, bits, bits, scope, layers, settings_of(method, **settings))
    return make_plan(net, request, frozenset(rectified))


def quantized(method: str = 'odm', bits: int = 4, seed: int = 0, **settings: Any) -> Tiny:
    """A quantized :class:`Tiny`, not yet calibrated; inputs of the second convolutions follow a ReLU."""
    net = tiny(seed)
    rectified = [n for n in BODY if n.endswith('conv2')]
    quantize(net, plan_of(net, method, bits, rectified, **settings))
    return net
