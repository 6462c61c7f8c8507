"""The structure of any network: its layers in execution order, their shapes and costs. Nothing is read from data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .. import random_state
from ..errors import QuantError
from ..nn.weight_mask import SparsityModule
from ..quantizers.context import NetworkMeasure, floating_bytes
from ..quantizers.quantizer import Quantizer
from .dataflow import Step
from .recorder import CallRecord, Recording, first_tensor, record
from .scope import WEIGHT_LAYERS

Result = TypeVar('Result')

_CLIPS = ((1, 5, 3, 64, 64), (1, 7, 3, 64, 64))
"""Shapes for video networks, tried last."""

_SIZES = (32, 64, 48, 56, 128)
"""Sides of the dummy input, tried in this order: windows of 8 and 16 fit 32, windows of 7 fit 56."""


@dataclass(frozen=True)
class LayerTrace:
    """One module in one forward pass.

    Args:
        name: Name in ``network.named_modules()``; empty for the network itself.
        type: Class name.
        calls: How often the pass called it.
        input_shape, output_shape: Shapes of its first tensor in and out, at the first call.
        macs: Multiply-accumulates of this module's own forward (not of its children), over all calls, batch 1.
        rectified: True if at every call its input is the result of an operation that gives no negative values
            (ReLU, sigmoid, softmax, abs, clamp from 0 ...), also through pooling, pixel shuffle, concatenation, sums.
        operands: For each operand of the matrix products of this module's own forward, in the order of one call,
            whether it cannot be negative; empty where there are none, or where it runs other operators with MACs too.
        weight_numel, weight_bytes: Size of ``weight`` as it is stored; 0 where there is none, or where an earlier
            layer holds the same tensor.
        chain: What follows a layer as long as each step alone reads what the one before it computes, up to the next
            layer, see :meth:`.dataflow.DataFlow.chain`.
    """

    name: str
    type: str
    calls: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    macs: int
    rectified: bool
    weight_numel: int = 0
    weight_bytes: int = 0
    operands: tuple[bool, ...] = ()
    chain: tuple[Step, ...] = ()


@dataclass(frozen=True)
class NetworkTrace:
    """What :func:`trace` found.

    Args:
        layers: Convolutions, linear layers, and other modules without children that multiply matrices, in the order
            of their first call.
        functional: Modules with children whose own forward multiplies matrices (attention), in the same order.
        not_counted: Operators that do arithmetic on tensors of image size and that ``macs`` leaves out.
        unused: Names of convolutions and linear layers that the pass never called.
        batch_norms: Names of the BatchNorm layers of any kind.
        input_shape, output_shape: Of the network, batch 1.
        parameter_bytes: All parameters as they are stored, without those of quantizers and masks.
        range_bytes: Floating-point tensors of the quantizers in the network (ranges, units, gates).
        quantizer_macs: Multiply-accumulates that quantizers spend on choosing ranges for one image; not in ``macs``.
    """

    layers: tuple[LayerTrace, ...]
    functional: tuple[LayerTrace, ...]
    not_counted: tuple[str, ...]
    unused: tuple[str, ...]
    batch_norms: tuple[str, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    parameter_bytes: int
    range_bytes: int
    quantizer_macs: int = 0

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the pass: convolutions, linear layers and matrix products, batch 1."""
        return sum(layer.macs for layer in self.layers + self.functional)

    def __getitem__(self, name: str) -> LayerTrace:
        for layer in self.layers + self.functional:
            if layer.name == name:
                return layer
        raise KeyError(name)


def trace(net: nn.Module, input_shape: tuple[int, ...] | None = None, *, compute: bool = True) -> NetworkTrace:
    """Run ``net`` once and report its layers; the network and all random states stay as they were.

    The pass runs on a copy on the meta device, which computes shapes only. A network that cannot (its forward reads
    values, or an operator has no shape function) runs in place, in evaluation mode, on its own device.

    Args:
        net: Any network with one tensor as input, quantized or not. MACs are the same before and after quantization.
        input_shape: Shape of that tensor; the batch is set to 1. Default: image channels from the first convolution
            and the smallest of a few square sizes that the network accepts.
        compute: If False (for large inputs), a network that cannot run on the meta device is refused instead of run.

    Raises:
        QuantError: if the network cannot be run on such an input.
    """
    shapes = _default_shapes(net) if input_shape is None else [(1, *input_shape[1:])]
    reasons: dict[tuple[int, ...], Exception] = {}
    for run in (_run_on_meta, _run_in_place) if compute else (_run_on_meta,):
        for shape in shapes:
            try:
                with random_state.preserved(), torch.random.fork_rng(devices=_cuda_devices(net)):
                    recording = run(net, shape)
                return _report(net, shape, recording)
            except Exception as error:  # anything may go wrong in a forward that was made for other inputs
                reasons[shape] = error
    raise _unlisted(net, reasons)


