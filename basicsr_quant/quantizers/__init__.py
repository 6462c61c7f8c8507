"""Numbers onto grids: the fake-quantize function, quantizer modules and observers."""

from .context import QuantContext
from .distribution_range import DistributionRange, DistributionWeight
from .fake_quantize import align_zero_point, fake_quantize, num_steps
from .learned_range import LearnedRange
from .learned_step import LearnedStep
from .observers import OBSERVERS, MinMaxObserver, MSEObserver, Observer, percentile, search_mse_range
from .offset_range import OffsetRange
from .quantizer import Quantizer, RelativeRange
from .standardized import allocate_bits, channel_statistics, quantize_standardized, quantize_statistics
from .step_tables import DISTRIBUTIONS, step_table
from .symmetric_range import SymmetricRange
from .weight_range import MaxAbsWeight, PercentileWeight

__all__ = [
    'DISTRIBUTIONS',
    'OBSERVERS',
    'DistributionRange',
    'DistributionWeight',
    'LearnedRange',
    'LearnedStep',
    'MSEObserver',
    'MaxAbsWeight',
    'MinMaxObserver',
    'Observer',
    'OffsetRange',
    'PercentileWeight',
    'QuantContext',
    'Quantizer',
    'RelativeRange',
    'SymmetricRange',
    'align_zero_point',
    'allocate_bits',
    'channel_statistics',
    'fake_quantize',
    'num_steps',
    'percentile',
    'quantize_standardized',
    'quantize_statistics',
    'search_mse_range',
    'step_table',
]
