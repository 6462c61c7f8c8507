"""The plan of N:M sparsity: which layer keeps N of M weights. Plain data, made before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from math import ceil
from typing import Any

from ..nn import density, group_sizes


@dataclass(frozen=True)
class SparseLayer:
    """One layer with a mask.

    Args:
        layer: Name of the module.
        channels: Input channels of its weight (dimension 1, those of one group of a grouped convolution).
        macs: Multiply-accumulates of the dense layer on the image that the network was traced with.
        kept: N.
        transposed: Whether the weight is stored as (in, out / groups, ...), as transposed convolutions do.
        groups: Of the convolution.
    """

    layer: str
    channels: int
    macs: int
    kept: int
    transposed: bool = False
    groups: int = 1

    def density(self, group: int, kept: int | None = None) -> float:
        """Share of the weights that are kept, with another N if one is given."""
        return density(self.channels, group, self.kept if kept is None else kept)

    def row_kept(self, group: int) -> int:
        """How many weights are kept of one row: one output channel, one kernel position, all input channels."""
        return sum(min(self.kept, size) for size in group_sizes(self.channels, group))

    def row_place_bits(self, group: int) -> int:
        """Bits that say which weights of a row are kept: an index of log2 M bits for each, or one bit for each weight
        of the row, whichever is less; none where all are kept."""
        kept = self.row_kept(group)
        return 0 if kept == self.channels else min(kept * (group.bit_length() - 1), self.channels)

    def stored_bytes(self, group: int, weights: int, bits: float) -> int:
        """Bytes of the layer's weight as values and places, each rounded up to whole bytes.

        Args:
            group: M.
            weights: Number of the dense weights.
            bits: Of a value.
        """
        rows = weights // self.channels
        return ceil(rows * self.row_kept(group) * bits / 8) + ceil(rows * self.row_place_bits(group) / 8)


@dataclass(frozen=True)
class SparsityPlan:
    """What ``sparsity:`` does to a network.

    Args:
        method: Name of the method.
        group: M.
        budget: Share of the MACs of the masked layers that may remain.
        layers: The layers with masks, in the order in which the network registers them.
        dense: Layers without, and why.
        options: Of the method.
    """

    method: str
    group: int
    budget: float
    layers: tuple[SparseLayer, ...]
    dense: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Any:
        return iter(self.layers)

    def share(self, kept: int | None = None) -> float:
        """MACs that remain of those of the masked layers, with ``kept`` of M in every layer if given."""
        return sum(x.macs * x.density(self.group, kept) for x in self.layers) / sum(x.macs for x in self.layers)

    @property
    def engines(self) -> str:
        """What an engine can use of these masks, in one sentence."""
        fitting = sum(self.group == 4 and layer.kept <= 2 for layer in self.layers)
        if fitting:
            return (
                f'engines: {fitting} of {len(self.layers)} masked layers fit the 2:4 that GPUs from NVIDIA Ampere on '
                'have kernels for; no CPU engine runs N:M, there masks save storage alone'
            )
        return (
            'engines: none has kernels for these masks (GPUs run 2:4 of M: 4 alone, CPUs no N:M), so the network runs '
            'at the cost of the dense one, and masks save storage alone'
        )

    def to_plain(self) -> dict[str, Any]:
        """Dictionaries, lists, strings and numbers only."""
        plain = {f.name: getattr(self, f.name) for f in fields(self)}
        layers = [asdict(layer) for layer in self.layers]
        return {**plain, 'layers': layers, 'dense': dict(self.dense), 'options': dict(self.options)}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> SparsityPlan:
        known = {f.name for f in fields(cls)}
        values = {key: value for key, value in plain.items() if key in known}
        return cls(**{**values, 'layers': tuple(SparseLayer(**layer) for layer in plain['layers'])})
