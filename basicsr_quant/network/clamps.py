"""Finding the clamps at the end of any network, in whatever form they are written.

One small image goes through the network, and every torch function it calls is written down with what it got. From the
output the trail is followed back through operations that only move values (pixel shuffle, reshaping, cropping) and
through additions and multiplications of constants; the clamps met on it are the network's last. Which functions are
called is structure; values are read of constants only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import QuantError
from .nonnegative import names, tensors_in
from .trace import on_small_image

CLAMPS = names('clamp clip clamp_min clamp_max hardtanh relu relu6 minimum maximum min max fmin fmax')
"""Functions that may clamp; ``min`` and ``max`` do so with two operands."""

_MOVES = names("""
    alias channel_shuffle clone contiguous cpu cuda detach double expand flatten flip float getitem half moveaxis
    movedim narrow permute pixel_shuffle pixel_unshuffle requires_grad reshape reshape_as rot90 squeeze swapaxes
    swapdims to transpose type type_as unflatten unsqueeze view view_as
""")
_AFFINE = names('add sub rsub mul div neg')
_FILLED = names('zeros_like ones_like full_like new_zeros new_ones new_full new_tensor')
"""Their values do not depend on the tensor they get."""
_BOUNDS: dict[str, Callable[..., tuple[Any, Any]]] = {
    'clamp': lambda input, min=None, max=None: (min, max),
    'clip': lambda input, min=None, max=None: (min, max),
    'clamp_min': lambda input, min: (min, None),
    'clamp_max': lambda input, max: (None, max),
    'hardtanh': lambda input, min_val=-1.0, max_val=1.0, inplace=False: (min_val, max_val),
    'relu': lambda input, inplace=False: (0.0, None),
    'relu6': lambda input, inplace=False: (0.0, 6.0),
}
"""Lower and upper bound of a call; the others take two operands."""


def _operands(input: Any, other: Tensor) -> tuple[Any, Tensor]:
    if not isinstance(other, Tensor):
        raise TypeError
    return input, other



@dataclass(frozen=True)
class FinalClamp:
    """A clamp between the last arithmetic of a network and its output, as plain data.

    Args:
        module: Name of the module that clamps, or in whose own ``forward`` the call stands; empty for the network.
        type: Class name of that module.
        call: The function called, e.g. ``clamp``; None where the module does nothing else and can be replaced.
        index, of: Which of the module's ``of`` calls of clamping functions it is, in the order in which they run.
        operand: Which operand is clamped (1 for ``max(0, x)``).
        low, high: What it clamps to; None where it is open.
    """

    module: str
    type: str
    call: str | None
    index: int
    of: int
    operand: int
    low: float | None
    high: float | None

    def __str__(self) -> str:
        sides = [f'{"-" if value is None else f"{value:g}"}' for value in (self.low, self.high)]
        where = f"'{self.module}'" if self.module else 'the network'
        what = f'{where}, {self.type}' if self.call is None else f'{self.call}() in {where}, {self.type}'
        return f'{what} [{", ".join(sides)}]'

    def to_plain(self) -> dict[str, Any]:
        return asdict(self)


def find_final_clamps(net: nn.Module, low: float = 0.0, high: float = 1.0) -> tuple[FinalClamp, ...]:
    """Return the clamps at the end of ``net`` that clamping its output to [low, high] makes superfluous, last first.

    With l <= low and u >= high after what follows the clamp, ``clip(A(clamp(x, l, u))) = clip(A(x))`` for every
    increasing or decreasing affine A: the host's conversion to uint8 does the clamp's work.

    Args:
        net: The FP32 network; it runs once on a small image, and stays as it was.
        low, high: The image range.

    Raises:
        QuantError: if there is no such clamp: none at all, one that other arithmetic follows, or one that takes part
            of the image range away.
    """
    tape = _Tape(net)
    with _hooks(net, tape):
        on_small_image(net, tape.run)
    kind = type(net).__name__
    if tape.output is None:
        raise QuantError(f"quant.method: 'cfqp' needs a network with one tensor as output, which {kind} has not")
    found: list[_Step] = []
    slack = 1e-6 * (high - low)
    gain, shift = 1.0, (0.0, 0.0)  # what the output is of the current node: gain * value + something in shift
    step: _Step | None = tape.output
    while step is not None:
        if step.clamps:
            ends = sorted(gain * (side if side is not None else sign * math.inf) for sign, side in step.sides)
            fits = ends[0] + shift[1] <= low + slack and ends[1] + shift[0] >= high - slack
            if found and not (fits and tape.calls[step.module] == 1):
                break
            if not fits:
                raise QuantError(
                    f"quant.method: 'cfqp' cannot take out {step.where(kind)}: it keeps the output within "
                    f'[{ends[0] + shift[0]:g}, {ends[1] + shift[1]:g}], and the image range is [{low:g}, {high:g}]'
                )
            found.append(step)
        elif step.affine is not None:
            factor, least, most = step.affine
            added = sorted((gain * least, gain * most))
            gain, shift = gain * factor, (shift[0] + added[0], shift[1] + added[1])
        elif step.name not in _MOVES:
            break
        step = step.source
    if not found:
        raise QuantError(_no_clamp(kind, tape, step))
    return tuple(_final(step, tape, found) for step in found)


def _no_clamp(kind: str, tape: _Tape, last: _Step | None) -> str:
    earlier = [s for s in tape.steps if s.clamps and s.name != 'relu']
    if earlier and last is not None:
        return (
            f"quant.method: 'cfqp' takes out clamps at the end of a network, and after {earlier[-1].where(kind)}, "
            f'{kind} goes on with {last.name}, which clamping the output does not make up for'
        )
    return f"quant.method: 'cfqp' takes out the clamp at the end of a network, and {kind} has none; use 'minmax'"


def _final(step: _Step, tape: _Tape, found: list[_Step]) -> FinalClamp:
    module = tape.modules[step.module]
    own = [s for s in tape.steps if s.module == step.module]
    calls = tape.calls[step.module]
    if calls > 1:
        raise QuantError(
            f"quant.method: 'cfqp' cannot take out {step.where(type(module).__name__)}: the network calls that module "
            f'{calls} times; give the last call a module of its own'
        )
    whole = bool(step.module) and not list(module.children()) and all(s in found or s.fixed for s in own)
    sides = [None if side is None or math.isinf(side) else side for _, side in step.sides]
    return FinalClamp(
        step.module,
        type(module).__name__,
        None if whole else step.name,
        step.index,
        sum(s.name in CLAMPS for s in own),
        step.operand,
        *sides,
    )


@dataclass(eq=False)
class _Step:
    """One call of a torch function.

    ``source`` is the step whose result it works on, ``fixed`` tells that the result does not depend on the image,
    ``affine`` (factor, least and most addend) what it does to each value.
    """

    name: str
    module: str
    index: int = 0
    source: _Step | None = None
    fixed: bool = False
    clamps: bool = False
    low: float | None = None
    high: float | None = None
    operand: int = 0
    affine: tuple[float, float, float] | None = None

    @property
    def sides(self) -> tuple[tuple[int, float | None], ...]:
        return (-1, self.low), (1, self.high)

    def where(self, kind: str) -> str:
        return f"{self.name}() in '{self.module}'" if self.module else f'{self.name}() in {kind}'


class _Tape(TorchFunctionMode):
    """Writes down every torch function that a network calls, and on whose behalf."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.modules = dict(net.named_modules())
        self._names = {module: name for name, module in self.modules.items()}
        self.restart()

    def restart(self) -> None:
        self.steps: list[_Step] = []
        self.output: _Step | None = None
        self.calls: dict[str, int] = dict.fromkeys(self.modules, 0)
        self._made: dict[int, tuple[Tensor, _Step]] = {}  # the tensor too, so that its id is not given away
        self._stack: list[str] = []

    def run(self, net: nn.Module, image: Tensor) -> None:
        self.restart()
        self._made[id(image)] = image, _Step('input', '')
        with torch.no_grad(), self:
            out = net(image)
        self.output = self._of(out)

    def enter(self, module: nn.Module, *_: Any) -> None:
        self._stack.append(self._names[module])
        self.calls[self._names[module]] += 1

    def leave(self, *_: Any) -> None:
        self._stack.pop()

    def _of(self, value: Any) -> _Step | None:
        made = self._made.get(id(value))
        return made[1] if made is not None else None

    def _constant(self, value: Any) -> tuple[float, float] | None:
        """Least and most of a number or of a tensor that does not depend on the image; None for others."""
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value), float(value)
        if not isinstance(value, Tensor) or isinstance(value, nn.Parameter) or not value.numel():
            return None  # what is trained is not known before the checkpoint is read
        step = self._of(value)
        return None if step is not None and not step.fixed else (float(value.min()), float(value.max()))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, '__name__', str(func)).strip('_')
        given = tensors_in((args, kwargs))
        before = [step for step in map(self._of, given) if step is not None and not step.fixed]
        fixed = not before or name in _FILLED
        module = self._stack[-1] if self._stack else ''
        index = sum(s.module == module and s.name in CLAMPS for s in self.steps)
        step = _Step(name, module, index, before[0] if len(before) == 1 else None, fixed)
        if name in CLAMPS and not fixed:
            self._read_clamp(step, args, kwargs)
        elif name in _AFFINE and len(before) == 1:
            self._read_affine(step, args, kwargs)
        out = func(*args, **kwargs)
        results = tensors_in(out)
        if results or name == 'setitem':
            self.steps.append(step)
            for tensor in results or args[:1]:  # an in-place call gives the same tensor back
                self._made[id(tensor)] = tensor, step
        return out

    def _read_clamp(self, step: _Step, args: Any, kwargs: Any) -> None:
        try:
            if step.name in _BOUNDS:
                low, high = _BOUNDS[step.name](*args, **kwargs)
            else:
                first, second = _operands(*args, **kwargs)
                step.operand = int(self._constant(first) is not None)
                constant = first if step.operand else second
                low, high = (constant, None) if 'max' in step.name else (None, constant)
        except TypeError:  # a reduction, or a form of call that is not known here
            return
        least, most = (None if bound is None else self._constant(bound) for bound in (low, high))
        if (low is None) == (least is None) and (high is None) == (most is None) and step.source is not None:
            step.clamps = True
            step.low, step.high = least and least[1], most and most[0]  # of bounds by channel the narrowest

    def _read_affine(self, step: _Step, args: Any, kwargs: Any) -> None:
        if step.name == 'neg':
            step.affine = -1.0, 0.0, 0.0
        if len(args) != 2 or kwargs:
            return
        second = self._constant(args[1]) is None  # the image's part is the second operand
        constant = self._constant(args[0] if second else args[1])
        if constant is None:
            return
        least, most = constant
        if step.name == 'add':
            step.affine = 1.0, least, most
        elif (step.name == 'rsub') != (step.name == 'sub' and second):
            step.affine = -1.0, least, most
        elif step.name in ('sub', 'rsub'):
            step.affine = 1.0, -most, -least
        elif least == most != 0 and step.name == 'mul':
            step.affine = least, 0.0, 0.0
        elif least == most != 0 and not second:
            step.affine = 1.0 / least, 0.0, 0.0


@contextmanager
def _hooks(net: nn.Module, tape: _Tape) -> Iterator[None]:
    handles = []
    try:
        for module in net.modules():
            handles.append(module.register_forward_pre_hook(tape.enter, prepend=True))
            handles.append(module.register_forward_hook(tape.leave, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
