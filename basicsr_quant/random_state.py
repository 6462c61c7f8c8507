"""The random states of the process (Python, NumPy, torch), saved as plain data and put back to the bit."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """Return the random states as lists, numbers and tensors, which ``torch.load(weights_only=True)`` reads.

    Keys: ``python``, ``numpy``, ``torch`` and, once CUDA is in use, ``cuda`` (one entry for the current device).
    """
    version, internal, gauss = random.getstate()
    legacy: Any = np.random.get_state()
    state: dict[str, Any] = {
        'python': [version, list(internal), gauss],
        'numpy': [legacy[0], legacy[1].tolist(), int(legacy[2]), int(legacy[3]), float(legacy[4])],
        'torch': torch.get_rng_state(),
    }
    if torch.cuda.is_initialized():
        state['cuda'] = torch.cuda.get_rng_state()
    return state


def restore(state: dict[str, Any]) -> None:
    """Put back what ``capture`` returned."""
    version, internal, gauss = state['python']
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state['numpy']
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state['torch'])
    if 'cuda' in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state['cuda'])


@contextmanager
def preserved() -> Iterator[None]:
    """Leave the CPU random states as they were, whatever the block draws."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Run the block with random states that are a function of ``key`` alone, and leave them as they were.

    Only CPU generators are touched: ``torch.manual_seed`` would reset those of the GPU as well.
    """
    words = np.random.SeedSequence(key).generate_state(6)
    with preserved():
        random.seed(int(words[0]) << 32 | int(words[1]))
        np.random.seed(words[2:4])
        torch.default_generator.manual_seed(int(words[4]) << 31 | int(words[5]) >> 1)
        yield
