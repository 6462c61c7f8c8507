"""Numbers onto grids: the fake-quantize function, quantizer modules and observers."""

from .context import QuantContext
from .fake_quantize import align_zero_point, fake_quantize, num_steps
from .learned_range import LearnedRange
from .learned_step import LearnedStep
from .observers import OBSERVERS, MSEObserver, Observer, percentile, search_mse_range
from .offset_range import OffsetRange
from .quantizer import Quantizer, RelativeRange
from .symmetric_range import SymmetricRange
from .weight_range import MaxAbsWeight, PercentileWeight

__all__ = [
    'OBSERVERS',
    'LearnedRange',
    'LearnedStep',
    'MSEObserver',
    'MaxAbsWeight',
    'Observer',
    'OffsetRange',
    'PercentileWeight',
    'QuantContext',
    'Quantizer',
    'RelativeRange',
    'SymmetricRange',
    'align_zero_point',
    'fake_quantize',
    'num_steps',
    'percentile',
    'search_mse_range',
]
