"""MMagic's face: registered components. A config names this package and uses them by their types::

    custom_imports = dict(imports=['basicsr_quant.mmagic'], allow_failed_imports=False)
    model = dict(generator=dict(_delete_=True, type='QuantizedNetwork', generator=dict(type='EDSRNet', ...),
                                quant=dict(method='odm', w_bits=4, a_bits=4)))
    optim_wrapper = dict(constructor='QuantizedOptimWrapperConstructor')
    custom_hooks = [dict(type='RangeCalibrationHook'), dict(type='QuantizationReportHook')]

Everything that a method does comes from :mod:`basicsr_quant.methods`; nothing here knows one of them.
"""

from . import messages
from .calibration import CalibrationImages
from .ema import QuantizedEMAHook
from .generator import QuantizedNetwork
from .hooks import RangeCalibrationHook
from .optimizer import QuantizedOptimWrapperConstructor
from .report import QuantizationReportHook
from .visualization import QuantizationVisualizationHook

__all__ = [
    'CalibrationImages',
    'QuantizationReportHook',
    'QuantizationVisualizationHook',
    'QuantizedEMAHook',
    'QuantizedNetwork',
    'QuantizedOptimWrapperConstructor',
    'RangeCalibrationHook',
]

messages.install()
