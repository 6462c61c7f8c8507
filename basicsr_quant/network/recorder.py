"""What one forward pass does, written down while it runs: who was called, with which shapes, at how many MACs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..nn import operands_of
from ..quantizers.quantizer import Quantizer
from .dataflow import Call, DataFlow
from .formulas import formula_of
from .nonnegative import MOVES, NonNegativeTensors, names, operator_name, tensors_in
from .scope import WEIGHT_LAYERS

# What fills, moves or looks at memory, beside views.
_NO_ARITHMETIC = MOVES | names("""
    zeros ones zeros_like ones_like new_zeros new_ones zero empty empty_like new_empty empty_strided fill full full_like
    new_full scalar_tensor arange copy constant_pad_nd masked_fill scatter index_put unfold _unsafe_view _reshape_alias
    as_strided native_dropout squeeze unsqueeze transpose t detach
""")


@dataclass
class CallRecord:
    """What a module did over all its calls in one pass.

    ``operands``: for each operand of its own matrix products, in order, whether it could not be negative;
    ``other_products``: how many operators with MACs it ran beside those.
    """

    calls: int = 0
    input_shape: tuple[int, ...] = ()
    output_shape: tuple[int, ...] = ()
    macs: int = 0
    rectified: bool = True
    operands: list[bool] = field(default_factory=list)
    other_products: int = 0


@dataclass
class _Frame:
    """A module whose forward is running. ``ignored``: quantizers and all else that runs inside a weight layer.

    ``call``: of the innermost module without children, or weight layer, that is running.
    """

    module: nn.Module
    name: str
    ignored: bool = False
    call: Call | None = None


@dataclass
class Recording:
    """The result of :func:`record`; ``records`` is in the order of first calls and keyed by module name."""

    records: dict[str, CallRecord] = field(default_factory=dict)
    not_counted: dict[str, None] = field(default_factory=dict)
    flow: DataFlow = field(default_factory=DataFlow)
    output: Any = None


class _Recorder(TorchDispatchMode):
    """Counts multiply-accumulates by torch's own formulas and books them on the innermost running module."""

    def __init__(self, net: nn.Module, pixels: int) -> None:
        super().__init__()
        self.recording = Recording()
        self._pixels = pixels
        self._names = {module: name for name, module in net.named_modules()}
        self._stack: list[_Frame] = []
        self._nonnegative = NonNegativeTensors()

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        parent = self._stack[-1] if self._stack else None
        inside = parent is not None and (parent.ignored or isinstance(parent.module, WEIGHT_LAYERS))
        ignored = inside or isinstance(module, Quantizer)
        call = parent.call if parent is not None else None
        if call is None and (isinstance(module, WEIGHT_LAYERS) or next(module.children(), None) is None):
            call = self.recording.flow.call(self._names[module], module)
        frame = _Frame(module, self._names[module], ignored, call)
        self._stack.append(frame)
        if not ignored:
            record = self.recording.records.setdefault(frame.name, CallRecord())
            given = first_tensor((args, kwargs))
            record.calls += 1
            record.rectified &= given is not None and given in self._nonnegative
            record.input_shape = record.input_shape or _shape(given)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        while self._stack and self._stack.pop().module is not module:
            pass  # a call below was left by an exception that the network caught
        if not self._stack:
            self.recording.output = output
            self.recording.flow.end(output)
        record = self.recording.records.get(self._names[module])
        if record is not None and not record.output_shape:
            record.output_shape = _shape(first_tensor(output))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = formula_of(func)
        if formula is None and torch.is_inference_mode_enabled():  # there composite operators arrive whole
            with self:
                out = func.decompose(*args, **kwargs)
            if out is not NotImplemented:
                return out
        out = func(*args, **kwargs)
        self._nonnegative.observe(func, args, kwargs, out)
        frame = self._stack[-1] if self._stack else None
        self.recording.flow.observe(frame.call if frame is not None else None, func, args, kwargs, out)
        if frame is None or frame.ignored:
            return out
        if formula is not None:
            record = self.recording.records[frame.name]
            record.macs += formula(*args, **kwargs, out_val=out) // 2
            record.other_products += 1
        elif not isinstance(frame.module, WEIGHT_LAYERS) and self._is_arithmetic(func, args, out):
            self.recording.not_counted[_plain_name(func)] = None
        return out

    def product(self, left: Any, right: Any) -> None:
        """A matrix product is about to run that a quantized module would see; its operator is counted once more."""
        frame = self._stack[-1] if self._stack else None
        if frame is not None and not frame.ignored:
            record = self.recording.records[frame.name]
            record.operands += [left in self._nonnegative, right in self._nonnegative]
            record.other_products -= 1

    def _is_arithmetic(self, func: Any, args: Any, out: Any) -> bool:
        """True for arithmetic on floating tensors of at least one value for each pixel of the network's input."""
        if operator_name(func) in _NO_ARITHMETIC or func.is_view:
            return False
        results, given = (tensors_in(tree) for tree in (out, args))
        is_floating = any(t.is_floating_point() for t in results)  # comparisons are not
        return is_floating and any(t.is_floating_point() and t.numel() >= self._pixels for t in results + given)


class _Products(TorchFunctionMode):
    """Tells the recorder of matrix products where they are still calls of torch's functions, above operators."""

    def __init__(self, recorder: _Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = operands_of(func, args, kwargs or {})
        if operands is not None:
            self._recorder.product(*operands)
        return func(*args, **kwargs or {})


@contextmanager
def _hooks(net: nn.Module, recorder: _Recorder) -> Iterator[None]:
    handles = []
    try:
        for module in net.modules():
            handles.append(module.register_forward_pre_hook(recorder.enter, prepend=True, with_kwargs=True))
            handles.append(module.register_forward_hook(recorder.leave, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fused attention block, an operator of its own that no formula is known for."""
    if not hasattr(torch.backends, 'mha'):  # torch 2.1
        yield
        return
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def record(net: nn.Module, image: Tensor) -> Recording:
    """Run ``net(image)`` once without gradients and write down what happens; hooks are gone afterwards."""
    pixels = image[0, 0].numel() if image.dim() > 2 else image[0].numel()
    recorder = _Recorder(net, pixels)
    with torch.inference_mode(False), torch.no_grad(), _plain_attention(), _hooks(net, recorder), recorder, \
            _Products(recorder):
        net(image)
    return recorder.recording


def first_tensor(tree: Any) -> Tensor | None:
    """The first tensor in nested tuples, lists and dictionaries, or None."""
    return next(iter(tensors_in(tree)), None)


def _shape(tensor: Tensor | None) -> tuple[int, ...]:
    return () if tensor is None else tuple(tensor.shape)


def _plain_name(func: Any) -> str:
    """``aten::_native_layer_norm`` becomes ``layer_norm``; operators of other libraries keep their full name."""
    if not func._schema.name.startswith('aten::'):
        return func._schema.name
    name = re.sub('^(_|native_|safe_)+', '', operator_name(func))
    return re.sub('(_kernel|_legit_no_training|_with_indices)$', '', name)
