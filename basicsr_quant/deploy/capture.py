"""From a quantized network to a graph whose quantizers are integer grids: modules swapped on a copy, then exported."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..errors import QuantError
from ..network.masking import masked_layers
from ..network.surgery import quant_layers
from ..nn import weight_rows
from ..quantizers import Quantizer
from . import lowering
from .grids import Grid, WeightCodes, activation_grid, weight_codes
from .node_report import NodeReport
from .operators import ACTIVATION, CONSTANT

LARGEST = 8192
"""Largest height and width in pixels that the file promises to take."""
MOST_IMAGES = 256
"""Largest batch, where it is free."""


class _Activation(nn.Module):
    """Stands in for a quantizer while the network is exported."""

    def __init__(self, grid: Grid) -> None:
        super().__init__()
        self.grid = grid

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATION(x, *self.grid.arguments())


class _Weight(nn.Module):
    """Stands in for a weight quantizer: codes and scale instead of the weight."""

    def __init__(self, found: WeightCodes) -> None:
        super().__init__()
        self.register_buffer('codes', found.codes)
        self.register_buffer('scale', found.scale)

    def forward(self, _: Tensor) -> Tensor:
        return CONSTANT(self.codes, self.scale)


@dataclass
class IntegerPlan:
    """A network as an engine is to compute it.

    Attributes:
        graph: Runs in PyTorch as it stands (float arithmetic on the grids' values); its operators are aten's and the
            two of :mod:`.operators`. Input (1, C, H, W) in the network's own pixel range.
        engine: Who it is for.
        activations: By quantizer name, the grids.
        weights: By layer, the codes.
        nodes: Every convolution, matrix product and addition, and whether it runs in integers.
        shape: An input shape that it runs on.
        dynamic: Whether height and width may change.
        batched: Whether the batch may, too.
    """

    graph: fx.GraphModule
    engine: str
    activations: dict[str, Grid]
    weights: dict[str, WeightCodes]
    nodes: list[NodeReport]
    shape: tuple[int, ...]
    dynamic: bool
    left_out: list[str] = field(default_factory=list)
    batched: bool = False

    @property
    def realigned(self) -> list[str]:
        """Names of the grids that are not the checkpoint's own."""
        moved = [name for name, grid in self.activations.items() if grid.shift]
        return moved + [f'{name}.weight' for name, found in self.weights.items() if found.error]


def integer_plan(
    net: nn.Module, shape: tuple[int, ...], engine: str = 'onnxruntime', *, dynamic: bool = True,
    leave_out: Callable[[str], bool] = lambda name: False,
) -> IntegerPlan:
    """Read the grids of a calibrated network and lower it to integers. ``net`` stays as it is.

    Args:
        net: A network after :func:`basicsr_quant.methods.quantize`, with ranges, on any device.
        shape: An input shape (1, C, H, W) that it takes.
        engine: One of :data:`~basicsr_quant.network.integer_tensors.ENGINES`.
        dynamic: Export height and width, and the batch where the network allows it, as free dimensions.
        leave_out: Names of quantizers that the engine would not execute.

    Raises:
        QuantError: if a layer has no range, or none that an integer engine can have, or if the network's forward
            cannot be exported.
    """
    twin = copy.deepcopy(net).cpu().float().eval()
    activations: dict[str, Grid] = {}
    weights: dict[str, WeightCodes] = {}
    left_out = []
    kept = {name: layer.bake_mask() for name, layer in masked_layers(twin).items()}  # engines know no masks, but zeros
    for name, layer in quant_layers(twin).items():
        if isinstance(layer.weight_quantizer, Quantizer):
            found = weight_codes(name, weight_rows(layer), layer.weight_quantizer)
            if name in kept:
                found = replace(found, codes=found.codes * kept[name].to(found.codes))
            weights[name] = found
            layer.weight_quantizer = _Weight(weights[name])  # type: ignore[assignment]
    known: dict[int, _Activation | nn.Identity] = {}
    for name, module in list(twin.named_modules(remove_duplicate=False)):
        if not isinstance(module, Quantizer):
            continue
        if id(module) not in known:
            if leave_out(name):
                known[id(module)] = nn.Identity()
                left_out.append(name)
            else:
                activations[name] = activation_grid(name.removesuffix('.input_quantizer'), module, engine)
                known[id(module)] = _Activation(activations[name])
        parent, _, child = name.rpartition('.')
        setattr(twin.get_submodule(parent), child, known[id(module)])
    if not weights and not activations:
        raise QuantError('this network has no quantized layer; `basicsr export` wants a quantized checkpoint')
    graph, batched = _export(twin, shape, dynamic)
    nodes = lowering.lower(graph, engine)
    return IntegerPlan(graph, engine, activations, weights, nodes, shape, dynamic, left_out, batched)


def float_graph(net: nn.Module, shape: tuple[int, ...], dynamic: bool = True) -> tuple[fx.GraphModule, bool]:
    """The graph of a network in floating point, for comparisons, and whether its batch is free."""
    return _export(copy.deepcopy(net).cpu().float().eval(), shape, dynamic)


def free_sizes(batched: bool) -> dict[int, Any]:
    """Dimensions of the input that a file leaves open, as torch's exporter takes them."""
    dims = {2: torch.export.Dim('height', min=2, max=LARGEST), 3: torch.export.Dim('width', min=2, max=LARGEST)}
    return {0: torch.export.Dim('batch', min=1, max=MOST_IMAGES), **dims} if batched else dims


def _export(net: nn.Module, shape: tuple[int, ...], dynamic: bool) -> tuple[fx.GraphModule, bool]:
    """Height, width and batch free; height and width where a network's own code fixes the batch; or nothing."""
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    attempts = ((True, True), (True, False)) if dynamic else ((False, False),)
    for free, batched in attempts:
        image = torch.rand((2 if batched else 1, *shape[1:]), generator=torch.Generator().manual_seed(0))
        try:
            with warnings.catch_warnings(), torch.no_grad():
                warnings.simplefilter('ignore')
                dims = (free_sizes(batched),) if free else None
                program = torch.export.export(net, (image,), dynamic_shapes=dims, strict=False)
                exported = program.run_decompositions({}).module(check_guards=False)
        except Exception as error:  # anything may go wrong in a forward that was not written for tracing
            failure = error
            continue
        graph = fx.GraphModule(exported, exported.graph)  # an ordinary module again, which has a mode
        lowering.drop_no_ops(graph)
        return graph.eval(), batched
    said = ' '.join(str(failure).split())[:200]
    if dynamic and ('Constraints violated' in said or 'specialized' in said):
        raise QuantError(
            f"height and width of {type(net).__name__} cannot stay free, its own code fixes them (windows of a "
            'transformer do); a file for one size of image: --size HEIGHT WIDTH'
        )
    hint = '; a file for one size of image may do: --size HEIGHT WIDTH' if dynamic else ''
    raise QuantError(f'{type(net).__name__} cannot be exported by torch: {type(failure).__name__}: {said}{hint}')
