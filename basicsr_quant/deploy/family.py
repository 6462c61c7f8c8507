"""Adaptive bits as a small family of static graphs: which configurations it has, and which patch goes to which."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import QuantError
from ..network.plan import Plan
from ..network.surgery import plan_in_force, quant_layers
from ..quantizers import AdaptiveRange, ImageBits, SelectedRange, complexity
from ..quantizers.adaptive_range import LEAST_BITS, MOST_BITS


@dataclass(frozen=True)
class Agreement:
    """How the bits of a family compare with those that the network itself chose on the same patches.

    Args:
        patches: How many.
        equal, lower: Share of decisions (a layer, a patch) in which the member has the same bits, or fewer.
    """

    patches: int
    equal: float
    lower: float


@dataclass(frozen=True)
class Family:
    """Static configurations of an adaptive network, by rising complexity of the patches that they are for.

    Args:
        bits: Of each member, bits of the input by layer.
        thresholds: A patch of complexity c goes to member i where i thresholds lie below c.
        rule: How bits and thresholds were found, in a sentence.
        agreement: None where the members are the network's own configurations.
    """

    bits: tuple[Mapping[str, int], ...]
    thresholds: tuple[float, ...]
    rule: str
    agreement: Agreement | None = None


def adapts(net: nn.Module) -> bool:
    """Whether the bits of some layer of ``net`` can be fixed, so that it becomes a static network."""
    kinds = (AdaptiveRange, SelectedRange)
    return any(isinstance(layer.input_quantizer, kinds) for layer in quant_layers(net).values())


@torch.no_grad()
def family_of(net: nn.Module, patches: Iterable[Tensor], members: int = 3) -> Family:
    """The configurations that an adaptive network is exported as.

    AdaBM: one for each b_I in -1, 0, 1 of the mapping from image to bits, which reads the input alone; so the family is
    the network. Without that mapping (``schedule: fast``) there is one.

    CADyQ: selectors read the features of every layer, so what an image will choose is known only when it is computed,
    and a network of L layers and K candidates has K^L configurations. Our reading: ``patches`` are parted by complexity
    into ``members`` groups of equal size, and in each group a layer has the least candidate that at least half of its
    patches do not exceed. Which bits a patch has thus follows its complexity alone; :class:`Agreement` says how often
    that is what its selectors chose.

    Args:
        net: Calibrated, in eval mode.
        patches: For CADyQ: (1, C, H, W), of the size that images are cut into. Not looked at for AdaBM.
        members: Of CADyQ's family.

    Raises:
        QuantError: if there are fewer patches than members, or bits that no file holds.
    """
    inputs = {name: layer.input_quantizer for name, layer in quant_layers(net).items()}
    adaptive = {name: q for name, q in inputs.items() if isinstance(q, AdaptiveRange)}
    selected = {name: q for name, q in inputs.items() if isinstance(q, SelectedRange)}
    if selected:
        return _grouped(net, selected, patches, members)
    mappings = [m for m in net.modules() if isinstance(m, ImageBits)]
    offsets = (-1, 0, 1) if mappings else (0,)
    bits = tuple(
        {name: _held(name, q, q.num_bits + int(q.layer_bits) + offset) for name, q in adaptive.items()}
        for offset in offsets
    )
    if not mappings:
        return Family(bits, (), 'bits follow the layer alone')
    lower, upper = (np.float32(float(t)) for t in (mappings[0].lower, mappings[0].upper))
    below = np.nextafter(lower, np.float32(-np.inf))  # b_I = -1 needs c < l, and members change where c > threshold
    return Family(bits, (float(below), float(upper)), "the network's own mapping from image to bits")


def frozen(net: nn.Module, bits: Mapping[str, int], plan: Plan) -> tuple[nn.Module, Plan]:
    """A copy of ``net`` whose adaptive layers have ``bits`` for every image, and its plan."""
    twin = copy.deepcopy(net)
    for name, layer in quant_layers(twin).items():
        if name in bits:
            layer.input_quantizer = layer.input_quantizer.at_bits(bits[name])  # type: ignore[union-attr, operator]
    return twin, plan_in_force(twin, plan)


def _held(name: str, quantizer: AdaptiveRange, bits: int) -> int:
    if not quantizer.limited and not LEAST_BITS <= bits <= MOST_BITS:
        raise QuantError(f"'{name}' would have {bits} bits (reference_compat: true), and files hold {LEAST_BITS} to "
                         f'{MOST_BITS}')  # fmt: skip
    return min(max(bits, LEAST_BITS), MOST_BITS)


def _grouped(
    net: nn.Module, selected: Mapping[str, SelectedRange], patches: Iterable[Tensor], members: int
) -> Family:
    context: Any = net._quant_context
    found: list[tuple[float, dict[str, int]]] = []
    for patch in patches:
        net(patch)
        found.append((float(complexity(patch)), {name: int(context.bits[name]) for name in selected}))
    if len(found) < members:
        raise QuantError(f'--members {members}: {len(found)} patches for calibration are too few; at least one each')
    found.sort(key=lambda item: item[0])
    cuts = [round(i * len(found) / members) for i in range(members + 1)]
    groups = [found[a:b] for a, b in zip(cuts, cuts[1:])]
    bits = []
    for group in groups:
        middle = math.ceil(len(group) / 2) - 1  # the upper one of two would give more than half of them too much
        bits.append({name: sorted(chosen[name] for _, chosen in group)[middle] for name in selected})
    thresholds = [(a[-1][0] + b[0][0]) / 2 for a, b in zip(groups, groups[1:])]
    pairs = [
        (member[name], chosen[name]) for member, group in zip(bits, groups) for _, chosen in group for name in selected
    ]
    agreement = Agreement(
        len(found), sum(a == b for a, b in pairs) / len(pairs), sum(a < b for a, b in pairs) / len(pairs)
    )
    rule = (
        f'{len(found)} calibration patches in {members} groups of complexity; a layer has the least bits that half of '
        "its group's patches do not exceed"
    )
    return Family(tuple(bits), tuple(thresholds), rule, agreement)
