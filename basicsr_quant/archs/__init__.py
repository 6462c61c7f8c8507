"""BasicSR's face: registered architectures."""

from .quantized_arch import QuantizedNetwork

__all__ = ['QuantizedNetwork']
