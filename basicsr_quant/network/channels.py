"""Which part of a weight belongs to which channel: convolutions of any groups, transposed or not, and linear layers.

A weight is (out, in / groups, ...) and (in, out / groups, ...) where it is transposed; a linear layer's is (out, in).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def layout(layer: nn.Module) -> tuple[int, bool]:
    """Groups of a layer, and whether its weight is transposed."""
    return int(getattr(layer, 'groups', 1)), bool(getattr(layer, 'transposed', False))


def output_channels(values: Tensor, weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """Shape one value per output channel so that it broadcasts against ``weight``."""
    return _rows(values, weight) if not transposed else _columns(values, weight, groups)


def input_channels(values: Tensor, weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """Shape one value per input channel so that it broadcasts against ``weight``."""
    return _columns(values, weight, groups) if not transposed else _rows(values, weight)


def output_range(weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """The greatest magnitude in the weight of each output channel."""
    return _column_range(weight, groups) if transposed else _row_range(weight)


def input_range(weight: Tensor, groups: int = 1, transposed: bool = False) -> Tensor:
    """The greatest magnitude among the weights that each input channel is multiplied with."""
    return _row_range(weight) if transposed else _column_range(weight, groups)


def _rows(values: Tensor, weight: Tensor) -> Tensor:
    return values.reshape(-1, *(1,) * (weight.dim() - 1))


def _columns(values: Tensor, weight: Tensor, groups: int) -> Tensor:
    # Group g holds the g-th part of the channels of dimension 1 for the g-th part of the rows.
    each = values.reshape(groups, -1).repeat_interleave(weight.shape[0] // groups, dim=0)
    return each.reshape(weight.shape[0], weight.shape[1], *(1,) * (weight.dim() - 2))


def _row_range(weight: Tensor) -> Tensor:
    return weight.detach().abs().flatten(1).amax(dim=1)


def _column_range(weight: Tensor, groups: int) -> Tensor:
    split = weight.detach().abs().reshape(groups, -1, *weight.shape[1:])  # (groups, rows of a group, channels, ...)
    return torch.amax(split.flatten(3) if split.dim() > 3 else split[..., None], dim=(1, 3)).reshape(-1)
