"""The way from other projects' tensor names to the network's own, in files of FP32 and of quantized networks.

A convention is a table of patterns for one architecture, see :mod:`.convention_tables`. It is used where a file's names
are not the network's own; what comes out is then loaded as strictly as any other file. Names tell nothing about pixel
ranges: where a file holds its mean shifts they are compared with the network's options, elsewhere ``img_range`` has to
be right (1 for MMagic's EDSR, 255 for EDSR-PyTorch's). MMagic's own networks take BasicSR's names by the same tables,
read the other way.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import QuantError
from ..network.additions import CONTAINER, key_of
from ..network.folding import unfolded_names
from ..network.plan import Plan
from ..network.scope import WEIGHT_LAYERS
from .convention_tables import BASICSR_CLASSES, CONVENTIONS, Convention

T = TypeVar('T')


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
    inside = f'{CONTAINER}.'
    found, project = _adapted(net, {n: t for n, t in state.items() if not n.startswith(inside)}, path)
    sites = {name: tensor for name, tensor in state.items() if name.startswith(inside)}
    if project is not None and sites:
        theirs = {id(tensor): name for name, tensor in state.items()}
        modules = _modules_of({theirs[id(tensor)]: own for own, tensor in found.items()})
        sites = {inside + _moved_site(name[len(inside) :], modules): tensor for name, tensor in sites.items()}
    return {**found, **sites}, project


def _adapted(net: nn.Module, state: Mapping[str, Tensor], path: str) -> tuple[dict[str, Tensor], str | None]:
    """:func:`adapt` but for the quantizers of tensors between layers, whose names hold those of modules."""
    own = unfolded_names(net) | set(net.state_dict())
    if _of_the_network(state) <= own:
        return dict(state), None
    if type(net).__name__ == 'Spandrel':
        from ..archs.spandrel_arch import own_names  # only here: this file is read without BasicSR too

        return own_names(state, path), "spandrel's architectures"
    theirs = _basicsr_names(net)
    if theirs:
        modules = _modules_of(theirs)
        renamed = {theirs.get(name) or _moved(name, modules): tensor for name, tensor in state.items()}
        return (renamed, 'BasicSR') if _of_the_network(renamed) <= own else (dict(state), None)
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
            f'{path} looks like {network} with the names of {convention.project}, but {_count(len(unknown))} did '
            f'not map: {_some(unknown)}'
        )
    if convention.mean_shifts:
        _check_mean_shifts(net, state, path)
    pairs = [(name, target) for name, target in names.items() if target is not None]
    renamed = {target: state[name] for name, target in pairs}
    return _settle(net, renamed), convention.project


def _of_the_network(names: Iterable[str]) -> set[str]:
    """Without the tensors of quantizers and masks: those of another method, which this one starts from, it does not
    know."""
    added = ('quant_', f'{CONTAINER}.', 'sparsity_')
    return {n for n in names if '_quantizer.' not in n and '.weight_mask.' not in n and not n.startswith(added)}


def networks_named(state: Iterable[str]) -> list[str]:
    """The architectures one of whose conventions knows every name of a file."""
    names = _of_the_network(state)
    return [kind for kind, each in CONVENTIONS.items() if any(not _rename(convention, names)[1] for convention in each)]


def adapt_plan(net: nn.Module, plan: Plan, path: str) -> Plan:
    """Bring a file's plan to the names of ``net``, as :func:`adapt` does its tensors: layers, tensors, settings."""
    modules = module_names(net, plan, path)
    if not modules:
        return plan
    layers = tuple(dataclasses.replace(layer, layer=_moved(layer.layer, modules)) for layer in plan)
    tensors = tuple(
        dataclasses.replace(
            tensor, tensor=_moved(tensor.tensor, modules), feeds=tuple(_moved(name, modules) for name in tensor.feeds)
        )
        for tensor in plan.tensors
    )
    # Options hold what users wrote, no layer that the plan found; one may be called as a layer is.
    settings = {k: v if k == 'options' else translated(v, modules) for k, v in plan.settings.items()}
    sparsity = plan.sparsity
    if sparsity is not None:
        masked = (dataclasses.replace(layer, layer=_moved(layer.layer, modules)) for layer in sparsity.layers)
        dense = {_moved(name, modules): why for name, why in sparsity.dense.items()}
        sparsity = dataclasses.replace(sparsity, layers=tuple(masked), dense=dense)
    return dataclasses.replace(plan, layers=layers, tensors=tensors, settings=settings, sparsity=sparsity)


