"""What one forward pass shares: the image is measured once, and every quantizer reads the measurement."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class QuantContext:
    """Per-forward values of one network.

    The network's root begins a pass with :meth:`begin`; quantizers call :meth:`measure` with a name and a function of
    the network's input, and get the value computed at most once in that pass. Quantizers whose bits depend on the
    image leave them in ``bits``. The context is no state: nothing in it outlives the next pass, nothing is saved.
    """

    def __init__(self) -> None:
        self.input: Tensor | None = None
        self.bits: dict[str, Tensor] = {}
        self._measured: dict[str, Tensor] = {}

    def begin(self, x: Tensor) -> None:
        """Start a pass over the batch ``x`` of shape (N, C, H, W)."""
        self.input = x
        self.bits = {}
        self._measured = {}

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
        return {'input': None, 'bits': {}, '_measured': {}}
