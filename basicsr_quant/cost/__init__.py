"""What a network costs: MACs, BitOPs, bits of features, bytes of weights. Every number names its formula."""

from .bitops import Cost, LayerCost, cost_of
from .sizing import SizedTrace, trace_at
from .total import cost

__all__ = ['Cost', 'LayerCost', 'SizedTrace', 'cost', 'cost_of', 'trace_at']
