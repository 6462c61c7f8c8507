"""Matrix products inside a module's own forward (attention), with quantized operands."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .quant_layer import QuantLayer

PRODUCTS = frozenset({torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.bmm, torch.Tensor.__matmul__})
"""The functions whose two operands can be quantized; ``a @ b`` is one of them. Fused attention is not."""


def operands_of(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
    """The two operands of a call seen by a ``TorchFunctionMode``; None where it is not one of :data:`PRODUCTS`."""
    if func not in PRODUCTS:
        return None
    given = [*args, *(kwargs[key] for key in ('input', 'self', 'other', 'mat2') if key in kwargs)]
    return given[0], given[1]


class QuantOperand(QuantLayer):
    """One operand of a product: a layer without a weight, whose input quantizer is all it has."""

    def __init__(self) -> None:
        super().__init__()
        self.input_quantizer = nn.Identity()
        self.weight_quantizer = nn.Identity()
        self.weight_mask = None

    def forward(self, x: Tensor) -> Tensor:
        return self.input_quantizer(x)  # type: ignore[no-any-return]


class QuantProduct(nn.Module):
    """``Q_l(a) Q_r(b)``."""

    def __init__(self) -> None:
        super().__init__()
        self.left = QuantOperand()
        self.right = QuantOperand()


class _Quantize(TorchFunctionMode):
    """Within it the products that run, in their order, take quantized operands."""

    def __init__(self, products: nn.ModuleList) -> None:
        super().__init__()
        self._products = iter(products)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = operands_of(func, args, kwargs)
        if operands is None:
            return func(*args, **kwargs)
        product: Any = next(self._products)
        return torch.matmul(product.left(operands[0]), product.right(operands[1]))


class QuantProducts(nn.Module):
    """Mixin of a class whose forward multiplies matrices: the class's own forward, with quantized operands.

    Attributes:
        quant_products: One :class:`QuantProduct` for each product, in the order in which the forward runs them. A
            module that is called several times in a pass uses them in each call.
    """

    quant_products: nn.ModuleList

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with _Quantize(self.quant_products):
            return super().forward(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self).__mro__[2],), self.__dict__


def quantized_products(module: nn.Module, count: int) -> QuantProducts:
    """Return a twin of ``module``, of a subclass of its class, that shares all it has; ``count`` products are run.

    Until quantizers are set it computes exactly what ``module`` does.
    """
    twin = _blank(type(module))
    twin.__dict__.update(module.__dict__)
    twin.__dict__['_modules'] = dict(module.__dict__['_modules'])  # the twin gains a member, the original must not
    twin.quant_products = nn.ModuleList(QuantProduct() for _ in range(count))
    return twin


@functools.cache
def _subclass(base: type[nn.Module]) -> type[QuantProducts]:
    return type(f'Quant{base.__name__}', (QuantProducts, base), {})


def _blank(base: Any) -> QuantProducts:
    cls = _subclass(base)
    return cls.__new__(cls)
