"""Tensors on integer grids where they are made: their quantizers, and how these are applied while a network runs.

Which tensors, see :mod:`.integer_tensors`; how they are named, see :mod:`.frames`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..quantizers import Quantizer
from .frames import CONTAINER, Frames, out_of_place, without_in_place
from .plan import Plan, TensorPlan

__all__ = ['CONTAINER', 'TensorQuantizers', 'add_tensor_quantizers', 'key_of']


class TensorQuantizers(Frames):
    """Applies the quantizers of tensors while the network runs."""

    def __init__(self, net: nn.Module, plan: Plan) -> None:
        super().__init__()
        self.net = net
        self.keys = {tensor.tensor: key_of(tensor.tensor) for tensor in plan.tensors}
        if any(tensor.kind in ('before', 'part') for tensor in plan.tensors):
            without_in_place(net)
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
        kwargs = out_of_place(kwargs or {})
        site = self.site(func)
        if site not in self.keys:
            return func(*args, **kwargs)
        # Out of place: an operand may be a quantizer's output, which its gradient still needs.
        return self._quantized(site, (Tensor.add if func is Tensor.add_ else func)(*args, **kwargs))

    def made_by(self, label: str, module: nn.Module, inputs: Any, output: Any) -> Any:
        return self._quantized(label, output) if label in self.keys and isinstance(output, Tensor) else None


class _Held(nn.ModuleDict):
    """Holds quantizers. A network that is an ``nn.Sequential`` calls it as its last step."""

    def forward(self, x: Tensor) -> Tensor:
        return x


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
    held = _Held()
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
