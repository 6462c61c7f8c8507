"""Mends of how the host loads images."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader

from ..data.lmdb_env import open_shared
from .patch import mark, marked


def shared_databases() -> bool:
    """Share one LMDB environment per database: lmdb refuses a second one, which the host opens for each data set."""
    from basicsr.utils.file_client import LmdbBackend

    host = LmdbBackend.__init__
    if marked(host) or not _refuses_twice():
        return False

    @mark
    @functools.wraps(host)
    def init(self: Any, db_paths: Any, client_keys: Any = 'default', readonly: bool = True, lock: bool = False,
             **options: Any) -> None:
        if lock or not readonly:
            host(self, db_paths, client_keys, readonly, lock, **options)
            return
        host(self, [], [])
        self.db_paths = [str(path) for path in (db_paths if isinstance(db_paths, list) else [db_paths])]
        keys = [client_keys] if isinstance(client_keys, str) else client_keys
        for key, path in zip(keys, self.db_paths):
            self._client[key] = open_shared(path, **options)

    LmdbBackend.__init__ = init
    return True


def _refuses_twice() -> bool:
    import lmdb

    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'probe.lmdb')
        first = lmdb.open(path, map_size=1 << 16)
        try:
            lmdb.open(path, map_size=1 << 16).close()
            return False
        except lmdb.Error:
            return True
        finally:
            first.close()


def prefetch_without_workers() -> bool:
    """Fetch in the main thread when ``prefetch_mode: cpu`` has no workers: the host's thread then draws from the
    random states while training does, in an order that differs from run to run."""
    from basicsr.data.prefetch_dataloader import PrefetchDataLoader

    host = PrefetchDataLoader.__iter__
    if marked(host):
        return False

    @mark
    @functools.wraps(host)
    def iterate(self: Any) -> Iterator[Any]:
        return host(self) if self.num_workers else DataLoader.__iter__(self)

    PrefetchDataLoader.__iter__ = iterate
    return True


MENDS = (shared_databases, prefetch_without_workers)
