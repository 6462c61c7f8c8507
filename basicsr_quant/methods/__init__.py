"""Quantization methods, one file per paper. Importing this package registers them."""

from . import adabm, auto, cadyq, daq, lsq, none, observed, odm, pams
from .base import METHODS, Method, Training, method_of, quantize, settings_of

__all__ = [
    'METHODS',
    'Method',
    'Training',
    'adabm',
    'auto',
    'cadyq',
    'daq',
    'lsq',
    'method_of',
    'none',
    'observed',
    'odm',
    'pams',
    'quantize',
    'settings_of',
]
