"""Losses of a method's own; see :mod:`..network.extra_loss`, where sparsity finds them too."""

from ..network.extra_loss import scale_extra_losses, with_loss

__all__ = ['scale_extra_losses', 'with_loss']
