"""The ``sparsity:`` block of an option file, and the plan it makes of a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from ..errors import QuantError, nearest
from ..network.scope import weight_layers
from ..network.sparsity_plan import SparseLayer, SparsityPlan
from ..network.trace import NetworkTrace
from ..nn import GROUPS, dense_rows, twin_class
from ..schema import check_keys, read
from .base import SPARSITY
from .filter_options import FILTER_METHODS

_ENDS = 'first or last layer'


@dataclass(frozen=True)
class _Scalars:
    M: int = 32
    budget: float = 0.25


@dataclass(frozen=True)
class SparsityConfig:
    """The whole block.

    Args:
        method: Name of the method.
        M: Size of a group of input channels; 32 as published.
        budget: Share of the MACs of the masked layers that may remain.
        dense: Globs of layers that stay dense.
        options: Of the method.
    """

    method: str
    M: int = 32
    budget: float = 0.25
    dense: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def learns(self) -> bool:
        """Whether masks come out of training."""
        return SPARSITY[self.method].learns

    def plan(self, net: nn.Module, traced: NetworkTrace) -> SparsityPlan:
        """Plan the masks of ``net``: all convolutions and linear layers but the first and the last, as in SLS.

        Args:
            net: The network in floating point.
            traced: Its trace.

        Raises:
            QuantError: if a glob matches no layer, no layer is left, or no mask meets the budget.
        """
        found = weight_layers(net)
        for glob in self.dense:
            if not any(fnmatchcase(name, glob) for name in found):
                raise QuantError(f"sparsity.layers: '{glob}' matches no layer{nearest(glob, found)}")
        runs = {layer.name: layer for layer in traced.layers}
        names = list(found)
        layers, dense = [], {}
        for name, module in found.items():
            why = self._why_dense(name, module, names, name in runs)
            if why is None:
                kind = bool(getattr(module, 'transposed', False)), int(getattr(module, 'groups', 1))  # type: ignore
                layers.append(SparseLayer(name, dense_rows(module).shape[1], runs[name].macs, self.M, *kind))
            else:
                dense[name] = why
        if not layers:
            raise QuantError('sparsity: no layer is left to be masked; its first and last layers stay dense')
        plan = SparsityPlan(self.method, self.M, self.budget, tuple(layers), dense, self.options)
        least = plan.share(1)
        if least > self.budget:
            larger = [m for m in GROUPS if m > self.M]
            hint = f', or a larger M than {self.M}' if larger else ''
            raise QuantError(
                f'sparsity.budget: {self.budget:g} given, but with one weight kept of each {self.M} at least '
                f'{_rounded_up(least):g} of the MACs remain; give {_rounded_up(least):g} or more{hint}'
            )
        kept = SPARSITY[self.method].first_kept(plan)
        masked = tuple(dataclasses.replace(layer, kept=kept) for layer in layers)
        return dataclasses.replace(plan, layers=masked)

    def _why_dense(self, name: str, module: nn.Module, names: list[str], runs: bool) -> str | None:
        if name in (names[0], names[-1]):
            return _ENDS
        glob = next((glob for glob in self.dense if fnmatchcase(name, glob)), None)
        if glob is not None:
            return f"layers: '{glob}'"
        if twin_class(module) is None:
            return f'a {type(module).__name__} stays dense'
        return None if runs else 'the network never calls it'


def _rounded_up(share: float) -> float:
    """To four decimals, so that what is printed can be given."""
    return min(1.0, -(-share * 10_000 // 1) / 10_000)


def read_sparsity(block: Any) -> SparsityConfig | None:
    """Check the ``sparsity:`` block; None for none.

    Raises:
        QuantError: for anything that is not as documented, with the nearest thing that is.

    >>> read_sparsity({'method': 'sls', 'M': 32, 'budget': 0.25}).learns
    True
    >>> read_sparsity({'method': 'sls', 'M': 6})
    Traceback (most recent call last):
    basicsr_quant.errors.QuantError: sparsity.M: 6 given, allowed: 4 | 8 | 16 | 32; the nearest is 4
    """
    if block is None:
        return None
    known = ' | '.join(SPARSITY)
    if not isinstance(block, Mapping):
        raise QuantError(f'sparsity must hold `key: value` pairs such as `method: sls`, not {block!r}')
    method: Any = block.get('method')
    if method in FILTER_METHODS:
        raise QuantError(
            f'sparsity.method: {method!r} given, which makes a smaller network by `basicsr prune`; train and test the '
            f'option file that it writes, or use {known} here'
        )
    if method not in SPARSITY:
        said = ' is missing' if method is None else f': {method!r} given{nearest(method, (*SPARSITY, *FILTER_METHODS))}'
        raise QuantError(f'sparsity.method{said}, allowed: {known}; with `basicsr prune`: {" | ".join(FILTER_METHODS)}')
    for other in SPARSITY:
        if other in block and other != method:
            raise QuantError(f'sparsity.{other} is given, but sparsity.method is {method!r}')
    check_keys(block, ['method', 'M', 'budget', 'layers', method], 'sparsity')
    scalars = read(_Scalars, {key: block[key] for key in ('M', 'budget') if key in block}, 'sparsity')
    if scalars.M not in GROUPS:
        near = min(GROUPS, key=lambda m: abs(m - scalars.M))
        allowed = ' | '.join(map(str, GROUPS))
        raise QuantError(f'sparsity.M: {scalars.M} given, allowed: {allowed}; the nearest is {near}')
    if not 0 < scalars.budget <= 1:
        raise QuantError(f'sparsity.budget: {scalars.budget:g} given, a share of the MACs above 0 and at most 1 needed')
    options = dataclasses.asdict(read(SPARSITY[method].Options, block.get(method), f'sparsity.{method}'))
    return SparsityConfig(method, scalars.M, scalars.budget, _dense(block.get('layers')), options)


def _dense(given: Any) -> tuple[str, ...]:
    if given is None:
        return ()
    if not isinstance(given, Mapping) or any(rule != 'dense' for rule in given.values()):
        raise QuantError(f"sparsity.layers must hold 'name glob': dense pairs, not {given!r}")
    return tuple(map(str, given))
