"""One LMDB environment per database in a process, because lmdb refuses to open a database twice."""

from __future__ import annotations

import os
import weakref
from typing import Any

_open: weakref.WeakValueDictionary[tuple[int, int], Any] = weakref.WeakValueDictionary()


def open_shared(path: str, **options: Any) -> Any:
    """Return a read-only environment for ``path``; the one that is open already if there is one.

    It closes when the last user lets go of it. A forked worker goes on with its parent's environment, which is safe
    without locks and for reading only.

    Args:
        path: folder of the database.
        options: further arguments of ``lmdb.open``.
    """
    import lmdb

    status = os.stat(os.path.join(path, 'data.mdb'))
    key = status.st_dev, status.st_ino
    environment = _open.get(key)
    if environment is None:
        environment = lmdb.open(path, **{'readahead': False, **options, 'readonly': True, 'lock': False})
        _open[key] = environment
    return environment
