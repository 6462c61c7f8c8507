"""Empirical bias correction (Nagel, van Baalen, Blankevoort, Welling 2019, arXiv 1906.04721, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

import torch
from torch import Tensor, nn

from ..nn import QuantLayer
from .calibration import evaluating
from .surgery import floating_point, quant_layers

IMAGES = 16
"""Images that the means are taken over: a layer's mean over their pixels moves little with more of them."""


class _Reached(Exception):
    """The layer has run; the rest of the pass is not needed."""


@torch.no_grad()
def correct_biases(
    net: nn.Module, images: Sequence[Tensor], follow: Callable[[list[str]], Iterator[str]] = iter
) -> list[str]:
    """Add to the bias of each quantized layer what quantization takes from the mean of its output, in place.

    For each output channel b += E[y] - E[y_q], where y is the layer's output in the FP32 network and y_q its output in
    the quantized one, means over pixels and ``images``. Layers are corrected in the order in which they run, each with
    those before it quantized and corrected. Inputs are quantized as well as weights (the network as it will run), which
    goes beyond the paper's correction of weights alone.

    Args:
        net: The calibrated network.
        images: Inputs (N, C, H, W).
        follow: Goes through the names of the layers; a progress bar.

    Returns:
        Names of quantized layers that were left alone, for want of a bias.
    """
    layers = {name: layer for name, layer in quant_layers(net).items() if layer.quantizers()}
    bare = [name for name, layer in layers.items() if layer.bias is None]
    layers = {name: layer for name, layer in layers.items() if layer.bias is not None}
    device = next((p.device for p in net.parameters()), torch.device('cpu'))
    with evaluating(net):
        with floating_point(net), _means(layers) as wanted:
            for image in images:
                net(image.to(device))
        calls = {name: mean.calls // len(images) for name, mean in wanted.items()}
        for name in follow(list(wanted)):  # in the order of first calls
            with _means({name: layers[name]}, calls) as found:
                for image in images:
                    with suppress(_Reached):
                        net(image.to(device))
            bias = layers[name].bias
            assert isinstance(bias, Tensor)
            bias += (wanted[name].value - found[name].value).to(bias)
    return bare


class _Mean:
    """Mean over all but the channel dimension, over calls."""

    def __init__(self) -> None:
        self.calls, self._count = 0, 0
        self._total: Tensor | float = 0.0

    def update(self, output: Tensor, channel: int) -> None:
        rows = output.double().movedim(channel, 0).flatten(1)
        self.calls += 1
        self._count += rows.shape[1]
        self._total = self._total + rows.sum(dim=1)

    @property
    def value(self) -> Tensor:
        assert isinstance(self._total, Tensor)
        return self._total / self._count


@contextmanager
def _means(layers: dict[str, QuantLayer], stop_after: dict[str, int] | None = None) -> Iterator[dict[str, _Mean]]:
    """Means of the outputs of ``layers``; with ``stop_after`` a pass ends when a layer has run so many times."""
    found: dict[str, _Mean] = {}
    handles = []
    for name, layer in layers.items():
        channel = -1 if isinstance(layer, nn.Linear) else 1

        def hook(_: nn.Module, inputs: object, output: Tensor, name: str = name, channel: int = channel) -> None:
            mean = found.setdefault(name, _Mean())
            mean.update(output, channel)
            if stop_after is not None and mean.calls % stop_after[name] == 0:
                raise _Reached

        handles.append(layer.register_forward_hook(hook))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
