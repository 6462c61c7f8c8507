"""Residual additions on integer grids: which tensors that takes, read from one pass over the network, and how they are
quantized while it runs.

A network's forward is not rewritten. Hooks tell which module is running and a function mode sees the additions in its
forward; both together name a tensor: ``conv_first`` is the output of that layer, ``body.0/add.1`` the second addition
that the forward of ``body.0`` calls itself, ``act#2/relu.0`` one of the third call of ``act``. The names do not depend
on the image.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..quantizers import Quantizer
from .plan import FLOAT_BITS, Plan, TensorPlan
from .scope import WEIGHT_LAYERS
from .trace import shapes_only

TENSOR_BITS = 8
"""Bits of the tensors around an addition, whatever the layers have: 8-bit sums cost little and lose little."""
CONTAINER = 'tensor_quantizers'
"""Name of the network's module that holds the quantizers of tensors."""

_PASSES = {
    Tensor.mul, torch.mul, Tensor.contiguous, Tensor.clone, torch.clone, nn.functional.dropout, torch.pixel_shuffle,
}  # fmt: skip
"""Functions behind which a tensor counts as the same one: factors that are numbers, copies, moves."""
_ADDITIONS = {Tensor.add, Tensor.add_, torch.add}  # + and += are the first two


class _Frames(TorchFunctionMode):
    """Knows which module's forward is running, and numbers the functions that it calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[tuple[str, dict[str, int]]] = []
        self._calls: dict[str, int] = {}

    def enter(self, name: str, module: nn.Module, inputs: Any) -> None:
        if name == '':
            self.stack.clear()
            self._calls.clear()
            self.__enter__()
        again = self._calls[name] = self._calls.get(name, -1) + 1
        self.stack.append((f'{name}#{again}' if again else name, {}))

    def leave(self, name: str, module: nn.Module, inputs: Any, output: Any) -> Any:
        label = ''
        while self.stack:  # more than one where a call below was left by an exception that the network caught
            label = self.stack.pop()[0]
            if label.split('#')[0] == name:
                break
        if name == '':
            self.__exit__(None, None, None)
        return self.made_by(label, module, inputs, output)

    def made_by(self, label: str, module: nn.Module, inputs: Any, output: Any) -> Any:
        """Called with what a module returns; what is not None replaces it."""

    def site(self, func: Callable[..., Any]) -> str:
        """Name of the tensor that this call of ``func`` makes."""
        name, counts = self.stack[-1] if self.stack else ('', {})
        kind = 'add' if func in _ADDITIONS else getattr(func, '__name__', str(func)).strip('_')
        counts[kind] = counts.get(kind, -1) + 1
        return f'{name}/{kind}.{counts[kind]}'

    def attach(self, net: nn.Module) -> list[Any]:
        """Hang the hooks onto all modules but quantizers; returns their handles."""
        handles = []
        for name, module in net.named_modules():
            if not isinstance(module, Quantizer) and not name.startswith(CONTAINER):
                enter = functools.partial(self.enter, name)
                handles.append(module.register_forward_pre_hook(enter, prepend=True))
                leave = functools.partial(self.leave, name)
                handles.append(module.register_forward_hook(leave, always_call=True))
        return handles


# ---------------------------------------------------------------------------------------------- which tensors there are


@dataclass
class _Made:
    """Where a tensor comes from: its site, and whether a layer's weight is in it."""

    site: str
    weighted: bool = False
    parents: list[int] = field(default_factory=list)
    is_layer: bool = False
    operands: list[int] = field(default_factory=list)


