"""Bits that a network's forward passes used, image by image: FAB, and what cost is given in place of the plan's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..network.plan import FLOAT_BITS, Plan
from .bitops import counted_layers
from .sizing import SizedTrace


@dataclass(frozen=True)
class MeasuredBits:
    """Bits of one image.

    Attributes:
        fab: Mean bits over the counted activation quantizers, see :func:`~basicsr_quant.cost.counted_layers`; patches
            count alike, whatever their size. None without such quantizers.
        fab_mac: The same, weighted by MACs.
        layers: Layer -> mean bits of its input, for the layers that chose them.
        passes: FAB of each pass (each patch of the image), in their order.
        by_pass: Counted layer -> bits of its input, of each pass.
    """

    fab: float | None
    fab_mac: float | None
    layers: dict[str, float]
    passes: tuple[float, ...] = ()
    by_pass: tuple[Mapping[str, float], ...] = ()


class BitMeter:
    """Follows the passes of a quantized network by a hook; :meth:`image` ends an image.

    A pass (an image, a patch of one, a tile of a host) is asked for the bits that its quantizers left in the context;
    layers that leave none have the plan's. Static methods thus get the plan's figures from the same place.

    Args:
        net: The root network that :func:`~basicsr_quant.network.surgery.apply_plan` returned.
        plan: Its plan.
        sized: Its trace, for the MACs.
    """

    def __init__(self, net: nn.Module, plan: Plan, sized: SizedTrace) -> None:
        self._plan = {layer.layer: float(layer.a_bits) for layer in plan.quantized if layer.a_bits < FLOAT_BITS}
        self._weights = {layer.layer: float(layer.w_bits) for layer in plan}
        self._macs = counted_layers(sized, plan)
        self._passes: list[dict[str, float]] = []
        self._images: list[dict[str, float]] = []
        self._products: dict[str, list[tuple[float, float]]] = {}
        self._handle = net.register_forward_hook(self._after_pass)

    def _after_pass(self, net: nn.Module, inputs: Any, output: Any) -> None:
        bits: Mapping[str, Tensor] = net._quant_context.bits  # type: ignore[assignment, union-attr]
        self._passes.append({name: float(found.detach().mean()) for name, found in bits.items()})
        weights: Mapping[str, Tensor] = net._quant_context.weight_bits  # type: ignore[assignment, union-attr]
        for name, found in weights.items():
            product = float((found * bits[name].detach()).mean())
            self._products.setdefault(name, []).append((float(found.mean()), product))

    def image(self) -> MeasuredBits:
        """The bits of the passes since the last call, which were of one image (or of patches of one)."""
        names = dict.fromkeys(name for found in self._passes for name in found)
        layers = {name: _mean([p.get(name, self._plan[name]) for p in self._passes]) for name in names}
        passes = [{name: found.get(name, self._plan[name]) for name in self._macs} for found in self._passes]
        self._passes.clear()
        self._images.append(layers)
        bits = {name: layers.get(name, self._plan[name]) for name in self._macs}
        total = sum(self._macs.values())
        return MeasuredBits(
            fab=_mean(list(bits.values())) if bits else None,
            fab_mac=sum(bits[name] * macs for name, macs in self._macs.items()) / total if total else None,
            layers=layers,
            passes=tuple(_mean(list(found.values())) for found in passes if found),
            by_pass=tuple(found for found in passes if found),
        )

    def mean_bits(self) -> dict[str, tuple[float, float]]:
        """Layer -> (w_bits, a_bits), means over the images so far, where bits were chosen."""
        names = dict.fromkeys(name for found in self._images for name in found)
        return {
            name: (self._weight(name), _mean([i.get(name, self._plan[name]) for i in self._images])) for name in names
        }

    def _weight(self, name: str) -> float:
        found = self._products.get(name)
        return self._weights[name] if found is None else _mean([weight for weight, _ in found])

    def mean_products(self) -> dict[str, float]:
        """Layer -> mean of w_bits x a_bits over the passes so far, where a weight followed the choice."""
        return {name: _mean([product for _, product in found]) for name, found in self._products.items()}

    def close(self) -> None:
        self._handle.remove()


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
