"""Mistakes of users as one sentence, also where MMEngine's tools would print a traceback."""

from __future__ import annotations

import sys
from types import TracebackType

from ..errors import QuantError


def install() -> None:
    """Let an uncaught :class:`QuantError` end the process with its sentence alone; others end it as before.

    MMEngine's tools catch nothing, and their exit code stays Python's 1. A second call changes nothing.
    """
    before = sys.excepthook
    if getattr(before, 'of_basicsr_quant', False):
        return

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, QuantError):
            print(f'basicsr_quant: error: {error}', file=sys.stderr)  # noqa: T201
        else:
            before(kind, error, trace)

    show.of_basicsr_quant = True  # type: ignore[attr-defined]
    sys.excepthook = show
