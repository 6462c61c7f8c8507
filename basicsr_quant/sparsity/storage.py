"""N:M weights packed: the values that a mask keeps, and where they stand. Tensors in, tensors out, nothing is lost.

A weight of rows (out, in, ...) goes row by row: for each output channel and kernel position its input channels, of
which each group of M keeps min(N, size). The places are indices within the group of log2 M bits each, or one bit for
each weight of the row, whichever takes less (:meth:`.SparseLayer.row_place_bits`); nothing where all are kept. Values
are those of the file, in its number format; a packed file of a quantized network holds the trained weights, not codes.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..errors import QuantError
from ..network.sparsity_plan import SparseLayer, SparsityPlan
from ..nn import group_sizes, swapped

VALUES, PLACES = '.weight_mask.values', '.weight_mask.places'
"""What stands behind a layer's name instead of ``.weight`` and ``.weight_mask.ranks``."""


def pack_rows(rows: Tensor, keep: Tensor, layer: SparseLayer, group: int) -> tuple[Tensor, Tensor]:
    """Values and places of a masked weight.

    Args:
        rows: (out, in, ...), the weight; what stands at masked places is dropped.
        keep: bool, of the same shape, min(N, size) of each group.
        layer: Its plan, with the N in force.
        group: M.

    Returns:
        Values (1-D, of the weight's dtype) and places (1-D, uint8).
    """
    flat, kept = (t.movedim(1, -1).reshape(-1, layer.channels) for t in (rows, keep))
    values = flat[kept].contiguous()
    bits = layer.row_place_bits(group)
    if not bits:
        return values, torch.empty(0, dtype=torch.uint8)
    if bits == layer.channels:
        return values, torch.from_numpy(np.packbits(kept.numpy()))
    places = torch.arange(layer.channels).expand_as(flat)[kept] % group
    width = group.bit_length() - 1
    columns = (places[:, None] >> torch.arange(width - 1, -1, -1)) & 1
    return values, torch.from_numpy(np.packbits(columns.to(torch.uint8).numpy()))


def unpack_rows(
    values: Tensor, places: Tensor, shape: tuple[int, ...], layer: SparseLayer, group: int
) -> tuple[Tensor, Tensor]:
    """Rows, with zeros where they are masked, and keep, as :func:`pack_rows` got them.

    Args:
        values, places: From :func:`pack_rows`.
        shape: Of the rows.
        layer, group: As there.

    Raises:
        ValueError: if the sizes do not fit the plan.
    """
    shape = (shape[0], *shape[2:], shape[1])
    count = int(np.prod(shape[:-1]))
    in_row, bits = layer.row_kept(group), layer.row_place_bits(group)
    if values.numel() != count * in_row or places.numel() != -(-count * bits // 8):
        raise ValueError(f"'{layer.layer}' has {values.numel()} values and {places.numel()} bytes of places")
    if not bits:
        kept = torch.ones(count, layer.channels, dtype=torch.bool)
    else:
        raw = torch.from_numpy(np.unpackbits(places.numpy(), count=count * bits))
        if bits == layer.channels:
            kept = raw.reshape(count, -1).bool()
        else:
            width = group.bit_length() - 1
            weights = 1 << torch.arange(width - 1, -1, -1)
            found = (raw.reshape(count, in_row, width).to(torch.int64) * weights).sum(-1)
            sizes = group_sizes(layer.channels, group)
            starts = [group * i for i, size in enumerate(sizes) for _ in range(min(layer.kept, size))]
            kept = torch.zeros(count, layer.channels, dtype=torch.bool)
            kept.scatter_(1, found + torch.tensor(starts), True)
    flat = torch.zeros(count, layer.channels, dtype=values.dtype)
    flat[kept] = values
    rows, keep = (t.reshape(shape).movedim(-1, 1).contiguous() for t in (flat, kept))
    return rows, keep


def pack_state(state: Mapping[str, Tensor], plan: SparsityPlan) -> tuple[dict[str, Tensor], dict[str, list[int]]]:
    """A state dict with the masked weights packed.

    Args:
        state: Of a network with the masks of ``plan``, on the CPU.
        plan: With the N in force.

    Returns:
        The state dict, and the shapes of the masks by layer, which :func:`unpack_state` wants again. Layers that store
        no weight (parametrized ones) stay as they are.
    """
    packed, shapes = dict(state), {}
    for layer in plan.layers:
        weight, ranks = state.get(f'{layer.layer}.weight'), state.get(f'{layer.layer}.weight_mask.ranks')
        if weight is None or ranks is None:
            continue
        rows = swapped(weight, layer.groups) if layer.transposed else weight
        values, places = pack_rows(rows, ranks < layer.kept, layer, plan.group)
        del packed[f'{layer.layer}.weight'], packed[f'{layer.layer}.weight_mask.ranks']
        packed[f'{layer.layer}{VALUES}'], packed[f'{layer.layer}{PLACES}'] = values, places
        shapes[layer.layer] = list(ranks.shape)
    return packed, shapes


def unpack_state(
    packed: Mapping[str, Tensor], plan: SparsityPlan, shapes: Mapping[str, list[int]], path: str
) -> dict[str, Tensor]:
    """The state dict that was packed, with zeros where weights are masked.

    Ranks are 0 where a weight is kept and M - 1 elsewhere: all that the mask in force says. Training on from such a
    file ranks anew.

    Raises:
        QuantError: if ``path``, from which this was read, is damaged.
    """
    state = dict(packed)
    layers = {layer.layer: layer for layer in plan.layers}
    for name, shape in shapes.items():
        try:
            values, places = state.pop(f'{name}{VALUES}'), state.pop(f'{name}{PLACES}')
            rows, keep = unpack_rows(values, places, tuple(shape), layers[name], plan.group)
        except (KeyError, ValueError, RuntimeError) as error:
            raise QuantError(f'{path} holds packed weights that do not fit its plan: {error}') from None
        state[f'{name}.weight'] = swapped(rows, layers[name].groups) if layers[name].transposed else rows
        state[f'{name}.weight_mask.ranks'] = (~keep).to(torch.uint8) * (plan.group - 1)
    return state