def _unlisted(net: nn.Module, reasons: dict[tuple[int, ...], Exception]) -> QuantError:
    """The refusal of a network that takes none of the shapes; its cause is what the first one gave."""
    first, *others = reasons
    missing = next((error for error in reasons.values() if 'torchvision' in str(error) and ' ops' in str(error)), None)
    if missing is not None:
        refusal = QuantError(
            f'the layers of {type(net).__name__} cannot be listed, because it calls operators of torchvision '
            '(deformable convolution) that this installation of torchvision does not carry; install the torchvision '
            'that was built for this torch'
        )
        refusal.__cause__ = missing
        return refusal
    tried = _text(first) + (f' (nor of {len(others)} other shapes)' if others else '')
    said = _said(reasons[first])
    clip = next((shape for shape in others if shape in _CLIPS and _said(reasons[shape]) != said), None)
    refusal = QuantError(
        f'the layers of {type(net).__name__} cannot be listed, because it does not run on an input of shape {tried}: '
        f'{said}' + (f'; as a video of shape {_text(clip)}: {_said(reasons[clip])}' if clip else '')
    )
    refusal.__cause__ = reasons[first]
    return refusal


def _text(shape: tuple[int, ...]) -> str:
    return 'x'.join(map(str, shape))


def _said(error: Exception) -> str:
    return f'{type(error).__name__}: {" ".join(str(error).split())[:200]}'


def _default_shapes(net: nn.Module) -> list[tuple[int, ...]]:
    first = next((module for module in net.modules() if isinstance(module, _ConvNd)), None)
    if first is not None:
        dimensions = len(first.kernel_size)
        if dimensions == 1:
            return [(1, first.in_channels, size) for size in _SIZES]
        if dimensions == 3:
            return [*((1, first.in_channels, 8, size, size) for size in _SIZES), *_CLIPS]
        # 3 and 1 channels: images that are unshuffled before the first convolution
        images = [(1, c, size, size) for c in dict.fromkeys((first.in_channels, 3, 1)) for size in _SIZES]
        return [*images, *_CLIPS]
    for module in net.modules():
        if isinstance(module, nn.Linear):
            return [(1, module.in_features)]
    raise QuantError(f'{type(net).__name__} has neither a convolution nor a linear layer, so there is nothing to list')


def shapes_only(net: nn.Module) -> nn.Module:
    """A copy of ``net`` on the meta device, in evaluation mode: it computes shapes and no values."""
    memo: dict[int, object] = {}
    for module in net.modules():
        for parameter in module.parameters(recurse=False):
            memo[id(parameter)] = nn.Parameter(torch.empty_like(parameter, device='meta'), parameter.requires_grad)
        held = [v for v in vars(module).values() if isinstance(v, Tensor) and v.grad_fn is not None]
        for tensor in [*module.buffers(recurse=False), *held]:  # ``held``: deepcopy refuses what has a history
            memo[id(tensor)] = torch.empty_like(tensor, device='meta', requires_grad=False)
    twin = copy.deepcopy(net, memo)  # the memo stands in for every tensor: no weight is copied
    for module in twin.modules():
        module.training = False
    return twin


def _run_on_meta(net: nn.Module, shape: tuple[int, ...]) -> Recording:
    return record(shapes_only(net), torch.empty(shape, device='meta', dtype=_dtype(net)))


def on_small_image(net: nn.Module, run: Callable[[nn.Module, Tensor], Result]) -> Result:
    """Call ``run(net, image)`` in evaluation mode on the smallest random image that ``net`` takes.

    The network and all random states stay as they were. ``run`` may be called on several sizes; the last one counts.

    Raises:
        QuantError: if the network takes none of them.
    """
    reasons: dict[tuple[int, ...], Exception] = {}
    for shape in _default_shapes(net):
        try:
            with random_state.preserved(), torch.random.fork_rng(devices=_cuda_devices(net)):
                return _in_place(net, shape, run)
        except Exception as error:
            reasons[shape] = error
    raise _unlisted(net, reasons)


def _run_in_place(net: nn.Module, shape: tuple[int, ...]) -> Recording:
    return _in_place(net, shape, record)


