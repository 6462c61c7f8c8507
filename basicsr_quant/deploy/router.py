"""Sends each patch to the static graph with its bits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..quantizers import complexity
from .engines import Run


class Router:
    """Several networks of one shape as one: a patch goes to member i where i thresholds lie below its complexity.

    Complexity is AdaBM's, see :func:`~basicsr_quant.quantizers.complexity`, computed as its network computes it.

    Args:
        members: By rising complexity.
        thresholds: Rising, one fewer than members.
        bits: FAB of each member.
        batched: Whether members take several patches at once.

    Attributes:
        counts: Patches that each member was given so far.
    """

    def __init__(
        self, members: Sequence[Run], thresholds: Sequence[float], bits: Sequence[float], batched: bool = True
    ) -> None:
        self.members, self.bits, self.batched = tuple(members), tuple(bits), batched
        self.thresholds = torch.tensor(list(thresholds), dtype=torch.float32)
        self.counts = [0] * len(self.members)

    def choose(self, images: Tensor) -> Tensor:
        """The member of each image, (N,)."""
        return (complexity(images)[:, None] > self.thresholds).sum(1)

    def __call__(self, images: Tensor) -> Tensor:
        chosen = self.choose(images)
        outputs: dict[int, Tensor] = {}
        for index in chosen.unique().tolist():
            places = (chosen == index).nonzero().flatten()
            self.counts[index] += len(places)
            for group in [places] if self.batched else places.split(1):
                outputs.update(zip(group.tolist(), self.members[index](images[group])))
        return torch.stack([outputs[i] for i in range(len(images))])

    @property
    def mean_bits(self) -> float:
        """FAB of the patches so far."""
        return sum(b * n for b, n in zip(self.bits, self.counts)) / max(1, sum(self.counts))

    def summary(self) -> str:
        """What was chosen, in a line."""
        total = max(1, sum(self.counts))
        parts = [f'{100 * n / total:.0f} % at {b:.2f}' for b, n in zip(self.bits, self.counts)]
        return f'bits of patches: {", ".join(parts)}; mean {self.mean_bits:.2f}'
