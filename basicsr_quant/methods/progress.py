"""How far a training is, as a part of the network, for what changes in its course."""

from __future__ import annotations

import torch
from torch import Tensor

from ..quantizers import NetworkMeasure


class Progress(NetworkMeasure):
    """Counts optimizer steps; saved with the network.

    State: ``steps`` (int64, 0-dim).
    """

    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer('steps', torch.tensor(0))


class WarmUp(Progress):
    """0 during the first ``length`` optimizer steps, then 1: a 0-dim tensor, whatever image it is called with."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, image: Tensor) -> Tensor:
        return (self.steps >= self.length).to(torch.float32)