def _in_place(net: nn.Module, shape: tuple[int, ...], run: Callable[[nn.Module, Tensor], Result]) -> Result:
    device = next((parameter.device for parameter in net.parameters()), torch.device('cpu'))
    values = torch.rand(shape, generator=torch.Generator().manual_seed(0))  # like an image: some layers divide by std
    with _restored(net):
        for module in net.modules():
            module.training = False
        return run(net, values.to(device, _dtype(net)))


@contextmanager
def _restored(net: nn.Module) -> Iterator[None]:
    """Put back what a forward pass may change: attributes of the modules, their tables, values of their buffers."""
    attributes = [(module, dict(vars(module))) for module in net.modules()]
    tables = [(table, dict(table)) for _, saved in attributes for table in saved.values() if isinstance(table, dict)]
    values = [(buffer, buffer._version, buffer.detach().clone()) for buffer in net.buffers()]
    try:
        yield
    finally:
        for current, kept in [*((vars(module), saved) for module, saved in attributes), *tables]:
            current.clear()
            current.update(kept)
        with torch.no_grad():
            for buffer, version, value in values:
                if buffer._version != version:
                    buffer.copy_(value)


def _report(net: nn.Module, shape: tuple[int, ...], recording: Recording) -> NetworkTrace:
    layers, functional = [], []
    seen: dict[int, object] = {}
    modules = dict(net.named_modules())
    for name, calls in recording.records.items():
        module = modules[name]
        is_weight_layer = isinstance(module, WEIGHT_LAYERS)
        if is_weight_layer or (calls.macs and not list(module.children())):
            weight = getattr(module, 'weight', None)
            fresh = isinstance(weight, Tensor) and id(weight) not in seen
            seen[id(weight)] = weight  # held: the id of a weight that is computed anew could come again
            chain = _up_to_next_layer(recording.flow.chain(name), modules)
            layers.append(_layer(name, module, calls, weight if fresh else None, chain))
        elif calls.macs:
            functional.append(_layer(name, module, calls, None))
    quantizers = [module for module in modules.values() if isinstance(module, Quantizer)]
    measures = [module for module in modules.values() if isinstance(module, NetworkMeasure)]
    masks = [module for module in modules.values() if isinstance(module, SparsityModule)]
    added = {id(parameter) for module in (*quantizers, *measures, *masks) for parameter in module.parameters()}
    output = first_tensor(recording.output)
    return NetworkTrace(
        layers=tuple(layers),
        functional=tuple(functional),
        not_counted=tuple(sorted(recording.not_counted)),
        unused=tuple(n for n, m in modules.items() if isinstance(m, WEIGHT_LAYERS) and n not in recording.records),
        batch_norms=tuple(name for name, module in modules.items() if isinstance(module, _BatchNorm)),
        input_shape=shape,
        output_shape=() if output is None else tuple(output.shape),
        parameter_bytes=sum(_stored(parameter) for parameter in net.parameters() if id(parameter) not in added),
        range_bytes=sum(q.stored_bytes for q in quantizers) + sum(floating_bytes(m) for m in measures),
        quantizer_macs=sum(q.macs for q in quantizers),
    )


def _up_to_next_layer(steps: Iterator[Step], modules: Mapping[str, nn.Module]) -> tuple[Step, ...]:
    found = []
    for step in steps:
        found.append(step)
        if isinstance(modules.get(step.name), WEIGHT_LAYERS):
            break
    return tuple(found)


def _layer(
    name: str, module: nn.Module, calls: CallRecord, weight: Tensor | None, chain: tuple[Step, ...] = ()
) -> LayerTrace:
    return LayerTrace(
        name=name,
        type=type(module).__name__,
        calls=calls.calls,
        input_shape=calls.input_shape,
        output_shape=calls.output_shape,
        macs=calls.macs,
        rectified=calls.rectified,
        weight_numel=0 if weight is None else weight.numel(),
        weight_bytes=0 if weight is None else _stored(weight),
        operands=_operands(calls),
        chain=chain,
    )


def _operands(record: CallRecord) -> tuple[bool, ...]:
    """Of one call; empty where calls differ or not all that costs MACs are plain products."""
    if not record.operands or record.other_products or len(record.operands) % (2 * record.calls):
        return ()
    size = len(record.operands) // record.calls
    calls = [record.operands[i * size : (i + 1) * size] for i in range(record.calls)]
    return tuple(all(flags) for flags in zip(*calls))


def _stored(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _dtype(net: nn.Module) -> torch.dtype:
    return next((p.dtype for p in net.parameters() if p.is_floating_point()), torch.float32)


def _cuda_devices(net: nn.Module) -> list[int]:
    return sorted({p.device.index or 0 for p in net.parameters() if p.device.type == 'cuda'})
