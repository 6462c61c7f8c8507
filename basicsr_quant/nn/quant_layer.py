"""What quantized layers have in common: a weight quantizer and an input quantizer."""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor, nn

from ..quantizers import Quantizer

Layer = TypeVar('Layer', bound='QuantLayer')


class QuantLayer(nn.Module):
    """Mixin of a layer class: the layer's own parameters under their own names, plus two quantizers.

    Attributes:
        input_quantizer: Quantizes the input activation; ``nn.Identity`` where it stays in floating point.
        weight_quantizer: Quantizes :func:`weight_rows`; ``nn.Identity`` likewise.
    """

    input_quantizer: Quantizer | nn.Identity
    weight_quantizer: Quantizer | nn.Identity

    @classmethod
    def from_float(cls: type[Layer], layer: nn.Module) -> Layer:
        """Return a quantized twin of ``layer`` that shares its parameters, buffers and hooks.

        Until quantizers are set it computes exactly what ``layer`` does.
        """
        twin = cls.__new__(cls)
        twin.__dict__.update(layer.__dict__)
        for members in ('_parameters', '_buffers', '_modules'):  # the twin gains members, the original must not
            twin.__dict__[members] = dict(layer.__dict__[members])
        twin.input_quantizer = nn.Identity()
        twin.weight_quantizer = nn.Identity()
        return twin

    def quantizers(self) -> list[Quantizer]:
        """The quantizers in force, the input's first."""
        return [q for q in (self.input_quantizer, self.weight_quantizer) if isinstance(q, Quantizer)]

    def quantized_weight(self) -> Tensor:
        """Q_w(W) in the weight's own shape."""
        rows = self.weight_quantizer(weight_rows(self))
        return _swapped(rows, self.groups) if getattr(self, 'transposed', False) else rows  # type: ignore


def weight_rows(layer: Any) -> Tensor:
    """The weight of a layer, quantized or not, as its quantizer sees it: one row for each output channel.

    That is the weight itself, (out, in / groups, ...), but for transposed convolutions, whose weight is
    (in, out / groups, ...).
    """
    return _swapped(layer.weight, layer.groups) if getattr(layer, 'transposed', False) else layer.weight


def stores_weight(layer: nn.Module) -> bool:
    """Whether the weight is a parameter: weight norm and other parametrizations compute it from others."""
    return 'weight' in layer._parameters


def _swapped(weight: Tensor, groups: int) -> Tensor:
    """(groups x A, B, ...) to (groups x B, A, ...)."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
