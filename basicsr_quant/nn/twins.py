"""Which class stands in for which."""

from __future__ import annotations

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from .qconv import QuantConv1d, QuantConv2d, QuantConv3d
from .qconv_transpose import QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d
from .qlinear import QuantLinear
from .quant_layer import QuantLayer

_TWINS: dict[type[nn.Module], type[QuantLayer]] = {
    nn.Conv1d: QuantConv1d,
    nn.Conv2d: QuantConv2d,
    nn.Conv3d: QuantConv3d,
    nn.ConvTranspose1d: QuantConvTranspose1d,
    nn.ConvTranspose2d: QuantConvTranspose2d,
    nn.ConvTranspose3d: QuantConvTranspose3d,
    nn.Linear: QuantLinear,
}


def twin_class(layer: nn.Module) -> type[QuantLayer] | None:
    """The class that stands in for ``layer`` when it is quantized; None for what stays in floating point.

    Exact types only, since a subclass may have a forward of its own. A layer under ``torch.nn.utils.parametrize``
    (weight norm, spectral norm) has a class to itself, and gets a twin to itself; what is quantized is the weight that
    the parametrization computes.
    """
    kind = type(layer)
    if is_parametrized(layer) and kind.__base__ in _TWINS:
        return type(f'Quant{kind.__name__}', (_TWINS[kind.__base__], kind), {})
    return _TWINS.get(kind)
