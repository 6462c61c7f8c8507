"""The plan: which layer is quantized, to how many bits, and why. Plain data, made before anything is changed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from .sparsity_plan import SparsityPlan

FLOAT_BITS = 32
"""The number of bits that stands for floating point, in option files, plans and BitOPs."""

CANNOT = 'cannot be quantized: '
"""What the reason of a layer begins with that is in floating point although the options quantize it."""


@dataclass(frozen=True)
class LayerPlan:
    """What happens to one layer.

    Args:
        layer: Name of the module in the network, as in ``network.named_modules()``.
        type: Class name of the module, e.g. ``Conv2d``.
        w_bits: Bits of the weight; 32 stands for floating point.
        a_bits: Bits of the layer's input activation; 32 stands for floating point.
        why: The reason, in a few words: ``body``, ``first layer``, ``layers: 'conv_*'`` ...
        rectified: True if the input follows a ReLU, as read from the network's structure (never from data).
        operands: Of a module that multiplies matrices itself (attention): for each operand in the order of its forward
            whether it cannot be negative. Left operands have ``a_bits``, right ones ``w_bits``. Empty for layers.
    """

    layer: str
    type: str
    w_bits: int = FLOAT_BITS
    a_bits: int = FLOAT_BITS
    why: str = ''
    rectified: bool = False
    operands: tuple[bool, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, 'operands', tuple(self.operands))  # a file gives a list

    @property
    def is_quantized(self) -> bool:
        return self.w_bits < FLOAT_BITS or self.a_bits < FLOAT_BITS

    @property
    def has_base_bits(self) -> bool:
        """False for layers with a rule of their own, and for first and last layers at bits of their own."""
        return self.why in ('body', 'scope: all')

    @property
    def chosen(self) -> bool:
        """False for a layer that is in floating point because it cannot be quantized, not because of the options."""
        return not self.why.startswith(CANNOT)


@dataclass(frozen=True)
class TensorPlan:
    """A tensor that is quantized where it is made, so that residual additions run in integers.

    Args:
        tensor: The layer whose output it is, or the function that makes it, e.g. ``body.0/add.0``.
        bits: Bits of its grid.
        kind: ``sum`` (an addition's result), ``skip`` (an operand that other layers take too), ``branch`` (an operand
            that goes to one addition only).
        feeds: Quantized layers that take it as their input.
    """

    tensor: str
    bits: int
    kind: str
    feeds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """The plan of a whole network: its layers in the order in which the network registers them.

    ``settings`` holds, as plain data, everything else that the quantizers depend on (method, zero point,
    granularity, method options), so that a checkpoint can be rebuilt and compared without its option file.
    ``tensors`` are the tensors quantized under ``skip: quantized``, in the order of a pass. ``sparsity`` is the plan of
    N:M masks, None for dense weights.
    """

    method: str
    layers: tuple[LayerPlan, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    tensors: tuple[TensorPlan, ...] = ()
    sparsity: SparsityPlan | None = None

    def __iter__(self) -> Iterator[LayerPlan]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __str__(self) -> str:  # the host prints whole option dictionaries
        return f'<plan: {self.method}, {len(self.quantized)} of {len(self)} layers quantized>'

    @property
    def quantized(self) -> tuple[LayerPlan, ...]:
        """The layers with a quantized weight or input."""
        return tuple(layer for layer in self.layers if layer.is_quantized)

    def to_plain(self) -> dict[str, Any]:
        """Return dictionaries, lists, strings and numbers only: what a checkpoint or a JSON file can hold."""
        layers = [asdict(layer) for layer in self.layers]
        plain: dict[str, Any] = {'method': self.method, 'layers': layers, 'settings': self.settings}
        tensors = [{**asdict(tensor), 'feeds': list(tensor.feeds)} for tensor in self.tensors]
        if tensors:
            plain['tensors'] = tensors
        if self.sparsity is not None:
            plain['sparsity'] = self.sparsity.to_plain()
        return plain

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> Plan:
        """Rebuild a plan from :meth:`to_plain`; keys added by a newer version are ignored."""
        known = {f.name for f in fields(LayerPlan)}
        layers = tuple(LayerPlan(**{k: v for k, v in layer.items() if k in known}) for layer in plain['layers'])
        tensors = tuple(
            TensorPlan(tensor['tensor'], tensor['bits'], tensor['kind'], tuple(tensor['feeds']))
            for tensor in plain.get('tensors', ())
        )
        sparsity = SparsityPlan.from_plain(plain['sparsity']) if plain.get('sparsity') else None
        return cls(plain['method'], layers, dict(plain.get('settings', {})), tensors, sparsity)
