"""Any architecture of the library spandrel as ``network_g``: files of HAT, DAT, OmniSR, SPAN, Compact, ESRGAN ..."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY
from torch import Tensor, nn
from torch.nn import functional

from ..errors import QuantError

_OWN_CALL = ('DRUNet', 'DnCNN', 'FBCNN', 'GFPGAN', 'IPT', 'MMRealSR', 'MixDehazeNet', 'RestoreFormer', 'RetinexFormer')
"""Networks that spandrel does not simply call: they take or give more than an image, or another pixel range."""


@ARCH_REGISTRY.register()
class Spandrel(nn.Module):
    """The network that a file holds, recognised by spandrel (MIT; ``pip install spandrel``) from its tensors.

    Images (N, C, H, W) in 0..1. Inputs that the architecture cannot take are padded at the right and below by
    reflection, as spandrel does (by their edge where the image is smaller than the padding), and the output is cropped.
    Unlike there the output is not clamped to 0..1; the host does it when it makes an image.

    Args:
        path: A ``.pth`` or ``.safetensors`` file in any of the namings that spandrel knows; read with
            ``weights_only=True``; ``params_ema`` where the file has it. It gives the architecture, its options and
            its weights.

    Attributes:
        net: The network itself.
        scale: Its factor; 1 for denoisers and the like.

    Raises:
        QuantError: if spandrel is missing, does not know the file, or calls the architecture in a way of its own.
    """

    def __init__(self, path: str) -> None:
        super().__init__()
        from ..models.checkpoint import read_network_file

        path = os.path.expanduser(path)
        descriptor = _describe(read_network_file(path).state('params_ema')[1], path)
        kind = descriptor.architecture.id
        if kind in _OWN_CALL or not hasattr(descriptor, 'purpose') or descriptor.purpose == 'Inpainting':
            raise QuantError(f'network_g.path {path} holds a {kind}, which is not a plain function from image to image')
        self.net: nn.Module = descriptor.model
        self.scale: int = descriptor.scale
        self.size_requirements = descriptor.size_requirements

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        right, below = self.size_requirements.get_padding(width, height)
        if right or below:
            mode = 'reflect' if right < width and below < height else 'replicate'  # reflection ends with the image
            x = functional.pad(x, (0, right, 0, below), mode)
        return self.net(x)[..., : height * self.scale, : width * self.scale]  # type: ignore[no-any-return]


def own_names(state: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """The tensors of a file by the names that :class:`Spandrel` gives them."""
    return {f'net.{name}': tensor for name, tensor in _describe(state, path).model.state_dict().items()}


def _describe(state: Mapping[str, Tensor], path: str) -> Any:
    try:
        import spandrel
    except ImportError:
        raise QuantError('network_g.type: Spandrel needs the package spandrel; pip install spandrel') from None
    try:
        return spandrel.MAIN_REGISTRY.load(spandrel.canonicalize_state_dict(dict(state)))
    except spandrel.UnsupportedModelError:
        raise QuantError(f'network_g.path {path} holds a network that spandrel does not know') from None
