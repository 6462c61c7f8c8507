"""Looking at the FP32 network's activations: an explicit pass, never part of a forward."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QuantError
from ..quantizers import MinMaxObserver, Observer, Quantizer
from .surgery import floating_point, quant_layers, tensor_quantizers

logger = logging.getLogger('basicsr')

REFERENCE_STD = 4.85
"""Median standard deviation of the body's inputs in an EDSR whose features live in 0-255: the unit of feature scale.

Set so that EDSR-b8f64_x2 measures c = 1 / 127.5: its median is 0.0380, and folding it for img_range 255 instead of 2
would make its features 127.5 times as large by construction."""


_NAMED = 8
"""Layers that a warning names."""


@dataclass
class Observations:
    """What calibration saw.

    Attributes:
        observers: By name of the quantized layer, the observer of its input.
        tensors: By name, the observers of tensors that are quantized where they are made.
        stds: By name of the layer, the mean over batches of its input's standard deviation.
        feature_scale: c, the network's feature scale relative to a 0-255 one: the median of ``stds`` over
            :data:`REFERENCE_STD`. 1.0 for a network without quantized inputs.
        images: Number of images seen.
        choices: What the method chose from them and why, as plain data; goes into the checkpoint.
    """

    observers: dict[str, Observer] = field(default_factory=dict)
    tensors: dict[str, Observer] = field(default_factory=dict)
    stds: dict[str, float] = field(default_factory=dict)
    feature_scale: float = 1.0
    images: int = 0
    choices: dict[str, Any] = field(default_factory=dict)


@torch.no_grad()
def observe(
    net: nn.Module,
    batches: Iterable[Tensor],
    make_observer: Callable[[str, Quantizer], Observer],
    also: Callable[[str, Tensor], None] | None = None,
) -> Observations:
    """Run ``batches`` through the FP32 network and observe the input of every quantized layer.

    The network is in eval mode meanwhile, its quantizers are off, and every module's mode is put back.

    Args:
        net: A network after :func:`apply_plan`.
        batches: Inputs of shape (N, C, H, W), in the network's own pixel range; taken one after another.
        make_observer: Builds the observer of a layer, given the layer's name and its input quantizer.
        also: Called with name and input of each layer, for statistics that a method adds.

    Raises:
        QuantError: if an input holds values that are not finite, naming the layer.
    """
    seen = Observations()
    totals: dict[str, list[tuple[float, float]]] = {}
    handles = []
    for name, layer in quant_layers(net).items():
        if not isinstance(layer.input_quantizer, Quantizer):
            continue
        observer = make_observer(name, layer.input_quantizer)
        seen.observers[name] = observer

        def hook(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name, observer: Observer = observer) -> None:
            totals.setdefault(name, []).append(_moments(name, inputs[0]))
            observer.update(inputs[0])
            if also is not None:
                also(name, inputs[0])

        handles.append(layer.input_quantizer.register_forward_pre_hook(hook))
    for name, quantizer in tensor_quantizers(net).items():
        watcher = seen.tensors[name] = MinMaxObserver()

        def watch(_: nn.Module, inputs: tuple[Tensor, ...], watcher: Observer = watcher) -> None:
            watcher.update(inputs[0])

        handles.append(quantizer.register_forward_pre_hook(watch))
    device = next((p.device for p in net.parameters()), torch.device('cpu'))
    try:
        with evaluating(net), floating_point(net):
            for batch in batches:
                net(batch.to(device))
                seen.images += batch.shape[0]
    finally:
        for handle in handles:
            handle.remove()
    seen.stds = {name: sum(std for _, std in values) / len(values) for name, values in totals.items()}
    seen.feature_scale = feature_scale(list(seen.stds.values()))
    constant = [name for name, std in seen.stds.items() if std == 0 and len({mean for mean, _ in totals[name]}) == 1]
    if constant:
        logger.warning(
            'The inputs of %d layers have the same value everywhere on the calibration images; what they hold else is '
            'rounded to it: %s%s.', len(constant), constant[:_NAMED], ' ...' if constant[_NAMED:] else '',
        )  # fmt: skip
    return seen


def _moments(name: str, x: Tensor) -> tuple[float, float]:
    """Mean and standard deviation of a layer's input; the latter 0 exactly where all values are equal."""
    x = x.float()
    mean = x.mean()
    std = float(torch.linalg.vector_norm(x - mean)) / x.numel() ** 0.5  # a third of the time of x.std()
    if not math.isfinite(std) and not x.isfinite().all():
        raise QuantError(
            f"the FP32 network gives values that are not finite: the input of layer '{name}' holds "
            f'{int(x.isnan().sum())} NaN and {int(x.isinf().sum())} infinite values on a calibration image'
        )
    if std <= 1e-5 * abs(float(mean)):  # the mean itself is rounded
        low, high = x.aminmax()
        std = 0.0 if low == high else std
    return float(mean), std


def set_tensor_ranges(net: nn.Module, seen: Observations) -> None:
    """Give the quantizers of tensors what :func:`observe` saw; no method has a say in them."""
    for name, quantizer in tensor_quantizers(net).items():
        quantizer.set_range(*seen.tensors[name].range())


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Within it ``net`` is in eval mode; afterwards every module is in its own mode again."""
    modes = [(module, module.training) for module in net.modules()]  # a part may be frozen in another mode
    net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def output_error(net: nn.Module, images: Iterable[Tensor], targets: Iterable[Tensor]) -> float:
    """Mean squared difference between the network's outputs and ``targets``, over all values of all images."""
    total, count = 0.0, 0
    with evaluating(net), torch.no_grad():
        for image, target in zip(images, targets):
            total += float((net(image) - target).double().square().sum())
            count += target.numel()
    return total / count


def feature_scale(stds: list[float]) -> float:
    """The feature scale c of a network from the standard deviations of its quantized layers' inputs."""
    positive = [s for s in stds if s > 0]
    return float(torch.tensor(positive).median()) / REFERENCE_STD if positive else 1.0


def regularizer_weight(published: float, scale: float, loss_range: float = 1.0) -> float:
    """Convert a loss weight that the papers give for features and losses in 0-255: lambda / (255 c).

    A feature term (ODM's mismatch) grows with the feature scale c, the reconstruction loss with its pixel range.

    Args:
        published: lambda of the paper.
        scale: Feature scale c of the network, see :class:`Observations`.
        loss_range: Pixel range of the reconstruction loss, 1 in BasicSR and MMagic, 255 in EDSR-PyTorch.

    >>> round(regularizer_weight(1e-5, scale=1.0, loss_range=255.0), 9)
    1e-05
    """
    return published * loss_range / (255.0 * scale)
