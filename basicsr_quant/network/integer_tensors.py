"""Which tensors have to lie on a grid so that a whole network runs in integers, read from one pass over it.

Engines compute a convolution in integers only if its output is quantized at once, and an addition only if both operands
and the result are. A layer's own input quantizer stands there where nothing else does; all other tensors on the way
from one quantized layer to the next need a quantizer of their own: operands and results of residual additions, of
concatenations and of products (attention), and what a layer gives to a function that is not ReLU (PReLU, GELU ...).
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .frames import ADDITIONS, Frames, kind_of, out_of_place, without_in_place
from .nonnegative import tensors_in
from .plan import FLOAT_BITS, Plan, TensorPlan
from .scope import WEIGHT_LAYERS
from .trace import shapes_only

TENSOR_BITS = 8
"""Bits of these tensors, whatever the layers have: 8-bit sums cost little and lose little."""

_PASSES = {
    Tensor.mul, torch.mul, Tensor.contiguous, Tensor.clone, torch.clone, nn.functional.dropout, torch.pixel_shuffle,
}  # fmt: skip
"""Functions behind which a tensor counts as the same one: factors that are numbers, copies, moves."""
MOVES = frozenset({
    'chunk', 'clone', 'contiguous', 'dropout', 'flatten', 'getitem', 'narrow', 'permute', 'pixel_shuffle',
    'pixel_unshuffle', 'reshape', 'roll', 'split', 'split_with_sizes', 'squeeze', 'transpose', 'unbind', 'unsqueeze',
    'view',
})  # fmt: skip
"""Functions that move values and compute nothing: a grid goes through them."""
_CONCATENATIONS = ('cat', 'concat', 'concatenate')
NONLINEAR = frozenset({
    'celu', 'elu', 'gelu', 'hardsigmoid', 'hardswish', 'hardtanh', 'leaky_relu', 'logsigmoid', 'mish', 'prelu', 'relu6',
    'selu', 'sigmoid', 'silu', 'softplus', 'tanh',
})  # fmt: skip
"""Functions of one value. ReLU is none of them: it is a lower bound on codes, which engines fuse into the layer."""
ENGINES = ('onnxruntime', 'openvino', 'tensorrt')
"""Who a file is for. The CPU engines take uint8 activations, TensorRT int8 ones with zero point 0."""
_WITHIN_A_LAYER = {'openvino': ('branch', 'before')}
_SUM, _JOIN, _FUNCTION, _OTHER = 'sum', 'join', 'function', 'other'


@dataclass
class _Made:
    """Where a tensor comes from.

    Attributes:
        site: Its name.
        kind: Name of the function that made it.
        weighted: Whether a layer's weight is in it.
        layer: Of the output of a layer with a weight: ``convolution`` or ``other``; else ''.
        operands: Of a residual addition, or of a product or concatenation of features.
    """

    site: str
    kind: str = ''
    weighted: bool = False
    parents: list[int] = field(default_factory=list)
    layer: str = ''
    operands: list[int] = field(default_factory=list)


class _Recorder(Frames):
    """Follows tensors by identity through one pass."""

    def __init__(self, inputs: Collection[str], integer: Collection[str]) -> None:
        super().__init__()
        self.inputs, self.integer = inputs, integer
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
        out = (Tensor.add if func is Tensor.add_ else func)(*args, **out_of_place(kwargs or {}))
        if func is Tensor.add_:
            self.left[id(args[0])] = site
        if out is (args[0] if args else None) and kind_of(func) in MOVES:  # a dropout in evaluation mode
            return out
        made = _Made(site, kind_of(func), self._weighted(args), given)
        if not isinstance(out, Tensor):
            for leaf in out if isinstance(out, (tuple, list)) else ():
                self._note(leaf, made)
            return out
        numbers = all(not isinstance(a, Tensor) for a in args[1:]) and len(given) == 1
        if func in _PASSES and numbers and args[0] is not out:
            self.same[id(out)] = self.same.get(given[0], given[0])
        made.operands = self._operands(func, args, kwargs or {})
        self._note(out, made)
        return out

    def _operands(self, func: Any, args: Any, kwargs: Any) -> list[int]:
        if func in ADDITIONS and _is_residual(args, kwargs) and all(self._weighted(a) for a in args[:2]):
            return self._ids(args[:2])
        if kind_of(func) in _CONCATENATIONS and args and all(self._weighted(a) for a in args[0]):
            return self._ids(args[0])
        if kind_of(func) == 'mul' and len(args) > 1 and all(self._weighted(a) for a in args[:2]):
            return self._ids(args[:2])
        return []

    def made_by(self, label: str, module: nn.Module, inputs: Any, output: Any) -> Any:
        name = label.split('#')[0]
        if name in self.inputs and inputs:
            self.fed.setdefault(id(inputs[0]), []).append(name)
        if isinstance(output, Tensor) and not list(module.children()) and name:
            parents, before = self._ids(inputs), self.made.get(id(output))
            if id(output) not in parents and not (before is not None and before.kind in MOVES):
                made = before or _Made(label, parents=parents)
                made.site, made.weighted = label, made.weighted or self._weighted(inputs)
                if isinstance(module, WEIGHT_LAYERS):
                    whole = isinstance(module, nn.Conv2d) and name in self.integer
                    made.layer, made.weighted, made.kind = 'convolution' if whole else 'other', True, ''
                self._note(output, made)
                self.same.pop(id(output), None)

    def _note(self, tensor: Any, made: _Made) -> None:
        if isinstance(tensor, Tensor):
            self._alive.append(tensor)
            before = self.made.get(id(tensor)) if id(tensor) in made.parents else None
            if before is not None:  # in place: what the tensor was made from counts on
                made.parents, made.layer = [*before.parents, *made.parents], before.layer
            self.made[id(tensor)] = made

    def _ids(self, tree: Any) -> list[int]:
        return [id(leaf) for leaf in tensors_in(tree) if id(leaf) in self.made]

    def _weighted(self, tree: Any) -> bool:
        return any(self.made[i].weighted for i in self._ids(tree))


def _is_residual(args: Any, kwargs: Any) -> bool:
    """An addition of two features of one shape: no bias, no mean, no positional table, no statistics of channels."""
    if len(args) < 2 or kwargs.get('alpha', 1) != 1 or not all(isinstance(a, Tensor) for a in args[:2]):
        return False
    first, second = args[:2]
    pixels = first.shape[2:].numel() > 1 or first.dim() < 4
    return first.shape == second.shape and first.dim() >= 3 and pixels and first.is_floating_point()


def executed(tensors: tuple[TensorPlan, ...], engine: str) -> tuple[TensorPlan, ...]:
    """The tensors that an engine quantizes: OpenVINO adds the branch of a residual block, and computes the function
    behind a layer, within the layer."""
    return tuple(tensor for tensor in tensors if tensor.kind not in _WITHIN_A_LAYER.get(engine, ()))


@torch.no_grad()
def find_tensors(net: nn.Module, image: Tensor, plan: Plan) -> tuple[TensorPlan, ...]:
    """The tensors that have to be quantized so that what lies between quantized layers runs in integers.

    What leads to no quantized layer stays in floating point: the last layer's output, the addition of an image or of a
    mean at the end. Each tensor is quantized once, where it is made:

    - an addition of two features of one shape: its result and its operands (``sum``, ``skip``, ``branch``);
    - a concatenation or a product of features: its operands, and its result where such a step takes it (``part``);
    - the output of a convolution in integers that goes to a function other than ReLU, or to anything else that is
      computed in floating point (``before``, or ``part`` where something else takes it too), and that function's result
      where an addition, a concatenation or a product takes it.

    Args:
        net: The FP32 network, in eval mode on the meta device or not; it is run once.
        image: An input.
        plan: The plan of its layers.
    """
    inputs = {layer.layer for layer in plan if layer.a_bits < FLOAT_BITS}
    recorder = _Recorder(inputs, {layer.layer for layer in plan if layer.a_bits < FLOAT_BITS > layer.w_bits})
    recorder._note(image, _Made('input'))
    handles = recorder.attach(net)
    try:
        net(image)
    finally:
        for handle in handles:
            handle.remove()
    return _Choice(recorder).tensors()


def tensors_of(net: nn.Module, shape: tuple[int, ...], plan: Plan) -> tuple[TensorPlan, ...]:
    """:func:`find_tensors` of an FP32 network that stays as it is; ``shape`` is that of an input it takes.

    BatchNorms that the plan folds count as gone.
    """
    image = torch.zeros(shape, dtype=next((p.dtype for p in net.parameters()), None))
    folded = plan.settings.get('folded', {})
    try:
        return find_tensors(_as_it_will_be(shapes_only(net), folded), image.to('meta'), plan)
    except Exception:  # a forward that reads values cannot run on the meta device
        return find_tensors(_as_it_will_be(copy.deepcopy(net).cpu().eval(), folded), image, plan)


def _as_it_will_be(net: nn.Module, folded: Collection[str]) -> nn.Module:
    for name in folded:
        parent, _, child = name.rpartition('.')
        setattr(net.get_submodule(parent), child, nn.Identity())
    without_in_place(net)
    return net


class _Choice:
    """Which of the tensors of a pass are quantized."""

    def __init__(self, recorder: _Recorder) -> None:
        self.made, self.same, self.fed = recorder.made, recorder.same, recorder.fed
        self.reached = self._reached()
        self.users: dict[int, list[int]] = {}
        for key, made in self.made.items():
            for parent in dict.fromkeys(made.parents):
                if parent != key:
                    self.users.setdefault(parent, []).append(key)
        sums = {k for k, m in self.made.items() if m.operands and m.kind == 'add' and k in self.reached}
        self.sums = {k for k in sums if self.made[k].site not in recorder.in_place}

    def tensors(self) -> tuple[TensorPlan, ...]:
        found: dict[str, TensorPlan] = {}
        for key, made in self.made.items():  # in the order of the pass
            kind = self._kind(key) if key in self.reached else ''
            if kind:
                found.setdefault(made.site, TensorPlan(made.site, TENSOR_BITS, kind, tuple(self._feeds(key))))
        return tuple(found.values())

    def _reached(self) -> set[int]:
        """The tensors that lead to a quantized layer with no other layer in between."""
        reached: set[int] = set()
        pending = list(self.fed)
        while pending:
            key = pending.pop()
            if key not in reached and key in self.made:
                reached.add(key)
                if not self.made[key].layer:  # what lies before a layer is that layer's affair
                    pending += self.made[key].parents
        return reached

    def _kind(self, key: int) -> str:
        made = self.made[key]
        if key in self.sums:
            return '' if self._rectified(key) else 'sum'
        if made.kind == 'relu' and any(self._rectified(parent) for parent in made.parents if parent in self.sums):
            return 'sum'
        if made.kind in MOVES or key in self.same:
            return ''
        uses = [self._use(user) for user in self._real_users(key)]
        if _SUM in uses:
            return 'branch' if len(uses) == 1 and not self._layers_of(key) else 'skip'
        if _JOIN in uses:
            return 'part'
        if made.layer == 'convolution' and (_FUNCTION in uses or _OTHER in uses):
            return 'before' if len(uses) == 1 and not self._layers_of(key) else 'part'
        return ''

    def _rectified(self, key: int) -> bool:
        """Whether a ReLU alone takes a tensor: a lower bound on the codes of its own result."""
        return [self.made[user].kind for user in self.users.get(key, ())] == ['relu']

    def _use(self, user: int) -> str:
        """What a step that takes a tensor is to that tensor's grid."""
        made = self.made[user]
        if user not in self.reached or made.layer or made.kind == 'relu':
            return ''  # leads to the output only; a layer with its own input quantizer; goes on in the layer's codes
        if user in self.sums:
            return _SUM
        if made.operands and made.kind != 'add':
            return _JOIN
        return _FUNCTION if made.kind in NONLINEAR else _OTHER

    def _real_users(self, key: int) -> list[int]:
        """Steps that take a tensor, seen through moves, copies and factors."""
        found = []
        for user in self.users.get(key, ()):
            through = self.made[user].kind in MOVES or user in self.same
            found += self._real_users(user) if through and not self.made[user].layer else [user]
        return found

    def _layers_of(self, key: int) -> list[str]:
        """Quantized layers that take a tensor, or a part of it."""
        names = list(self.fed.get(key, ()))
        for user in self.users.get(key, ()):
            if (self.made[user].kind in MOVES or user in self.same) and not self.made[user].layer:
                names += self._layers_of(user)
        return names

    def _feeds(self, key: int) -> list[str]:
        """Those of them that take its values as they are, so that one quantizer may do for both."""
        names = list(self.fed.get(key, ()))
        for user in self.users.get(key, ()):
            if self.made[user].kind in MOVES and self.made[user].kind != 'pixel_shuffle':
                names += self._feeds(user)
        return list(dict.fromkeys(names))