class _Recorder(_Frames):
    """Follows tensors by identity through one pass."""

    def __init__(self, quantized: set[str]) -> None:
        super().__init__()
        self.quantized = quantized
        self.made: dict[int, _Made] = {}
        self.same: dict[int, int] = {}
        self.fed: dict[int, list[str]] = {}
        self.left: dict[int, str] = {}
        self.in_place: set[str] = set()
        self._alive: list[Tensor] = []  # an identity is used again once its tensor is gone

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        site = self.site(func)
        given = self._ids((args, kwargs))
        self.in_place.update(self.left[key] for key in given if key in self.left)
        # Out of place: ``a += b`` goes on with the result. Who goes on with the old ``a`` cannot have it quantized.
        out = (Tensor.add if func is Tensor.add_ else func)(*args, **(kwargs or {}))
        if func is Tensor.add_:
            self.left[id(args[0])] = site
        if not isinstance(out, Tensor):
            for leaf in out if isinstance(out, (tuple, list)) else ():
                self._note(leaf, _Made(site, self._weighted(args), self._ids(args)))
            return out
        numbers = all(not isinstance(a, Tensor) for a in args[1:]) and len(given) == 1
        if func in _PASSES and numbers and args[0] is not out:
            self.same[id(out)] = self.same.get(given[0], given[0])
        operands = []
        if func in _ADDITIONS and _is_residual(args, kwargs) and all(self._weighted(a) for a in args[:2]):
            operands = given[:2]
        self._note(out, _Made(site, self._weighted(args), given, operands=operands))
        return out

    def made_by(self, label: str, module: nn.Module, inputs: Any, output: Any) -> Any:
        name = label.split('#')[0]
        if name in self.quantized and inputs:
            self.fed.setdefault(id(inputs[0]), []).append(name)
        if isinstance(output, Tensor) and not list(module.children()) and name:
            parents = self._ids(inputs)
            if id(output) not in parents:
                is_layer = isinstance(module, WEIGHT_LAYERS)
                self._note(output, _Made(label, is_layer or self._weighted(inputs), parents, is_layer))
                self.same.pop(id(output), None)

    def _note(self, tensor: Any, made: _Made) -> None:
        if isinstance(tensor, Tensor):
            self._alive.append(tensor)
            before = self.made.get(id(tensor)) if id(tensor) in made.parents else None
            if before is not None:  # in place: what the tensor was made from counts on
                made.parents, made.is_layer = [*before.parents, *made.parents], before.is_layer
            self.made[id(tensor)] = made

    def _ids(self, tree: Any) -> list[int]:
        leaves = torch.utils._pytree.tree_leaves(tree)
        return [id(leaf) for leaf in leaves if isinstance(leaf, Tensor) and id(leaf) in self.made]

    def _weighted(self, tree: Any) -> bool:
        return any(self.made[i].weighted for i in self._ids(tree))


def _is_residual(args: Any, kwargs: Any) -> bool:
    """An addition of two features of one shape: no bias, no mean, no positional table."""
    if len(args) < 2 or (kwargs or {}).get('alpha', 1) != 1 or not all(isinstance(a, Tensor) for a in args[:2]):
        return False
    first, second = args[:2]
    return first.shape == second.shape and first.dim() >= 3 and first.is_floating_point()


@torch.no_grad()
def find_tensors(net: nn.Module, image: Tensor, plan: Plan) -> tuple[TensorPlan, ...]:
    """The tensors that have to be quantized so that residual additions run in integers.

    An addition counts if both operands come from layers with a weight and its result goes to a quantized layer (with no
    other weight layer in between): the addition at a network's output and the one of a mean stay in floating point.
    Quantized are its result and its operands, each tensor once, where it is made.

    Args:
        net: The FP32 network, in eval mode on the meta device or not; it is run once.
        image: An input.
        plan: The plan of its layers.
    """
    inputs = {layer.layer for layer in plan if layer.a_bits < FLOAT_BITS}
    recorder = _Recorder(inputs)
    recorder._note(image, _Made('input'))
    handles = recorder.attach(net)
    try:
        net(image)
    finally:
        for handle in handles:
            handle.remove()
    return _chosen(recorder)


def tensors_of(net: nn.Module, shape: tuple[int, ...], plan: Plan) -> tuple[TensorPlan, ...]:
    """:func:`find_tensors` of an FP32 network that stays as it is; ``shape`` is that of an input it takes."""
    image = torch.zeros(shape, dtype=next((p.dtype for p in net.parameters()), None))
    try:
        return find_tensors(shapes_only(net), image.to('meta'), plan)
    except Exception:  # a forward that reads values cannot run on the meta device
        return find_tensors(copy.deepcopy(net).cpu().eval(), image, plan)


