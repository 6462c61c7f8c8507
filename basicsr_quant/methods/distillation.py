"""Distillation as a service to every method: a frozen teacher, and losses between features of named layers."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import QuantError, nearest
from ..network.calibration import regularizer_weight
from ..network.recorder import first_tensor
from ..network.scope import block_names
from ..network.surgery import quant_layers, quant_state
from ..network.teacher import unit_rows
from ..nn import stores_weight
from ..quantizers import SelectedWeight
from .extra_loss import with_loss


def attention(feature: Tensor) -> Tensor:
    """Attention map of each image: the mean over channels of the squared feature, flattened, of length one.

    Args:
        feature: (N, C, H, W), or tokens (N, L, C).

    Returns:
        (N, H W) or (N, L).
    """
    squares = feature.to(torch.promote_types(feature.dtype, torch.float32)).square()
    return functional.normalize(squares.mean(-1 if feature.dim() == 3 else 1).flatten(1))


def attention_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of both :func:`attention` maps (AT in CADyQ, SKT in PAMS)."""
    return functional.mse_loss(attention(student), attention(teacher))


def feature_distance(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over images of || F_S / ||F_S|| - F_T / ||F_T|| ||_2."""
    images = len(student)
    return torch.linalg.vector_norm(unit_rows(student, images) - unit_rows(teacher, images), dim=1).mean()


LOSSES = {'attention': attention_distance, 'feature': feature_distance}


def layer_weights(net: nn.Module, layers: Mapping[str, float] | None, weight: float) -> dict[str, float]:
    """Module name -> weight of its loss.

    Args:
        net: The network.
        layers: Glob over module names -> weight, first match wins; None: the last block of the body with ``weight``,
            our reading of the papers' "final body feature" for a network of which nothing else is known.
        weight: For ``layers`` None.

    Raises:
        QuantError: for a glob that matches no module, or a network without blocks where none is given.
    """
    if layers is None:
        blocks = block_names(net)
        if not blocks:
            raise QuantError('quant.distill.layers is missing; this network has no repeated blocks to take the last of')
        return {blocks[-1]: weight}
    ours = tuple(f'{name}.' for name in quant_state(net))  # quantizers are nothing to compare
    names = [name for name, _ in net.named_modules() if name and not f'{name}.'.startswith(ours or ('\0',))]
    for glob in layers:
        if not any(fnmatchcase(name, glob) for name in names):
            raise QuantError(f"quant.distill.layers: '{glob}' matches no module of the network{nearest(glob, names)}")
    found: dict[str, float] = {}
    for name in names:
        for glob, own in layers.items():
            if fnmatchcase(name, glob):
                found.setdefault(name, float(own))
    return found


class _Enough(Exception):
    """The teacher has given all features that are wanted; the rest of its pass would be for nothing."""


class Distillation:
    """Adds sum over named layers of weight x distance(student's output, teacher's output) / 255 to the host's loss.

    The teacher runs on the student's input, without gradients, and only as far as the last named layer. Weights are the
    publications', for a reconstruction loss in 0-255: a distance of normalized maps has no unit, so a loss in 0-1 takes
    them over 255.

    Args:
        net: The bare quantized network.
        teacher: A network of the same architecture, in floating point or quantized; it becomes frozen, and its weights
            are rounded once for all.
        weights: From :func:`layer_weights`.
        loss: ``attention`` or ``feature``.
    """

    def __init__(self, net: nn.Module, teacher: nn.Module, weights: Mapping[str, float], loss: str) -> None:
        self.net, self.loss = net, LOSSES[loss]
        self.teacher = teacher.to(next(net.parameters()).device).eval().requires_grad_(False)
        self._figures: dict[str, Tensor] = {}
        self._student: list[tuple[float, Tensor]] = []
        self._teacher: list[Tensor] = []
        self._input: Tensor | None = None
        with torch.no_grad():
            for layer in quant_layers(teacher).values():
                if stores_weight(layer) and not isinstance(layer.weight_quantizer, SelectedWeight):
                    layer.weight.copy_(layer.quantized_weight())  # type: ignore[operator]
                    layer.weight_quantizer = nn.Identity()
        modules, theirs = dict(net.named_modules()), dict(teacher.named_modules())
        for name, weight in weights.items():
            modules[name].register_forward_hook(self._keep(weight))
            theirs[name].register_forward_hook(self._keep_wanted)
        net.register_forward_pre_hook(self._begin, with_kwargs=True)
        net.register_forward_hook(self._end)

    @property
    def _active(self) -> bool:
        return self.net.training and torch.is_grad_enabled()

    def _begin(self, net: nn.Module, args: Any, kwargs: Any) -> None:
        self._student, self._input = [], first_tensor((args, kwargs))

    def _keep(self, weight: float) -> Any:
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            found = first_tensor(output)
            if found is not None and self._input is not None and self._active:
                self._student.append((weight, found))

        return keep

    def _keep_wanted(self, module: nn.Module, inputs: Any, output: Any) -> None:
        found = first_tensor(output)
        if found is not None:
            self._teacher.append(found)
        if len(self._teacher) == len(self._student):
            raise _Enough

    def _end(self, net: nn.Module, inputs: Any, output: Any) -> Any:
        student, image = self._student, self._input
        self._student, self._input = [], None
        if not student or image is None:
            return None
        self._student = student  # how many the teacher is to give
        try:
            with torch.no_grad():
                self.teacher(image.detach())
        except _Enough:
            pass
        finally:
            wanted, self._teacher, self._student = self._teacher, [], []
        terms = [weight * self.loss(found, target) for (weight, found), target in zip(student, wanted)]
        loss = regularizer_weight(1.0, scale=1.0) * torch.stack(terms).sum()
        self._figures = {'l_distill': loss.detach()}
        return with_loss(output, loss)

    def log(self) -> dict[str, float]:
        """``l_distill``, the weighted loss of the last pass."""
        return {k: float(v) for k, v in self._figures.items()}
