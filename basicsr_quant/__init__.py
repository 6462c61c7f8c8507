"""Quantization and sparsity for image-restoration networks, as a plug-in of BasicSR and MMagic."""

from .errors import QuantError
from .version import __version__


def enable() -> None:
    """Make BasicSR understand ``quant:``; call it once, before the host's ``train_pipeline`` or ``test_pipeline``.

    Mends the host where today's libraries break it, registers this package's components and wraps the host's
    ``parse_options``. Option files without ``quant:`` run as before.

    Raises:
        QuantError: if BasicSR is not installed; the message says how to get it.
    """
    from . import compat

    compat.apply()
    from . import seam

    seam.install()


__all__ = ['QuantError', '__version__', 'enable']
