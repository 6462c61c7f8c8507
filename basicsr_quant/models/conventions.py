"""The way from other projects' tensor names to the network's own.

A convention is a table of patterns for one architecture, see :mod:`.convention_tables`. It is used where a file's names
are not the network's own; what comes out is then loaded as strictly as any other file. Names tell nothing about pixel
ranges: where a file holds its mean shifts they are compared with the network's options, elsewhere ``img_range`` has to
be right (1 for MMagic's EDSR, 255 for EDSR-PyTorch's).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..archs.spandrel_arch import Spandrel, own_names
from ..errors import QuantError
from .convention_tables import CONVENTIONS, Convention


def adapt(net: nn.Module, state: Mapping[str, Tensor], path: str) -> tuple[dict[str, Tensor], str | None]:
    """Bring ``state`` to the names of ``net``.

    Args:
        net: The network, quantized or not; it is not changed.
        state: Tensors of a file, without ``module.`` and the like.
        path: Of the file, for errors.

    Returns:
        The tensors by the network's names, and whose names the file has (None: the network's own, or none known).

    Raises:
        QuantError: for a file that follows a convention in part, listing what did not map; for one whose mean shifts
            differ from the network's; for one that is known to be of another network.
    """
    own = set(net.state_dict())
    if not set(state) - own:
        return dict(state), None
    if isinstance(net, Spandrel):
        return own_names(state, path), "spandrel's architectures"
    best: tuple[int, Convention, dict[str, str | None], list[str]] | None = None
    for convention in CONVENTIONS.get(type(net).__name__, ()):
        names, unknown = _rename(convention, state)
        known = sum(name not in own for name in names)
        if known and (best is None or len(unknown) < best[0]):
            best = len(unknown), convention, names, unknown
    if best is None:
        return dict(state), None
    _, convention, names, unknown = best
    network = type(net).__name__
    if convention.refused:
        raise QuantError(f'{path} has the names of {convention.project} for {network}, but {convention.refused}')
    if unknown:
        raise QuantError(
            f'{path} looks like a {network} with the names of {convention.project}, but {_count(len(unknown))} did '
            f'not map: {_some(unknown)}'
        )
    if convention.mean_shifts:
        _check_mean_shifts(net, state, path)
    pairs = [(name, target) for name, target in names.items() if target is not None]
    renamed = {target: state[name] for name, target in pairs}
    return _settle(net, renamed), convention.project


def _rename(convention: Convention, state: Iterable[str]) -> tuple[dict[str, str | None], list[str]]:
    names: dict[str, str | None] = {}
    unknown = []
    for name in state:
        for pattern, target in convention.rules:
            match = re.fullmatch(pattern, name)
            if match is not None:
                names[name] = target(match) if callable(target) else target and match.expand(target)
                break
        else:
            unknown.append(name)
    return names, unknown


def _settle(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Finish the names whose place depends on more than themselves.

    CARN's files for several scales hold an up-sampler for each (``upsample@2`` ...): the network's own is kept. RDN's
    numbered convolutions (``upnet@0`` ...) are up-samplers but for the last.
    """
    mine = ('upsample@', f'upsample@{getattr(net, "upscale", "")}')
    last = max((int(name[6:].split('.')[0]) for name in state if name.startswith('upnet@')), default=0)
    settled = {}
    for name, tensor in state.items():
        place, _, rest = name.partition('.')
        if place.startswith('upsample@'):
            if place not in mine:
                continue
            name = f'upsample.{rest}'
        elif place.startswith('upnet@'):
            name = f'conv_last.{rest}' if place == f'upnet@{last}' else f'upsample.{place[6:]}.{rest}'
        settled[name] = tensor
    return settled


def _check_mean_shifts(net: Any, state: Mapping[str, Tensor], path: str) -> None:
    """Compare the file's ``x - range * mean`` with what the network's options say."""
    shift = {name.replace('shifter.', ''): tensor for name, tensor in state.items()}
    weight, bias = shift.get('sub_mean.weight'), shift.get('sub_mean.bias')
    if weight is None or bias is None:
        return
    pixels = getattr(net, 'pixels', net)
    mean, img_range = pixels.mean.flatten().cpu(), float(pixels.img_range)
    if not torch.allclose(weight[:, :, 0, 0].float(), torch.eye(len(weight)), atol=1e-4):
        raise QuantError(f'{path} scales colours by its own deviations (sub_mean.weight), which the network does not')
    if len(bias) != len(mean) or not torch.allclose(-bias.float(), mean * img_range, rtol=1e-3, atol=1e-5):
        theirs = ', '.join(f'{-value:.4f}' for value in bias.tolist())
        ours = ', '.join(f'{value:.4f}' for value in (mean * img_range).tolist())
        raise QuantError(
            f'{path} takes the mean ({theirs}) off its input, the network {img_range:g} x rgb_mean = ({ours}); set '
            'network_g.img_range and rgb_mean to those of the file'
        )


def _count(number: int) -> str:
    return f'{number} tensor' + ('s' if number > 1 else '')


def _some(names: list[str], most: int = 8) -> str:
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
