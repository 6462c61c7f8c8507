"""Which filters can be taken out of a network, and which of them only together.

The dependencies are followed by Torch-Pruning (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023).
What it cannot know, such as channels that a forward rearranges (pixel shuffle) or splits by fixed numbers, is found out
by running: with one filter of each group taken out, a copy of the network must compute what it does with those filters
at zero. Groups for which it does not are left whole.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from .. import random_state
from ..errors import QuantError
from ..network.trace import trace

Removal = Mapping[str, Sequence[int]]
"""Convolution -> numbers of the filters to take out of it, as the untouched network counts them."""

_SHUFFLES = ('PixelShuffle', 'pixel_shuffle')
_TOLERANCE = 1e-9  # of double precision, relative to the output


@dataclass(frozen=True)
class FilterGroup:
    """Filters of one convolution, or of several that feed the same sums: the i-th of each goes with the i-th of all.

    Args:
        convs: Names of the convolutions, in the network's order.
        filters: Of each of them, the numbers of its filters, unit by unit; all equally long.
    """

    convs: tuple[str, ...]
    filters: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return len(self.filters[0])

    def removal(self, units: Iterable[int]) -> dict[str, list[int]]:
        """What taking out these units means for each convolution."""
        return {conv: [numbers[unit] for unit in units] for conv, numbers in zip(self.convs, self.filters)}


@dataclass
class FilterGroups:
    """What :func:`find_groups` found. ``left``: convolutions whose filters stay, and why."""

    groups: list[FilterGroup] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)


def find_groups(net: nn.Module) -> FilterGroups:
    """All groups of filters of the network's ``Conv2d`` that can be taken out so that its forward still runs.

    Args:
        net: The FP32 network; it stays as it is.

    Raises:
        QuantError: if the network does not run on a small image, or Torch-Pruning is missing.
    """
    traced = trace(net)
    shape = traced.input_shape
    twin = copy.deepcopy(net).cpu().double().eval()
    graph = _graph(twin, shape)
    convs = {module: name for name, module in twin.named_modules() if type(module) is nn.Conv2d}
    found = FilterGroups()
    units = _Units()
    shuffled = {layer.name for layer in traced.layers if layer.chain and layer.chain[0].type in _SHUFFLES}
    for conv, name in convs.items():
        if all((name, index) in units for index in range(conv.out_channels)):
            continue  # met with another convolution
        try:
            items = _group(graph, conv, range(conv.out_channels))
        except Exception as error:
            found.left[name] = f'its dependencies cannot be followed ({type(error).__name__})'
            continue
        through = ' '.join(item.dep.target.name for item in items)
        if '_SplitOp' in through:
            found.left[name] = 'the forward splits its channels by fixed numbers'
        elif name in shuffled:
            found.left[name] = 'its channels are shuffled into pixels'
        for module, pairs in _outputs(graph, items):
            if module in convs:
                for own, other in pairs:
                    units.join((name, own), (convs[module], other))
    together: dict[tuple[str, ...], list[dict[str, int]]] = {}
    for unit in units.all():
        numbers = dict(unit)
        if len(numbers) < len(unit):
            found.left.update(dict.fromkeys(numbers, 'several of its filters are one channel further on'))
        else:
            together.setdefault(tuple(numbers), []).append(numbers)
    groups = []
    for names, members in together.items():
        if found.left.keys() & set(names):
            for name in names:
                found.left.setdefault(name, 'goes with filters that stay')
        else:
            groups.append(FilterGroup(names, tuple(tuple(unit[name] for unit in members) for name in names)))
    found.groups = _that_run(twin, shape, groups, found.left)
    return found


class _Units:
    """Which filters go together: sets that are joined."""

    def __init__(self) -> None:
        self._parent: dict[tuple[str, int], tuple[str, int]] = {}

    def __contains__(self, node: tuple[str, int]) -> bool:
        return node in self._parent

    def root(self, node: tuple[str, int]) -> tuple[str, int]:
        while self._parent.setdefault(node, node) != node:
            self._parent[node] = node = self._parent[self._parent[node]]
        return node

    def join(self, first: tuple[str, int], second: tuple[str, int]) -> None:
        self._parent[self.root(second)] = self.root(first)

    def all(self) -> list[list[tuple[str, int]]]:
        found: dict[tuple[str, int], list[tuple[str, int]]] = {}
        for node in self._parent:
            found.setdefault(self.root(node), []).append(node)
        return list(found.values())


def remove_filters(net: nn.Module, removals: Sequence[Removal], shape: tuple[int, ...] | None = None) -> None:
    """Take filters out of ``net``, in place, with everything that reads them.

    Args:
        net: A network on any device; its tensors keep device and dtype.
        removals: From :meth:`FilterGroup.removal`; the filters of each are removed together.
        shape: Of an image that it takes, if known.
    """
    was_training = net.training
    graph = _graph(net.eval(), shape or trace(net).input_shape)
    alive = {name: list(range(module.out_channels)) for name, module in net.named_modules()
             if isinstance(module, nn.Conv2d)}  # fmt: skip
    for removal in removals:
        name = next(iter(removal))
        positions = [alive[name].index(number) for number in removal[name]]
        if positions:
            _group(graph, net.get_submodule(name), positions).prune()
        for conv, numbers in removal.items():
            alive[conv] = [number for number in alive[conv] if number not in set(numbers)]
    net.train(was_training)


def silence_filters(net: nn.Module, removals: Sequence[Removal], shape: tuple[int, ...] | None = None) -> None:
    """Set the filters that :func:`remove_filters` would remove to zero, with their biases and BatchNorms, in place."""
    graph = _graph(net.eval(), shape or trace(net).input_shape)
    with torch.no_grad():
        for removal in removals:
            name, numbers = next(iter(removal.items()))
            if not numbers:
                continue
            for module, pairs in _outputs(graph, _group(graph, net.get_submodule(name), numbers)):
                index = torch.tensor([other for _, other in pairs])
                for tensor in (module.weight, module.bias):
                    if isinstance(tensor, nn.Parameter):
                        tensor[index.to(tensor.device)] = 0


def _that_run(
    net: nn.Module, shape: tuple[int, ...], groups: list[FilterGroup], left: dict[str, str]
) -> list[FilterGroup]:
    """Those groups of which one unit can be taken out; halves of the list are tried, as few ever fail."""
    if not groups:
        return groups
    try:
        difference(net, [group.removal([group.size // 2]) for group in groups], shape)
        return groups
    except QuantError as error:
        if len(groups) == 1:
            left.update(dict.fromkeys(groups[0].convs, str(error)))
            return []
    half = len(groups) // 2
    return _that_run(net, shape, groups[:half], left) + _that_run(net, shape, groups[half:], left)


def difference(net: nn.Module, removals: Sequence[Removal], shape: tuple[int, ...] | None = None) -> float:
    """How far the network without some filters is from the one with those filters at zero, relative to its output.

    Computed in double precision on a random image; copies are changed, ``net`` is not.

    Raises:
        QuantError: if it is more than rounding, or the smaller network does not run.
    """
    shape = shape or trace(net).input_shape
    image = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    masked, smaller = (copy.deepcopy(net).cpu().double().eval() for _ in range(2))
    silence_filters(masked, removals, shape)
    try:
        remove_filters(smaller, removals, shape)
        with torch.no_grad():
            expected, found = masked(image), smaller(image)
    except Exception as error:  # a forward that was made for other widths may fail in any way
        raise QuantError(f'without these filters the network does not run ({type(error).__name__})') from None
    if expected.shape != found.shape:
        raise QuantError('without these filters the output has another shape')
    off = float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-30))
    if not off <= _TOLERANCE:
        raise QuantError(f'without these filters the network computes something else, by {off:.1e}')
    return off


def _graph(net: nn.Module, shape: tuple[int, ...]) -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise QuantError("filter pruning needs the package torch-pruning; pip install 'basicsr_quant[prune]'") from None
    weight = next(net.parameters())
    with random_state.preserved(), torch.enable_grad():
        image = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(weight)
        return torch_pruning.DependencyGraph().build_dependency(net, image, verbose=False)


def _group(graph: Any, conv: nn.Module, numbers: Iterable[int]) -> Any:
    import torch_pruning

    return graph.get_pruning_group(conv, torch_pruning.prune_conv_out_channels, idxs=list(numbers))


def _outputs(graph: Any, items: Any) -> list[tuple[nn.Module, list[tuple[int, int]]]]:
    """Convolutions and BatchNorms of which output channels go: the module, and (filter asked for, its own channel)."""
    found: list[tuple[nn.Module, list[tuple[int, int]]]] = []
    for item in items:
        module = item.dep.target.module
        if graph.is_out_channel_pruning_fn(item.dep.handler) and isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            found.append((module, list(zip(map(int, item.root_idxs), map(int, item.idxs)))))
    return found
