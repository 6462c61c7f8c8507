"""What the bits of one layer's activation do to the network's output."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..quantizers import Quantizer, fake_quantize
from .calibration import evaluating
from .surgery import floating_point

OFFSETS = (-1, 0, 1)


def output_errors(
    net: nn.Module,
    images: Iterable[Tensor],
    quantizers: Mapping[str, Quantizer],
    ranges: Mapping[tuple[str, int], tuple[Tensor, Tensor]],
) -> tuple[dict[str, dict[int, float]], dict[str, int]]:
    r"""Expected squared error of the network's output when one layer's input has base bits - 1, + 0 or + 1.

    To first order the output moves by J e for an error e of the layer's input. For v of random signs
    E (v^T J e)^2 = ||J e||^2, and g = J^T v comes from one backward pass for all layers at once; with rounding errors
    that are independent and of mean zero, that is sum g^2 e^2, which is what is summed here.

    Args:
        net: The network; computes in floating point meanwhile.
        images: Inputs (N, C, H, W), one backward pass each.
        quantizers: The input quantizers to measure, by layer.
        ranges: (layer, offset) -> lower, upper for that many bits.

    Returns:
        layer -> offset -> error, summed over the images, and layer -> MACs of the last image.
    """
    errors = {name: dict.fromkeys(OFFSETS, 0.0) for name in quantizers}
    macs: dict[str, int] = {}
    inputs: dict[str, Tensor] = {}
    modules = dict(net.named_modules())
    handles = []

    for name in quantizers:

        def keep(module: nn.Module, args: tuple[Tensor, ...], name: str = name) -> tuple[Tensor, ...]:
            # A view of its own: what else reads this tensor, such as a skip connection, is no business of the layer.
            inputs[name] = args[0].view_as(args[0])
            return inputs[name], *args[1:]

        def count(module: Any, args: tuple[Tensor, ...], output: Tensor, name: str = name) -> None:
            # Each value that the rows of the weight stand for, (outputs, or inputs if transposed), takes part in a row.
            values = args[0] if getattr(module, 'transposed', False) else output
            macs[name] = values.numel() // module.weight.shape[0] * module.weight.numel()

        handles += [modules[name].register_forward_pre_hook(keep), modules[name].register_forward_hook(count)]
    device = next(net.parameters()).device
    draw = torch.Generator().manual_seed(0)
    try:
        with torch.enable_grad(), evaluating(net), floating_point(net):
            for image in images:
                output = net(image.to(device).requires_grad_(True))
                signs = torch.randint(2, output.shape, generator=draw).to(output) * 2 - 1
                gradients = torch.autograd.grad(output, list(inputs.values()), signs, allow_unused=True)
                with torch.no_grad():
                    for (name, x), gradient in zip(inputs.items(), gradients):
                        if gradient is None:
                            continue
                        quantizer, squares = quantizers[name], gradient.square()
                        for offset in OFFSETS:
                            bounds, bits = ranges[name, offset], quantizer.num_bits + offset
                            error = fake_quantize(x, *bounds, bits, zero_point=quantizer.zero_point).sub_(x).square_()
                            errors[name][offset] += float((error * squares).sum())
                inputs.clear()
    finally:
        for handle in handles:
            handle.remove()
    return errors, macs
