"""Names for the tensors of a pass: which module's forward is running, and which function it calls.

A network's forward is not rewritten. Hooks tell which module is running and a function mode sees the functions that its
forward calls; both together name a tensor: ``conv_first`` is the output of that layer, ``body.0/add.1`` the second
addition that the forward of ``body.0`` calls itself, ``act#2/relu.0`` one of the third call of ``act``. The names do
not depend on the image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..quantizers import Quantizer

CONTAINER = 'tensor_quantizers'
"""Name of the network's module that holds the quantizers of tensors."""
ADDITIONS = {Tensor.add, Tensor.add_, torch.add}  # + and += are the first two


class Frames(TorchFunctionMode):
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
        kind = kind_of(func)
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


def kind_of(func: Callable[..., Any]) -> str:
    """Name of a function without what tells its forms apart: ``add`` for ``+``, ``+=`` and ``torch.add``."""
    return 'add' if func in ADDITIONS else getattr(func, '__name__', str(func)).strip('_')


def out_of_place(named: dict[str, Any]) -> dict[str, Any]:
    """The named arguments of a function without ``inplace=True``."""
    return {**named, 'inplace': False} if named.get('inplace') else named


def without_in_place(net: nn.Module) -> None:
    """Make the activation functions of ``net`` leave their inputs as they are: a quantizer's gradient needs them."""
    for module in net.modules():
        if getattr(module, 'inplace', False) is True:
            module.inplace = False  # type: ignore[assignment]
