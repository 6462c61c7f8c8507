"""BasicSR's face of the surgery: any registered architecture, quantized, still of its own class."""

from __future__ import annotations

from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from ..methods import quantize
from ..network.plan import Plan


@ARCH_REGISTRY.register()
def QuantizedNetwork(base_type: str, plan: Plan, **network: Any) -> nn.Module:
    """Build ``base_type`` with its own options and apply ``plan``.

    The options stay flat in ``network_g`` (host models read some of them there, such as ``window_size``), so that the
    network, its EMA copy and its distributed wrapper are all built by the host from the same entry.

    Args:
        base_type: Registered architecture.
        plan: The plan, made before the host builds anything.
        network: Options of the architecture.
    """
    return quantize(ARCH_REGISTRY.get(base_type)(**network), plan)