def _chosen(recorder: _Recorder) -> tuple[TensorPlan, ...]:
    reached: set[int] = set()
    pending = list(recorder.fed)
    while pending:
        key = pending.pop()
        if key in reached or key not in recorder.made:
            continue
        reached.add(key)
        if not recorder.made[key].is_layer:  # what lies before a layer is that layer's affair
            pending += recorder.made[key].parents
    sums = {key: made for key, made in recorder.made.items() if made.operands and key in reached}
    sums = {key: made for key, made in sums.items() if made.site not in recorder.in_place}
    users: dict[int, int] = {}
    for key, made in recorder.made.items():
        for parent in made.parents:
            root = recorder.same.get(parent, parent)
            if recorder.same.get(key) != root:  # a copy is no use by itself
                users[root] = users.get(root, 0) + 1
    found: dict[str, TensorPlan] = {}
    for key, made in recorder.made.items():  # in the order of the pass
        wanted = [s for s in sums.values() if key in {recorder.same.get(o, o) for o in s.operands}]
        if key not in sums and not wanted:
            continue
        feeds = tuple(n for k, names in recorder.fed.items() for n in names if k == key)
        kind = 'sum' if key in sums else 'branch' if users.get(key, 0) == 1 else 'skip'
        found.setdefault(made.site, TensorPlan(made.site, TENSOR_BITS, kind, feeds))
    return tuple(found.values())


# ------------------------------------------------------------------------------------------------------ while it runs


class TensorQuantizers(_Frames):
    """Applies the quantizers of tensors while the network runs."""

    def __init__(self, net: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.net = net
        self.keys = {tensor.tensor: key_of(tensor.tensor) for tensor in plan.tensors}
        self.attach(net)

    def _quantized(self, site: str, value: Tensor) -> Tensor:
        if site not in self.keys:
            return value
        self.stack.append((CONTAINER, {}))  # its own functions are not the network's
        try:
            return getattr(self.net, CONTAINER)[self.keys[site]](value)  # type: ignore[no-any-return]
        finally:
            self.stack.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        site = self.site(func)
        if site not in self.keys:
            return func(*args, **kwargs)
        # Out of place: an operand may be a quantizer's output, which its gradient still needs.
        out = (Tensor.add if func is Tensor.add_ else func)(*args, **kwargs)
        return self._quantized(site, out)

    def made_by(self, label: str, module: nn.Module, inputs: Any, output: Any) -> Any:
        return self._quantized(label, output) if label in self.keys and isinstance(output, Tensor) else None


def key_of(site: str) -> str:
    """The name of a tensor's quantizer in the container: module names may not hold dots.

    >>> key_of('body.0/add.1')
    'body-0/add-1'
    """
    return site.replace('.', '-')


def add_tensor_quantizers(
    net: nn.Module, plan: Plan, make: Callable[[TensorPlan], Quantizer], share: bool = True
) -> None:
    """Give ``net`` the quantizers of the plan's tensors, in place.

    A tensor that feeds a layer whose input has as many bits takes that layer's own input quantizer, and all such layers
    share it: one quantizer for a tensor.

    Args:
        net: The network, its layers replaced already.
        plan: With :attr:`Plan.tensors`.
        make: Builds the quantizer of a tensor that shares none.
        share: False gives every tensor a quantizer of its own.
    """
    held = nn.ModuleDict()
    modules = dict(net.named_modules())
    for tensor in plan.tensors:
        layers = [modules[name] for name in tensor.feeds]
        shared = [layer for layer in layers if share and _bits(layer) == tensor.bits]
        quantizer = shared[0].input_quantizer if shared else make(tensor)
        for layer in shared:
            layer.input_quantizer = quantizer
        held[key_of(tensor.tensor)] = quantizer
    net.add_module(CONTAINER, held)
    TensorQuantizers(net, plan)


def _bits(layer: nn.Module) -> int | None:
    quantizer = getattr(layer, 'input_quantizer', None)
    return quantizer.num_bits if isinstance(quantizer, Quantizer) else None
