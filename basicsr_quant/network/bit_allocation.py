"""Which layer gets how many bits, under a mean: those that the output feels most get more."""

from __future__ import annotations

from collections.abc import Mapping


def allocate_bits(
    errors: Mapping[str, Mapping[int, float]], macs: Mapping[str, float], mean_bits: float
) -> dict[str, int]:
    """Bits of each layer that make the sum of errors small, with their mean by MACs at most ``mean_bits``.

    Every layer starts at its fewest bits; one bit after another goes to the layer whose error falls most for each MAC
    it is paid with. Where errors fall ever more slowly with the bits (quantization noise falls to about a quarter with
    each) this is the best allocation but for the last bit.

    Args:
        errors: Layer -> bits -> error of the network's output; the same consecutive numbers of bits for each layer.
        macs: Layer -> multiply-accumulates.
        mean_bits: Not below the fewest bits.

    >>> allocate_bits({'a': {3: 9, 4: 3, 5: 1}, 'b': {3: 2, 4: 1, 5: 0.5}}, {'a': 1, 'b': 1}, 4)
    {'a': 5, 'b': 3}
    """
    bits = {name: min(choices) for name, choices in errors.items()}
    left = sum((mean_bits - bits[name]) * macs[name] for name in bits)
    while True:
        gains = {
            name: (errors[name][b] - errors[name][b + 1]) / macs[name]
            for name, b in bits.items()
            if b + 1 in errors[name] and macs[name] <= left * (1 + 1e-9)
        }
        if not gains:
            return bits
        best = max(gains, key=lambda name: gains[name])
        if gains[best] <= 0:
            return bits
        bits[best] += 1
        left -= macs[best]
