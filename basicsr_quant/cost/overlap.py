"""What patch-wise inference adds to a network's cost."""

from __future__ import annotations

from dataclasses import replace

from ..network.patches import overlap_factor
from .bitops import Cost
from .sizing import SizedTrace

PATCH_NOTE = (
    'images ran in patches of {size}x{size} every {stride} pixels, bits are means over patches; what overlapping '
    'pixels cost twice is counted in bitops_with_overlap alone'
)


def in_patches(cost: Cost, sized: SizedTrace, size: int, stride: int) -> Cost:
    """``cost`` with ``bitops_with_overlap`` and a note.

    Args:
        cost: From :func:`cost_of` on ``sized``.
        sized: The network's trace.
        size, stride: Of the patches, in pixels of the input.
    """
    twice = None if sized.input_size is None else overlap_factor(*sized.input_size, size, stride)
    return replace(
        cost,
        bitops_with_overlap=None if twice is None else round(cost.bitops * twice),
        notes=(*cost.notes, PATCH_NOTE.format(size=size, stride=stride)),
    )
