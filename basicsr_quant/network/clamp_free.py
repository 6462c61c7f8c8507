"""Taking clamps out of a network, and looking at it with them again."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import QuantError
from .clamps import CLAMPS, FinalClamp


def take_out(net: nn.Module, clamps: Sequence[FinalClamp]) -> nn.Module:
    """Take ``clamps`` out of ``net`` in place and return it; it stays of its own class.

    A module that only clamps becomes ``nn.Identity``. Where the call stands in a module's own ``forward``, that forward
    is recorded by ``torch.fx`` with every child as it is (so children need not be traceable, may be replaced later,
    and sizes stay free), the call is left out, and the module gets the recorded forward as its own.

    Args:
        net: An FP32 network, or the same after the surgery.
        clamps: From :func:`~basicsr_quant.network.clamps.find_final_clamps`, or from a checkpoint's plan.

    Raises:
        QuantError: if the network has no such clamp, or the forward cannot be recorded.
    """
    swaps = []
    for name in dict.fromkeys(clamp.module for clamp in clamps):
        own = [clamp for clamp in clamps if clamp.module == name]
        module = _module(net, own[0])
        if own[0].call is None:
            parent, _, child = name.rpartition('.')
            swaps.append(_Swap(net.get_submodule(parent), child, nn.Identity(), module))
        else:
            swaps.append(_Swap(module, None, types.MethodType(_without(module, own), module)))
    for swap in swaps:
        swap.put(swap.free)
    net._clamp_swaps = swaps  # type: ignore[assignment]
    return net


@dataclass(frozen=True)
class _Swap:
    """What stands in ``owner`` with and without a clamp: a child, or its forward (``child`` None, its class's own)."""

    owner: nn.Module
    child: str | None
    free: Any
    clamped: nn.Module | None = None

    def put(self, what: Any) -> None:
        if self.child is not None:
            self.owner._modules[self.child] = what
        elif what is None:
            del self.owner.__dict__['forward']
        else:
            self.owner.__dict__['forward'] = what


@contextmanager
def with_clamps(net: nn.Module) -> Iterator[None]:
    """Within it ``net`` has the clamps that :func:`take_out` took."""
    swaps: list[_Swap] = net._clamp_swaps  # type: ignore[assignment]
    for swap in swaps:
        swap.put(swap.clamped)
    try:
        yield
    finally:
        for swap in swaps:
            swap.put(swap.free)


def _module(net: nn.Module, clamp: FinalClamp) -> nn.Module:
    try:
        module = net.get_submodule(clamp.module)
    except AttributeError:
        raise QuantError(f"the plan takes a clamp out of '{clamp.module}', which this network does not have") from None
    if type(module).__name__ != clamp.type:
        raise QuantError(
            f"the plan takes a clamp out of '{clamp.module}' as a {clamp.type}, "
            f'in this network it is a {type(module).__name__}'
        )
    return module


class _OwnCode(fx.Tracer):
    """Records a module's own forward; every child is one call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _without(module: nn.Module, clamps: Sequence[FinalClamp]) -> Callable[..., Tensor]:
    """The forward of ``module`` without its calls ``clamps``, a function of the module and its arguments."""
    (code, constants), (other, _) = (_record(module, clamps, training) for training in (False, True))
    if code.code != other.code:
        raise QuantError(
            f'{_refusal(clamps[0])}: the forward differs between training and testing; make the clamp a module of '
            'its own, such as nn.Hardtanh(0, 1)'
        )
    vars(module).update(constants)
    return type(code).forward  # type: ignore[return-value]


def _record(
    module: nn.Module, clamps: Sequence[FinalClamp], training: bool
) -> tuple[fx.GraphModule, dict[str, Tensor]]:
    """The forward of ``module`` without ``clamps``, and the tensors that it makes of numbers, by the name it uses."""
    before = dict(vars(module))
    module.training = training
    try:
        graph = _OwnCode().trace(module)
        _cut(graph, clamps)
        code = fx.GraphModule(module, graph)
    except QuantError:
        raise
    except Exception as error:  # torch.fx raises whatever the forward makes of its stand-ins for tensors
        reason = ' '.join(str(error).split())[:120]
        raise QuantError(
            f'{_refusal(clamps[0])}: torch.fx cannot record that forward ({type(error).__name__}: {reason}); make '
            'the clamp a module of its own, such as nn.Hardtanh(0, 1)'
        ) from error
    finally:  # a forward may set attributes, and here it would set them to stand-ins
        constants = {k: v for k, v in vars(module).items() if k.startswith('_tensor_constant')}
        vars(module).clear()
        vars(module).update(before)
    return code, constants


def _cut(graph: fx.Graph, clamps: Sequence[FinalClamp]) -> None:
    """Leave the calls of ``clamps`` out of ``graph``."""
    nodes = [node for node in graph.nodes if node.op.startswith('call_') and _name(node) in CLAMPS]
    for clamp in clamps:
        if len(nodes) != clamp.of or _name(nodes[clamp.index]) != clamp.call:
            raise QuantError(f'{_refusal(clamp)}: its forward is another than the one that the plan was made for')
        node = nodes[clamp.index]
        operands = [*node.args, *(v for k, v in node.kwargs.items() if k in ('input', 'self', 'other'))]
        node.replace_all_uses_with(operands[clamp.operand])
        graph.erase_node(node)


def _name(node: fx.Node) -> str:
    return (node.target if isinstance(node.target, str) else getattr(node.target, '__name__', '')).strip('_')


def _refusal(clamp: FinalClamp) -> str:
    return f"quant.method: 'cfqp' cannot take out {clamp}"


@torch.no_grad()
def clamp_difference(net: nn.Module, image: Tensor, low: float, high: float) -> float:
    """Largest difference between the outputs with and without the clamps, both clamped to [low, high]."""
    free = net(image).clamp(low, high)
    with with_clamps(net):
        return float((net(image).clamp(low, high) - free).abs().max())
