"""A network's trace at the resolution that costs are given for, without computing a picture of that size."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from torch import nn

from ..errors import QuantError
from ..network.trace import NetworkTrace, trace

_MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 7)
"""Sides that networks ask for, in the order in which they are tried: windows of 8, 16 or 7, levels of a pyramid."""


@dataclass(frozen=True)
class SizedTrace:
    """A trace and how to read it at the wanted output size.

    Args:
        trace: Of an input of ``input_size``, or of a small one.
        factor: What the trace's MACs are multiplied by; 1 unless the trace is of a small input.
        input_size: Width and height of the network's input for the wanted output; None if it has no such thing.
        output_size: Width and height wanted.
        notes: Sentences on everything that is not simply output = scale x input.
    """

    trace: NetworkTrace
    factor: Fraction
    input_size: tuple[int, int] | None
    output_size: tuple[int, int]
    notes: tuple[str, ...] = ()

    def macs(self, counted: int) -> int:
        """MACs at the wanted size, of MACs counted in ``trace``."""
        return round(counted * self.factor)


def trace_at(net: nn.Module, *, scale: int, output_size: tuple[int, int] = (1280, 720)) -> SizedTrace:
    """Trace ``net`` for an output of ``output_size`` on the meta device, where shapes cost nothing.

    The input is ``output_size`` divided by what the network enlarges by, rounded up, and rounded up further to what
    the network's windows ask for (host models pad alike). A network that cannot run on the meta device is traced on a
    small input, and its MACs are multiplied by the ratio of the areas.

    Args:
        net: Any network that :func:`basicsr_quant.network.trace.trace` can run.
        scale: The option file's ``scale``; used where the output is not an image, else compared with the network.
        output_size: Width and height of the output in pixels.
    """
    small = trace(net)
    width, height = output_size
    notes = []
    if len(small.input_shape) < 4 or len(small.output_shape) < 4:
        notes.append(f'counted for one input of shape {_times(small.input_shape)}: input and output are no images')
        return SizedTrace(small, Fraction(1), None, output_size, tuple(notes))
    if len(small.input_shape) > 4:
        notes.append(f'counted for {small.input_shape[1]} frames at once')
    enlarges = [Fraction(o, i) for o, i in zip(small.output_shape[-2:], small.input_shape[-2:])]
    if enlarges != [scale, scale]:
        notes.append(f"the network enlarges by {_times(enlarges[::-1])}, the option file's scale is {scale}")
    exact = ceil(height / enlarges[0]), ceil(width / enlarges[1])
    if (exact[0] * enlarges[0], exact[1] * enlarges[1]) != (height, width):
        notes.append(f'{width}x{height} is no multiple of the scale: counted for an input of {exact[1]}x{exact[0]}')
    for multiple in _MULTIPLES:
        fitting = ceil(exact[0] / multiple) * multiple, ceil(exact[1] / multiple) * multiple
        try:
            full = trace(net, (*small.input_shape[:-2], *fitting), compute=False)
        except QuantError:
            continue
        if fitting != exact:
            notes.append(f'the input is padded from {exact[1]}x{exact[0]} to {fitting[1]}x{fitting[0]}')
        return SizedTrace(full, Fraction(1), fitting[::-1], output_size, tuple(notes))
    traced = small.input_shape[-2] * small.input_shape[-1]
    notes.append(f'counted on an input of {_times(small.input_shape[:-3:-1])} and multiplied by the ratio of the areas')
    return SizedTrace(small, Fraction(exact[0] * exact[1], traced), exact[::-1], output_size, tuple(notes))


def _times(numbers: object) -> str:
    return 'x'.join(str(number) for number in numbers)  # type: ignore[attr-defined]
