"""The one place that makes BasicSR 1.4.2 import and run on today's torch, torchvision, Python and without a GPU.

A mend is a function of no arguments whose docstring says what it changes and why. It looks first whether the fault is
there and returns True when it changed something: on a host that works nothing is touched, and a second call of any
mend returns False.
"""

from __future__ import annotations

import importlib
import importlib.util

from ..errors import QuantError

INSTALL = (
    'pip install torch==2.13.0 torchvision==0.28.0 numpy Cython setuptools wheel',
    'pip install --no-build-isolation basicsr==1.4.2',
)

# The modules that hold mends, in this order; the host can be imported after the first.
GROUPS = ('imports', 'devices', 'files', 'loading', 'training', 'resume', 'degradations')
_applied: list[str] = []
_done = False


def has_host() -> bool:
    """Tell whether BasicSR is installed, without importing it."""
    return importlib.util.find_spec('basicsr') is not None


def missing_host() -> QuantError:
    """Return the error for a machine without BasicSR; it gives the two commands that install it."""
    commands = '\n'.join(f'  {line}' for line in INSTALL)
    return QuantError(f'BasicSR is not installed; these two commands install it (Python 3.10 to 3.12):\n{commands}')


def apply() -> list[str]:
    """Mend what stands in the way of BasicSR here; call it before the first ``import basicsr``.

    Returns:
        The names of the mends that were needed on this machine. Calling again changes nothing and returns the same.

    Raises:
        QuantError: BasicSR is not installed; the message gives the two commands that install it.
    """
    global _done
    if _done:
        return list(_applied)
    if not has_host():
        raise missing_host()
    for name in GROUPS:
        _mend(name)
        importlib.import_module('basicsr')
    _done = True
    return list(_applied)


def _mend(name: str) -> None:
    module = importlib.import_module(f'{__name__}.{name}')
    for mend in module.MENDS:
        if mend():
            _applied.append(f'{name}.{mend.__name__}')


__all__ = ['GROUPS', 'INSTALL', 'apply', 'has_host', 'missing_host']
