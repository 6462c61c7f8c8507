"""The one exception that users are meant to read."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QuantError(ValueError):
    """A mistake in what the user gave: an option, a file, a command line.

    The message is one sentence for the screen. It names the option or file, says what was given and what is
    allowed. The command prints it without a traceback and exits with code 2.
    """


def nearest(name: object, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the known name closest to ``name``, or ``""``.

    >>> nearest('odmm', ['odm', 'pams'])
    " (did you mean 'odm'?)"
    >>> nearest('xyz', ['odm', 'pams'])
    ''
    """
    close = difflib.get_close_matches(str(name), list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ''
