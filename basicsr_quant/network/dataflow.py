"""Who reads what a layer computes: the data flow of one forward pass, told from the operators that run.

Folding and equalization may change what a layer puts out only where nothing but the next step looks at it. That is a
property of the network, so it is read from its operators, never from values. What a network does on other paths than
the one that the traced input takes is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from .nonnegative import operator_name, storage_of, tensors_in, written_by


@dataclass(frozen=True)
class Step:
    """One call of a module without children, or one operator that a network calls by itself.

    Args:
        name: Name of the module; empty for an operator.
        type: Class name of the module, or name of the operator (``relu``, ``add`` ...).
        sole: The module runs once in a pass, and nothing else reads its parameters. False for an operator.
    """

    name: str
    type: str
    sole: bool = False


@dataclass(eq=False)
class Call:
    """One call of a module without children (``module``), or of an operator (None), and what it wrote."""

    name: str
    type: str
    module: nn.Module | None = None
    made: list[_Value] = field(default_factory=list)


@dataclass(eq=False)
class _Value:
    """What stands in a storage from one write to the next."""

    layout: tuple[object, ...] = ()
    reads: list[tuple[Call | None, tuple[object, ...]]] = field(default_factory=list)


class DataFlow:
    """Follows tensors from the call that computes them to the calls that read them.

    Views and in-place operators are seen through shared storage, held by weak references. Every operator inside a
    module without children belongs to the call of that module.
    """

    def __init__(self) -> None:
        self._values: dict[StorageWeakRef, _Value] = {}
        self._calls: dict[str, list[Call]] = {}

    def call(self, name: str, module: nn.Module) -> Call:
        """A module without children is called. Give what it returns to :meth:`observe` until the call is over."""
        call = Call(name, type(module).__name__, module)
        self._calls.setdefault(name, []).append(call)
        return call

    def observe(self, call: Call | None, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Take note of one operator that has run, within ``call`` or outside of any. In the order of execution."""
        given = {storage_of(tensor): tensor for tensor in tensors_in((args, kwargs))}
        made = {storage_of(tensor): tensor for tensor in tensors_in(out)}
        made = {key: tensor for key, tensor in made.items() if key not in given}
        made.update({storage_of(tensor): tensor for tensor in written_by(func, args, kwargs)})
        if not made:
            return  # a view: who reads it reads its base
        call = call or Call('', operator_name(func))
        for key, tensor in given.items():
            if key is not None:
                self._values.setdefault(key, _Value()).reads.append((call, _layout(tensor)))
        for key, tensor in made.items():
            if key is not None:
                self._values[key] = value = _Value(_layout(tensor))
                call.made.append(value)

    def end(self, output: Any) -> None:
        """The pass is over; whoever called the network reads ``output``."""
        for tensor in tensors_in(output):
            key = storage_of(tensor)
            if key in self._values:
                self._values[key].reads.append((None, _layout(tensor)))

    def chain(self, name: str) -> Iterator[Step]:
        """The steps behind layer ``name``, each the only reader of what the one before it computes.

        They end where a tensor has several readers, is an output of the network, or is not read whole. None for a
        layer that runs more than once, or whose parameters something else reads, too.
        """
        call = self._calls[name][0] if self._is_sole(name) else None
        while call is not None:
            call = _only_reader(call)
            if call is not None:
                yield Step(call.name, call.type, self._is_sole(call.name))

    def _is_sole(self, name: str) -> bool:
        calls = self._calls.get(name, [])
        if len(calls) != 1 or calls[0].module is None:
            return False
        values = [self._values.get(storage_of(tensor)) for tensor in calls[0].module.parameters()]  # type: ignore[arg-type]
        return all(reader is calls[0] for value in values if value is not None for reader, _ in value.reads)


def _only_reader(call: Call) -> Call | None:
    made = [value for value in call.made if any(reader is not call for reader, _ in value.reads)]
    if len(made) != 1:
        return None
    reads = [(reader, layout) for reader, layout in made[0].reads if reader is not call]
    first = reads[0][0]
    return first if all(reader is first and layout == made[0].layout for reader, layout in reads) else None


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tuple(tensor.shape), tuple(tensor.stride()), tensor.storage_offset(), tensor.dtype
