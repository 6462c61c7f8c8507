"""BasicSR's face of filter pruning: any registered architecture with narrower layers, still of its own class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY
from torch import nn

from ..errors import QuantError
from ..sparsity.widths import set_widths


@ARCH_REGISTRY.register()
def PrunedNetwork(base: Mapping[str, Any], widths: Mapping[str, int]) -> nn.Module:
    """Build ``base`` and give its convolutions the widths that ``basicsr prune`` left them.

    Tensor names are those of the base, so a checkpoint of it loads strictly where the shapes agree.

    Args:
        base: ``network_g`` as it was: ``type`` and the options of a registered architecture.
        widths: Convolution -> number of its filters. Those not named keep theirs; what reads them follows.

    Raises:
        QuantError: for widths that the network cannot have.
    """
    options = dict(base)
    if 'type' not in options:
        raise QuantError('network_g.base.type is missing; it names the architecture that was pruned')
    return set_widths(ARCH_REGISTRY.get(options.pop('type'))(**options), widths)
