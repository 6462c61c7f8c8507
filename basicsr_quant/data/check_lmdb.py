"""Check an image database in BasicSR's layout: ``<name>.lmdb/`` with ``data.mdb`` and ``meta_info.txt``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

from ..errors import QuantError
from .lmdb_env import open_shared

_SHAPE = re.compile(r'\((\d+),\s*(\d+),\s*\d+\)')
_READ_ALL = """
import sys, lmdb
with lmdb.open(sys.argv[1], readonly=True, lock=False) as env, env.begin(buffers=True) as txn:
    for key, value in txn.cursor():
        bytes(value)
"""


def read_keys(root: str, where: str) -> dict[str, tuple[int, int] | None]:
    """Check a database and return its keys with the (height, width) that ``meta_info.txt`` gives, or None.

    Image data are not read, so this takes the same short time for any size.

    Args:
        root: folder of the database.
        where: its path in the option file, for the message.

    Raises:
        QuantError: the folder is no database, a key of ``meta_info.txt`` is not in it, or it is cut short.
    """
    if not root.endswith('.lmdb'):
        raise QuantError(f'{where} {root} must end in .lmdb, because io_backend.type is lmdb')
    for name in ('data.mdb', 'meta_info.txt'):
        if not os.path.isfile(os.path.join(root, name)):
            raise QuantError(f'{where} {root} is no BasicSR database: it lacks {name}')
    sizes = _meta_info(root, where)
    import lmdb
    try:
        environment = open_shared(root)
        _check_length(environment, root, where)
        with environment.begin(buffers=True) as transaction:
            missing = [key for key in sizes if transaction.get(key.encode()) is None]
    except lmdb.Error as error:
        raise QuantError(f'{where} {root}: data.mdb is damaged or cut short ({error})') from None
    if missing:
        raise QuantError(f"{where} {root} lacks the key '{missing[0]}' that its meta_info.txt names ({len(missing)} of "
                         f'{len(sizes)} keys are missing)')
    return sizes


def _meta_info(root: str, where: str) -> dict[str, tuple[int, int] | None]:
    """Keys as the host reads them (up to the first dot of a line), and sizes from lines `name.png (h,w,c) level`."""
    try:
        with open(os.path.join(root, 'meta_info.txt')) as file:
            lines = [line for line in file if line.strip()]
    except UnicodeDecodeError:
        raise QuantError(f'{where} {root}: meta_info.txt is not text') from None
    if not lines:
        raise QuantError(f'{where} {root}: meta_info.txt is empty')
    shapes = {line.split('.')[0]: _SHAPE.search(line) for line in lines}
    return {key: (int(shape[1]), int(shape[2])) if shape else None for key, shape in shapes.items()}


def _check_length(environment: Any, root: str, where: str) -> None:
    """Compare the file's length with its header: to touch a page past its end kills the process (SIGBUS).

    A healthy file may lack pages at its end that nothing uses, so a short one is read whole in another process.
    """
    size = os.path.getsize(os.path.join(root, 'data.mdb'))
    needed = (environment.info()['last_pgno'] + 1) * environment.stat()['psize']
    if size >= needed:
        return
    done = subprocess.run([sys.executable, '-c', _READ_ALL, root], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    if done.returncode:
        raise QuantError(f'{where} {root}: data.mdb is cut short: it has {size} of {needed} bytes')
