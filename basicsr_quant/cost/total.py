"""The one call that hosts make for the cost of a network."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ..network.plan import Plan
from .bitops import Cost, cost_of
from .sizing import trace_at


def cost(
    net: nn.Module,
    plan: Plan | None,
    *,
    scale: int,
    output_size: tuple[int, int] = (1280, 720),
    bits: Mapping[str, tuple[float, float]] | None = None,
) -> Cost:
    """Return what ``net`` costs for one output of ``output_size`` (width, height) under ``plan``.

    BitOPs = sum of MAC x w_bits x a_bits with 32 for floating point. The published BitOPs of CADyQ, DAQ and AdaBM do
    not follow from any formula that their authors give, so these are not comparable with them.

    Args:
        net: The network, quantized already or not; it is not changed. MACs are the same either way, ``weight_bytes``
            holds ranges only where they exist.
        plan: Bits of each layer; None for floating point.
        scale: The option file's ``scale``.
        output_size: Width and height in pixels.
        bits: Layer -> (w_bits, a_bits), means measured over images, for methods that choose bits.

    Raises:
        QuantError: if the network cannot be run on a dummy image.

    >>> cost(nn.Conv2d(3, 3, 3, padding=1), None, scale=1, output_size=(64, 32)).macs  # 81 for each pixel
    165888
    """
    return cost_of(trace_at(net, scale=scale, output_size=output_size), plan, bits)
