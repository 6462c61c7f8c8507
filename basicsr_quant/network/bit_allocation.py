"""Which layer gets how many bits, under a mean: those that the output feels most get more."""

from __future__ import annotations

from collections.abc import Mapping


def allocate_bits(
    errors: Mapping[str, Mapping[int, float]], mean_bits: float, *costs: Mapping[str, float]
) -> dict[str, int]:
    """Bits of each layer that make the sum of errors small, with their mean by each cost at most ``mean_bits``.

    Every layer starts at its fewest bits; one bit after another goes to the layer whose error falls most for what it
    is paid with, by the first cost. Where errors fall ever more slowly with the bits (quantization noise falls to about
    a quarter with each) this is the best allocation but for the last bit. If ``mean_bits`` for every layer errs less,
    that is the answer.

    Args:
        errors: Layer -> bits -> error of the network's output; the same consecutive numbers of bits for each layer.
        mean_bits: Not below the fewest bits. The bits may count from anything: offsets from a base have the mean 0.
        costs: Layer -> price of a bit, such as multiply-accumulates, or 1 for the plain mean.

    >>> macs = {'a': 1, 'b': 1}
    >>> allocate_bits({'a': {3: 9, 4: 3, 5: 1}, 'b': {3: 2, 4: 1, 5: 0.5}}, 4, macs)
    {'a': 5, 'b': 3}
    """
    bits = {name: min(choices) for name, choices in errors.items()}
    left = [sum((mean_bits - bits[name]) * cost[name] for name in bits) for cost in costs]

    def affordable(name: str) -> bool:
        return all(cost[name] <= rest * (1 + 1e-9) for cost, rest in zip(costs, left))

    while True:
        gains = {
            name: (errors[name][b] - errors[name][b + 1]) / costs[0][name]
            for name, b in bits.items()
            if b + 1 in errors[name] and affordable(name)
        }
        best = max(gains, key=lambda name: gains[name], default=None)
        if best is None or gains[best] <= 0:
            break
        bits[best] += 1
        left = [rest - cost[best] for cost, rest in zip(costs, left)]
    if all(mean_bits in choices for choices in errors.values()):
        uniform = dict.fromkeys(bits, int(mean_bits))
        return min(bits, uniform, key=lambda chosen: sum(errors[name][b] for name, b in chosen.items()))
    return bits
