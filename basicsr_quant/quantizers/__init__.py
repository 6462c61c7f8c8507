"""Numbers onto grids: the fake-quantize function, quantizer modules and observers."""

from .adaptive_range import AdaptiveRange
from .bit_aware import clip_to_bits, search_omse_bound
from .bound_search import BoundSearchObserver, search_bounds
from .context import NetworkMeasure, QuantContext
from .distribution_range import DistributionRange, DistributionWeight
from .fake_quantize import align_zero_point, fake_quantize, num_steps
from .gated_range import BoundGate, GatedRange
from .image_bits import ImageBits, complexity, image_gradients
from .learned_range import LearnedRange
from .learned_step import LearnedStep
from .observers import (
    OBSERVERS,
    MinMaxObserver,
    MSEObserver,
    Observer,
    PercentileObserver,
    percentile,
    percentile_of,
    search_mse_range,
)
from .offset_range import OffsetRange
from .quantizer import Quantizer, RelativeRange
from .selected_range import SelectedRange, select
from .selected_weight import SelectedWeight
from .standardized import allocate_bits, channel_statistics, quantize_standardized, quantize_statistics
from .step_tables import DISTRIBUTIONS, step_table
from .symmetric_range import SymmetricRange
from .weight_range import MaxAbsWeight, PercentileBounds, PercentileWeight

__all__ = [
    'DISTRIBUTIONS',
    'OBSERVERS',
    'AdaptiveRange',
    'BoundGate',
    'BoundSearchObserver',
    'DistributionRange',
    'DistributionWeight',
    'GatedRange',
    'ImageBits',
    'LearnedRange',
    'LearnedStep',
    'MSEObserver',
    'MaxAbsWeight',
    'MinMaxObserver',
    'NetworkMeasure',
    'Observer',
    'OffsetRange',
    'PercentileBounds',
    'PercentileObserver',
    'PercentileWeight',
    'QuantContext',
    'Quantizer',
    'RelativeRange',
    'SelectedRange',
    'SelectedWeight',
    'SymmetricRange',
    'align_zero_point',
    'allocate_bits',
    'channel_statistics',
    'clip_to_bits',
    'complexity',
    'fake_quantize',
    'image_gradients',
    'num_steps',
    'percentile',
    'percentile_of',
    'quantize_standardized',
    'quantize_statistics',
    'search_bounds',
    'search_mse_range',
    'search_omse_bound',
    'select',
    'step_table',
]