def module_names(net: nn.Module, plan: Plan, path: str) -> dict[str, str]:
    """Modules by the names of a file's plan -> the names of ``net``; empty where the plan has those names already."""
    modules = dict(net.named_modules())
    kinds = {kind.__name__ for kind in WEIGHT_LAYERS}
    # A name may be there for a module around the layer: BasicSR's `upsample.0` is `upsample.0.upsample_conv` in MMagic.
    fitting = (m is not None and (layer.type not in kinds or hasattr(m, 'weight'))
               for layer, m in ((layer, modules.get(layer.layer)) for layer in plan))  # fmt: skip
    if all(fitting):
        return {}
    layers: dict[str, Any] = {f'{layer.layer}.weight': layer.layer for layer in plan}
    renamed: dict[str, Any] = adapt(net, layers, path)[0]  # tensors or not, only their names matter
    return _modules_of({f'{theirs}.weight': own for own, theirs in renamed.items()})


def translated(value: Any, modules: Mapping[str, str]) -> Any:
    """Plain data with module names moved: in mappings by module (whatever their depth), and in the values of those.

    >>> translated({'output': {'upsample.0': 'body.1'}, 'mean': 4}, {'upsample.0': 'up', 'body': 'trunk'})
    {'output': {'up': 'trunk.1'}, 'mean': 4}
    """
    if isinstance(value, Mapping):
        by_module = bool(value) and all(isinstance(k, str) and _known(k, modules) for k in value)
        moved = {_moved(k, modules) if by_module else k: translated(v, modules) for k, v in value.items()}
        return {k: _moved(v, modules) if by_module and isinstance(v, str) else v for k, v in moved.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(translated(v, modules) for v in value)
    return value


def _modules_of(tensors: Mapping[str, str]) -> dict[str, str]:
    """From names of tensors, theirs -> own: the names of the modules that hold them, and of those around these."""
    found: dict[str, set[str]] = {}
    for theirs, own in tensors.items():
        if theirs.endswith(('.weight', '.bias')) and own.endswith(('.weight', '.bias')):
            outer, inner = theirs.split('.')[:-1], own.split('.')[:-1]
            found.setdefault('.'.join(outer), set()).add('.'.join(inner))
            for depth in range(1, min(len(outer), len(inner))):
                found.setdefault('.'.join(outer[:depth]), set()).add('.'.join(inner[:depth]))
    return {name: next(iter(names)) for name, names in found.items() if len(names) == 1}


def _known(name: str, modules: Mapping[str, str]) -> str | None:
    """The longest module that a name begins with: of a tensor, or of a site in a forward (``body.0/add.1``)."""
    ends = [len(name), *(i for i in reversed(range(len(name))) if name[i] in './')]
    return next((name[:end] for end in ends if name[:end] in modules), None)


def _moved(name: str, modules: Mapping[str, str]) -> str:
    known = _known(name, modules)
    return name if known is None else modules[known] + name[len(known) :]


def _moved_site(name: str, modules: Mapping[str, str]) -> str:
    """The same for a tensor of a quantizer whose name is that of a site, as a module's name may be."""
    site, _, rest = name.partition('.')
    return f'{key_of(_moved(site.replace("-", "."), modules))}.{rest}'


def _basicsr_names(net: nn.Module) -> dict[str, str]:
    """Of a network of MMagic: the names that BasicSR gives its tensors, each with its own."""
    conventions = CONVENTIONS.get(BASICSR_CLASSES.get(type(net).__name__, ''), ())
    for convention in conventions:
        if convention.project == 'MMagic' and not convention.refused:
            names, _ = _rename(convention, net.state_dict())
            return _settle(net, {target: name for name, target in names.items() if target is not None})
    return {}


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


def _settle(net: nn.Module, state: dict[str, T]) -> dict[str, T]:
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
