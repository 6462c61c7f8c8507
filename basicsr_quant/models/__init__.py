"""BasicSR's face: registered models."""

from .quantized_model import QuantizedModel, QuantizedModelMixin

__all__ = ['QuantizedModel', 'QuantizedModelMixin']
