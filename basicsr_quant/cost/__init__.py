"""What a network costs: MACs, BitOPs, bits of features, bytes of weights. Every number names its formula."""

from .bit_meter import BitMeter, MeasuredBits
from .bitops import Cost, LayerCost, cost_of, counted_layers
from .overlap import in_patches
from .sizing import SizedTrace, trace_at
from .total import cost

__all__ = [
    'BitMeter',
    'Cost',
    'LayerCost',
    'MeasuredBits',
    'SizedTrace',
    'cost',
    'cost_of',
    'counted_layers',
    'in_patches',
    'trace_at',
]
