"""The named stages of a calibration: what runs, how far it is, how long each took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar('Item')


class Stages:
    """Follows a calibration through its stages.

    Args:
        bar: Makes a progress bar from ``desc`` and ``total``, such as ``tqdm.tqdm``; None shows nothing.

    Attributes:
        seconds: Wall time of each stage by its name, in the order in which they began; a stage that runs again adds
            to its time.
    """

    def __init__(self, bar: Callable[..., Any] | None = None) -> None:
        self.seconds: dict[str, float] = {}
        self._bar = bar

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Callable[[], object]]:
        """Within it stage ``name`` runs; the function it gives is called after each of the ``total`` steps."""
        bar = self._bar(desc=name, total=total) if self._bar is not None else None
        start = time.perf_counter()
        try:
            yield bar.update if bar is not None else lambda: None
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start
            if bar is not None:
                bar.close()

    def over(self, name: str, items: Iterable[Item]) -> Iterator[Item]:
        """Go through ``items`` as stage ``name``, one step for each."""
        total = len(items) if hasattr(items, '__len__') else None  # type: ignore[arg-type]
        with self.stage(name, total) as step:
            for item in items:
                yield item
                step()
