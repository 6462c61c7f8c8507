"""What quantized layers have in common: a mask of the weight, a weight quantizer and an input quantizer."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..quantizers import Quantizer
from .weight_mask import WeightMask

Layer = TypeVar('Layer', bound='QuantLayer')


class QuantLayer(nn.Module):
    """Mixin of a layer class: the layer's own parameters under their own names, plus two quantizers and a mask.

    Attributes:
        input_quantizer: Quantizes the input activation; ``nn.Identity`` where it stays in floating point.
        weight_quantizer: Quantizes :func:`weight_rows`; ``nn.Identity`` likewise.
        weight_mask: Makes the weight sparse before it is quantized; None for a dense weight.
    """

    input_quantizer: Quantizer | nn.Identity
    weight_quantizer: Quantizer | nn.Identity
    weight_mask: WeightMask | None

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
        twin.register_module('weight_mask', None)
        return twin

    def quantizers(self) -> list[Quantizer]:
        """The quantizers in force, the input's first."""
        return [q for q in (self.input_quantizer, self.weight_quantizer) if isinstance(q, Quantizer)]

    def quantized_weight(self) -> Tensor:
        """Q_w(mask W) in the weight's own shape; exactly 0 where the mask is, also on grids without zero.

        Masked places get the straight-through gradient of the weight and give none to the range.
        """
        rows = weight_rows(self)
        quantized = self.weight_quantizer(rows)
        if self.weight_mask is not None:
            quantized = torch.where(self.weight_mask.keep(), quantized, rows)
        return swapped(quantized, self.groups) if getattr(self, 'transposed', False) else quantized  # type: ignore

    @torch.no_grad()
    def bake_mask(self) -> Tensor:
        """Put the zeros into the weight and drop the mask; returns which of :func:`weight_rows` were kept."""
        assert self.weight_mask is not None
        keep, rows = self.weight_mask.keep(), weight_rows(self)
        own = swapped(rows, self.groups) if getattr(self, 'transposed', False) else rows  # type: ignore
        self.weight.copy_(own)  # type: ignore[operator]
        self.weight_mask = None
        return keep


def weight_rows(layer: Any) -> Tensor:
    """The weight of a layer, quantized or not, as its quantizer sees it: one row for each output channel, with zeros
    where it is masked (statistics of ranges count these)."""
    rows, mask = dense_rows(layer), getattr(layer, 'weight_mask', None)
    return rows if mask is None else mask(rows)  # type: ignore[no-any-return]


def dense_rows(layer: Any) -> Tensor:
    """The weight without its mask, one row for each output channel.

    That is the weight itself, (out, in / groups, ...), but for transposed convolutions, whose weight is
    (in, out / groups, ...).
    """
    return swapped(layer.weight, layer.groups) if getattr(layer, 'transposed', False) else layer.weight


def stores_weight(layer: nn.Module) -> bool:
    """Whether the weight is a parameter: weight norm and other parametrizations compute it from others."""
    return 'weight' in layer._parameters


def swapped(weight: Tensor, groups: int) -> Tensor:
    """(groups x A, B, ...) to (groups x B, A, ...)."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
