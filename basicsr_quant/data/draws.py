"""Training data whose order and augmentation are a function of seed, epoch and position, for any number of workers."""

from __future__ import annotations

import pickle
from typing import Any

from torch.utils.data import Dataset

from ..random_state import seeded


class Draw(int):
    """A data-set index that also knows which draw of the training it is.

    It is an ``int`` to every data set, and travels to worker processes.

    Attributes:
        epoch: number of the pass over the data, from 0.
        position: number of the draw in that pass over all ranks, from 0.
    """

    epoch: int
    position: int

    def __new__(cls, index: int, epoch: int, position: int) -> Draw:
        draw = super().__new__(cls, index)
        draw.epoch, draw.position = epoch, position
        return draw

    def __reduce__(self) -> tuple[type[Draw], tuple[int, int, int]]:
        return Draw, (int(self), self.epoch, self.position)


class SeededDataset(Dataset):  # type: ignore[type-arg]
    """A data set that seeds Python, NumPy and torch from (seed, epoch, position) around each fetch.

    A plain index (not a ``Draw``) is fetched with the random states as they are. Everything else is the inner data
    set's: ``len``, ``opt`` and other attributes.
    """

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, index: int) -> Any:
        if not isinstance(index, Draw):
            return self.dataset[index]
        with seeded(self.seed, index.epoch, index.position):
            return self.dataset[int(index)]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        # Special methods (__getitems__) must not lead past the seeding, nor pickling into an object half made.
        if name.startswith('__') or 'dataset' not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __reduce__(self) -> tuple[Any, tuple[bytes, int]]:
        return _rebuild, (pickle.dumps(self.dataset), self.seed)


def _rebuild(pickled: bytes, seed: int) -> SeededDataset:
    """Unpickle in a worker that was spawned, where the host is not mended yet and could not be imported."""
    from ..compat import apply, has_host

    if has_host():
        apply()
    return SeededDataset(pickle.loads(pickled), seed)  # noqa: S301  (bytes of this very process)
