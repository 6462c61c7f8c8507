"""What quantized layers have in common: a weight quantizer and an input quantizer."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from ..quantizers import Quantizer

Layer = TypeVar('Layer', bound='QuantLayer')


class QuantLayer(nn.Module):
    """Mixin of a layer class: the layer's own parameters under their own names, plus two quantizers.

    Attributes:
        input_quantizer: Quantizes the input activation; ``nn.Identity`` where it stays in floating point.
        weight_quantizer: Quantizes the weight; ``nn.Identity`` likewise.
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
