"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from ..errors import QuantError


def check_writable(folder: Path, said: str) -> None:
    """Refuse a folder that cannot be made or written, before any work; nothing is made.

    Args:
        folder: Need not exist yet.
        said: What begins the sentence, as the user gave it.

    Raises:
        QuantError: naming the folder that is there.
    """
    there = next(known for known in (folder.absolute(), *folder.absolute().parents) if known.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise QuantError(f'{said}: {there} cannot be written: {error.strerror}') from None


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        QuantError: if the folder cannot be written or the disk is full.
    """
    target = Path(path)
    temporary = target.with_name(f'.{target.name}.{os.getpid()}.tmp')
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, 'wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except OSError as error:
        raise QuantError(f'{target} cannot be written: {error.strerror or error}') from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
