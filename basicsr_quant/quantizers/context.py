"""What one forward pass shares: the image is measured once, and every quantizer reads the measurement."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor, nn


class NetworkMeasure(nn.Module):
    """A module of a quantized network as a whole: maps the network's input (N, C, H, W) to what quantizers read.

    The surgery registers it once, under ``quant_measures`` of the root network; its tensors are saved there.
    """


def floating_bytes(module: nn.Module) -> int:
    """Bytes of a module's floating-point tensors, parameters and buffers."""
    tensors = (*module.parameters(), *module.buffers())
    return sum(t.numel() * t.element_size() for t in tensors if t.is_floating_point())


class QuantContext:
    """Per-forward values of one network.

    The network's root begins a pass with :meth:`begin`; quantizers call :meth:`measure` with a name and a function of
    the network's input, or :meth:`read` with the name of one of the running network's ``measures``, and get the value
    computed at most once in that pass. Quantizers whose bits depend on the image leave them in ``bits``, one value for
    each image (or one for all) by the layer's name; where the choice learns, ``expected_bits`` holds their expectation
    with its gradient, and ``choices`` the weights (N, K) of candidates, for a layer's weight that follows the choice
    and leaves its bits in ``weight_bits``; gates of bounds leave their logits in ``gates``. The context is no state:
    nothing in it outlives the next pass, nothing is saved.
    """

    def __init__(self) -> None:
        self.input: Tensor | None = None
        self.bits: dict[str, Tensor] = {}
        self.expected_bits: dict[str, Tensor] = {}
        self.choices: dict[str, Tensor] = {}
        self.weight_bits: dict[str, Tensor] = {}
        self.gates: dict[str, Tensor] = {}
        self.measures: Mapping[str, Callable[[Tensor], Tensor]] = {}
        self._measured: dict[str, Tensor] = {}

    def begin(self, x: Tensor) -> None:
        """Start a pass over the batch ``x`` of shape (N, C, H, W)."""
        self.input = x
        self.bits = {}
        self.expected_bits = {}
        self.choices = {}
        self.weight_bits = {}
        self.gates = {}
        self._measured = {}

    def read(self, name: str) -> Tensor:
        """The value of the network's measure ``name`` for this pass."""
        return self.measure(name, self.measures[name])

    def measure(self, name: str, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return ``function(input)``, computed once per pass and name."""
        if self.input is None:
            raise RuntimeError('a quantizer read the context outside a forward pass of its network')
        if name not in self._measured:
            self._measured[name] = function(self.input)
        return self._measured[name]

    def __deepcopy__(self, memo: dict[int, object]) -> QuantContext:
        # A copied network (EMA) gets a context of its own; the tensors of a pass are nothing to copy.
        copy = QuantContext()
        memo[id(self)] = copy
        return copy

    def __getstate__(self) -> dict[str, object]:
        return vars(QuantContext())
