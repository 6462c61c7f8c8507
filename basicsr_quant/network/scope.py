"""Which layers are the body of a network, read from its structure."""

from __future__ import annotations

from math import isqrt

from torch import nn

WEIGHT_LAYERS = (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
    nn.Linear,
)


def weight_layers(net: nn.Module) -> dict[str, nn.Module]:
    """Every convolution and linear layer by name, in the order in which the network registers them.

    A module that stands in several places is named once, by its first name.
    """
    return {name: m for name, m in net.named_modules() if isinstance(m, WEIGHT_LAYERS)}


def body_layers(net: nn.Module) -> set[str]:
    """Names of the layers that the papers quantize: those inside the repeated blocks.

    The body are the outermost ``Sequential`` or ``ModuleList`` containers whose children are all blocks of one class,
    each with weight layers of its own: residual blocks, residual groups, dense blocks, transformer stages. First
    layers, the convolution behind the blocks, up-samplers and last layers lie outside it, as in the published codes
    of PAMS, DAQ, CADyQ and AdaBM. (A row of up-samplers, each one convolution to r x r times the channels with a pixel
    shuffle in its own forward, as MMagic writes them, is no row of blocks.) A network without such blocks
    (SRVGGNetCompact) counts every layer but the first and the last as body.
    """
    names = list(weight_layers(net))
    containers = [prefix for prefix, module in net.named_modules() if prefix and _is_block_container(module)]
    body = {n for n in names if any(n.startswith(c + '.') for c in containers)}
    if not body or body == set(names):
        return set(names[1:-1])
    return body


def _is_block_container(module: nn.Module) -> bool:
    if not isinstance(module, (nn.Sequential, nn.ModuleList)):
        return False
    children = list(module.children())
    kinds = {type(child) for child in children}
    if len(kinds) != 1 or isinstance(children[0], (*WEIGHT_LAYERS, nn.Sequential, nn.ModuleList)):
        return False
    return all(weight_layers(child) for child in children) and not all(_is_upsampler(child) for child in children)


def _is_upsampler(block: nn.Module) -> bool:
    layers = list(weight_layers(block).values())
    if len(layers) != 1 or not isinstance(layers[0], nn.Conv2d):
        return False
    times, rest = divmod(layers[0].out_channels, layers[0].in_channels)
    return times > 1 and not rest and isqrt(times) ** 2 == times


def block_names(net: nn.Module) -> list[str]:
    """Names of the blocks of the body, whose outputs the papers compare with those of the FP32 network.

    The children of the containers that :func:`body_layers` finds; none in a network without such blocks.
    """
    found: list[str] = []
    inside: tuple[str, ...] = ()
    for prefix, module in net.named_modules():
        if prefix and not prefix.startswith(inside or ('\0',)) and _is_block_container(module):
            inside += (f'{prefix}.',)
            found += [f'{prefix}.{child}' for child, _ in module.named_children()]
    return found
