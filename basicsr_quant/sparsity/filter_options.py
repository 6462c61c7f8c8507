"""The ``sparsity:`` block of an option file, where its method takes whole filters out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from .. import schema
from ..errors import QuantError, nearest

FILTER_METHODS = ('bn_filter', 'magnitude', 'random')
_SHARED = ('ratio', 'ranking', 'joint', 'multiple_of', 'compensate')


@dataclass(frozen=True)
class FilterPruning:
    """Options of filter pruning.

    Args:
        method: ``bn_filter`` ranks by what BatchNorm says of a filter's output (WACV 2022), ``magnitude`` by its
            weights (Li et al. 2017), ``random`` not at all (the baseline both are judged by).
        ratio: Share of the prunable filters to take out.
        ranking: ``global`` compares the filters of all layers, ``layer`` takes the same share of each. Which of the
            two the paper's tables mean is not known.
        joint: Also prune filters that feed the same sums, all together. Left whole by default: every block reads them.
        multiple_of: Each layer keeps a multiple of this many filters; 8 or 16 suits the vectors of CPUs.
        dense: Name globs of convolutions that stay whole (``layers: {GLOB: dense}``).
        compensate: Add to the next layer what removed filters gave it in the mean, where a BatchNorm behind them says
            so. Exact but at the border of the image, where the next convolution pads with zeros. Not in the paper; on
            by default, since it costs nothing and before fine-tuning it is worth most of the loss.
        moment: ``bn_filter``: 1 ranks by E|f(z)| (the paper, for ReLU), 2 by the root of E[f(z)^2].
        seed: Of ``random``.
    """

    method: str = schema.option('bn_filter', choices=FILTER_METHODS)
    ratio: float = schema.option(0.3, low=0, high=0.99)
    ranking: str = schema.option('global', choices=('global', 'layer'))
    joint: bool = schema.option(False)
    multiple_of: int = schema.option(1, low=1, high=64)
    dense: tuple[str, ...] = ()
    compensate: bool = schema.option(True)
    moment: int = schema.option(1, choices=(1, 2))
    seed: int = schema.option(0, low=0)


_OWN = {'bn_filter': ('moment',), 'magnitude': (), 'random': ('seed',)}
"""Options that stand under the method's own name."""


def read_filter_pruning(block: Any) -> FilterPruning:
    """Check the block.

    Raises:
        QuantError: for anything that is not as documented, with the nearest thing that is.

    >>> read_filter_pruning({'method': 'bn_filter', 'ratio': 0.5, 'bn_filter': {'moment': 2}}).moment
    2
    >>> read_filter_pruning({'method': 'bn_filter', 'ratio': 1.5})
    Traceback (most recent call last):
    basicsr_quant.errors.QuantError: sparsity.ratio: 1.5 given, a number from 0 to 0.99 needed
    """
    method: Any = block.get('method') if isinstance(block, Mapping) else None
    if method not in FILTER_METHODS:
        if method in ('sls', 'one_shot', 'sr_ste'):
            raise QuantError(f'sparsity.method: {method!r} masks weights while it trains; run `basicsr train`')
        said = ' is missing' if method is None else f': {method!r} given{nearest(str(method), FILTER_METHODS)}'
        raise QuantError(f'sparsity.method{said}; `basicsr prune` takes {" | ".join(FILTER_METHODS)}')
    for other in FILTER_METHODS:
        if other in block and other != method:
            raise QuantError(f'sparsity.{other} is given, but sparsity.method is {method!r}')
    own = block.get(method) or {}
    schema.check_keys(block, ['method', *_SHARED, 'layers', method], 'sparsity')
    schema.check_keys(own, _OWN[method], f'sparsity.{method}')
    layers = block.get('layers') or {}
    if not isinstance(layers, Mapping) or any(rule != 'dense' for rule in layers.values()):
        raise QuantError(f"sparsity.layers must hold 'name glob': dense pairs, not {layers!r}")
    schema.read(FilterPruning, own, f'sparsity.{method}')  # its messages name the inner path
    given = {key: block[key] for key in _SHARED if key in block}
    found = schema.read(FilterPruning, {'method': method, **given, **own}, 'sparsity')
    return replace(found, dense=tuple(map(str, layers)))
