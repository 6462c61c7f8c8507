"""Quantization methods, one file per paper. Importing this package registers them."""

from . import adabm, auto, cadyq, cfqp, daq, ddtb, lsq, none, observed, odm, pams
from .base import METHODS, Method, Training, method_of, quantize, settings_of
from .calibrate import calibrate, copy_calibrated, needs_images

__all__ = [
    'METHODS',
    'Method',
    'Training',
    'adabm',
    'auto',
    'cadyq',
    'calibrate',
    'cfqp',
    'copy_calibrated',
    'daq',
    'ddtb',
    'lsq',
    'method_of',
    'needs_images',
    'none',
    'observed',
    'odm',
    'pams',
    'quantize',
    'settings_of',
]
