"""Which tensors of a running network cannot be negative, told from the operators alone and never from values.

An activation quantizer may spend all its levels above zero where its input follows a ReLU. Whether it does is a
property of the network, so it is read from the operators that run (``aten`` operators, seen by a dispatch mode).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_flatten


def names(text: str) -> frozenset[str]:
    """A table of operator names."""
    return frozenset(text.split())


ALWAYS = names("""
    abs exp exp2 hardsigmoid linalg_vector_norm norm relu sigmoid sqrt rsqrt square std var
    softmax _softmax _safe_softmax softplus
    zeros ones zeros_like ones_like new_zeros new_ones zero empty empty_like new_empty empty_strided
""")
"""Never negative, whatever goes in. Uninitialised memory counts as such: what is written into it decides."""

MOVES = names("""
    clone _to_copy lift_fresh cat stack index _unsafe_index index_select gather roll flip repeat where
    pixel_shuffle pixel_unshuffle channel_shuffle im2col reflection_pad1d reflection_pad2d reflection_pad3d
    replication_pad1d replication_pad2d replication_pad3d upsample_nearest1d upsample_nearest2d upsample_nearest3d
    _upsample_nearest_exact2d
""")
"""Only move values: not negative where no floating tensor that goes in is negative. Views are not listed."""

KEEPS = names("""
    max_pool1d max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool2d avg_pool1d avg_pool2d avg_pool3d
    _adaptive_avg_pool2d _adaptive_avg_pool3d mean sum amax amin max min minimum upsample_linear1d upsample_bilinear2d
    upsample_trilinear3d leaky_relu elu silu gelu hardswish native_dropout bmm mm col2im
""")
"""Arithmetic of which the same is true. Bicubic interpolation is not in it: it overshoots."""

SCALED = names('add mul div constant_pad_nd masked_fill')
"""As ``KEEPS``, where the numbers that go in (``other``, ``alpha``, ``value``) are not negative either."""


def operator_name(func: Any) -> str:
    """Name of an operator without overload and in-place mark: ``aten.relu_.default`` gives ``relu``."""
    return func._schema.name.split('::')[-1].rstrip('_')


def is_nonnegative(func: Any, args: Sequence[Any], kwargs: dict[str, Any], known: Callable[[Tensor], bool]) -> bool:
    """Return True if what ``func`` computes from these arguments cannot be negative.

    Args:
        func: An operator as a ``TorchDispatchMode`` receives it.
        args, kwargs: Its arguments.
        known: Tells of a tensor argument whether it is known not to be negative.
    """
    name = operator_name(func)
    if name in ALWAYS:
        return True
    given = _by_name(func, args, kwargs)

    def fine(value: Any) -> bool:
        if isinstance(value, Tensor):
            return known(value)
        return isinstance(value, (int, float)) and value >= 0

    if name in ('clamp', 'clamp_min', 'clamp_max', 'hardtanh'):
        low, high = given.get('min', given.get('min_val')), given.get('max', given.get('max_val'))
        return (fine(low) or known(given['self'])) and (high is None or fine(high))
    if name == 'threshold':
        return (fine(given['threshold']) or known(given['self'])) and fine(given['value'])
    if name == 'pow':
        exponent = given['exponent']
        return fine(given['self']) or (isinstance(exponent, (int, float)) and exponent % 2 == 0)
    if name == 'maximum':
        return fine(given['self']) or fine(given['other'])
    if name in ('fill', 'full', 'full_like', 'new_full', 'scalar_tensor'):
        return fine(next(given[key] for key in ('value', 'fill_value', 's') if key in given))
    if name == 'copy':
        return fine(given['src'])
    if name == 'mul' and given['self'] is given['other']:
        return True
    tensors = tensors_in((args, kwargs))
    if name in MOVES or name in KEEPS:
        floating = [tensor for tensor in tensors if tensor.is_floating_point()]
        return bool(floating) and all(known(tensor) for tensor in floating)
    if name in SCALED:
        numbers = [given[key] for key in ('other', 'alpha', 'value') if isinstance(given.get(key), (int, float))]
        tensors = [tensor for tensor in tensors if tensor.dtype != torch.bool]
        return all(fine(value) for value in tensors + numbers)
    return False


def _by_name(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    declared = func._schema.arguments
    given = {argument.name: argument.default_value for argument in declared if argument.has_default_value()}
    given.update(zip((argument.name for argument in declared), args))
    return {**given, **kwargs}


class NonNegativeTensors:
    """Follows tensors through a forward pass; views and in-place operators are seen through shared storage.

    A storage is not negative where all of it was written by operators whose result is not negative. Storages are
    held by weak references, so that nothing is kept alive and an address that is used again is not mistaken.
    Anything unknown (inputs, parameters, buffers, operators not in the tables) counts as possibly negative.
    """

    def __init__(self) -> None:
        self._storages: dict[StorageWeakRef, bool] = {}

    def __contains__(self, tensor: Tensor) -> bool:
        key = storage_of(tensor)
        return key is not None and self._storages.get(key, False)

    def observe(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
        """Take note of one operator that has run. Call it once per operator, in the order of execution."""
        result = is_nonnegative(func, args, kwargs, self.__contains__)
        for tensor in written_by(func, args, kwargs):
            self._write(tensor, result)
        sources = {storage_of(tensor) for tensor in tensors_in((args, kwargs))}
        for tensor in tensors_in(out):
            key = storage_of(tensor)
            if key is not None and key not in sources:  # a view keeps what is known of its base
                self._storages[key] = result

    def _write(self, tensor: Tensor, result: bool) -> None:
        key = storage_of(tensor)
        if key is not None:
            whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
            self._storages[key] = result if whole else result and self._storages.get(key, False)


def written_by(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> list[Tensor]:
    """The arguments that an operator writes into."""
    given = _by_name(func, args, kwargs)
    names = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    return [tensor for name in names for tensor in tensors_in(given.get(name))]


def tensors_in(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries."""
    return [leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor)]


def storage_of(tensor: Tensor) -> StorageWeakRef | None:
    """What holds a tensor's values, the same for its views; None where there is no such thing."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (RuntimeError, NotImplementedError):  # sparse and opaque tensors have none
        return None
