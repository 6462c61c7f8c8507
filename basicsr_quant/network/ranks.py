"""The same values in every process of a distributed run."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def same_on_all_ranks(state: Mapping[str, Tensor]) -> None:
    """Take rank 0's values everywhere, in place: all ranks see the same images, this makes their ranges equal."""
    if dist.is_available() and dist.is_initialized():
        for tensor in state.values():
            dist.broadcast(tensor, src=0)
