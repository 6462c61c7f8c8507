"""What the FP32 network says about the calibration images: computed once, kept on disk, read batch by batch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from .recorder import first_tensor
from .scope import block_names
from .tensor_store import TensorStore


class Teacher:
    """Images, the FP32 network's outputs for them, and the directions of its blocks' outputs.

    Memory does not grow with the number of images. On disk an image of 96x96 takes about 9 MB with EDSR-b8f64.

    Args:
        net: The network; its blocks are those of :func:`block_names`.
        features: Whether to keep the outputs of the blocks.
    """

    def __init__(self, net: nn.Module, features: bool = True) -> None:
        self.net = net
        self.blocks = block_names(net) if features else []
        self.images, self.outputs = TensorStore(), TensorStore()
        self._features: list[TensorStore] = []
        self.shapes: list[torch.Size] = []

    def close(self) -> None:
        for store in (self.images, self.outputs, *self._features):
            store.close()

    def __len__(self) -> int:
        return len(self.images)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within it every pass of the network, in floating point, adds its images."""

        def keep(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            for image, wanted in zip(inputs[0], output):
                self.images.append(image[None])
                self.outputs.append(wanted[None])
                self.shapes.append(image.shape)
            for index, feature in enumerate(features):
                if index == len(self._features):
                    self._features.append(TensorStore())
                for row in unit_rows(feature, len(inputs[0])):
                    # Scaled to a mean square of one, where half precision is at its best.
                    self._features[index].append((row * row.numel() ** 0.5).half())
            features.clear()

        with collect(self.net, self.blocks) as features:
            handle = self.net.register_forward_hook(keep)
            try:
                yield
            finally:
                handle.remove()

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Images, outputs and unit features of some images of one shape, on the network's device."""
        device = next(self.net.parameters()).device

        def stacked(store: TensorStore) -> Tensor:
            return torch.cat([store[i] for i in indices]).to(device)

        features = []
        for store in self._features:
            rows = torch.stack([store[i] for i in indices]).to(device, torch.float32)
            features.append(rows / rows[0].numel() ** 0.5)
        return stacked(self.images), stacked(self.outputs), features

    def draw(self, size: int, draw: torch.Generator) -> list[list[int]]:
        """All images in random order, in batches of at most ``size`` images of one shape."""
        waiting: dict[torch.Size, list[int]] = {}
        batches = []
        for index in torch.randperm(len(self), generator=draw).tolist():
            group = waiting.setdefault(self.shapes[index], [])
            group.append(index)
            if len(group) == size:
                batches.append(waiting.pop(self.shapes[index]))
        return batches + list(waiting.values())


@contextmanager
def collect(net: nn.Module, names: Iterable[str]) -> Iterator[list[Tensor]]:
    """Within it the list holds the outputs of the named modules, in the order of their calls; whoever reads it after a
    pass clears it."""
    modules = dict(net.named_modules())
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Any) -> None:
        found = first_tensor(output)
        if found is not None:
            outputs.append(found)

    handles = [modules[name].register_forward_hook(keep) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def unit_rows(feature: Tensor, images: int) -> Tensor:
    """The features of each image as a row of length one, (N, values); a feature of zeros stays zero."""
    rows = feature.reshape(images, -1).float()
    return rows / torch.linalg.vector_norm(rows, dim=1, keepdim=True).clamp(min=1e-12)


def feature_distance(features: list[Tensor], wanted: list[Tensor]) -> Tensor:
    """Mean over blocks and images of || F_Q / ||F_Q|| - F_P / ||F_P|| ||_2 (AdaBM).

    Args:
        features: The quantized network's block outputs.
        wanted: Rows of length one of the FP32 network.
    """
    distances = [torch.linalg.vector_norm(unit_rows(f, len(w)) - w, dim=1).mean() for f, w in zip(features, wanted)]
    return torch.stack(distances).mean()


def spread(images: Iterable[Tensor], count: int | None) -> Iterable[Tensor]:
    """At most ``count`` of the images: evenly spread where their number is known, else the first ones; None: all."""
    if count is None:
        return images
    return _Spread(images, count) if hasattr(images, '__len__') else islice(images, count)


class _Spread:
    def __init__(self, images: Any, count: int) -> None:
        self._images, self._count = images, min(count, len(images))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Tensor]:
        wanted = {index * len(self._images) // self._count for index in range(self._count)}
        return (image for index, image in enumerate(self._images) if index in wanted)


def batches_of(images: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    """Consecutive single images (1, C, H, W) of one shape gathered in batches of at most ``size``; batches of more than
    one image stay as they are."""
    waiting: list[Tensor] = []
    for image in images:
        if waiting and (len(waiting) == size or image.shape != waiting[0].shape):
            yield torch.cat(waiting)
            waiting = []
        if len(image) > 1:
            yield image
        else:
            waiting.append(image)
    if waiting:
        yield torch.cat(waiting)
