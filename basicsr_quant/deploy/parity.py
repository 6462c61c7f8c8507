"""The proof that a file computes what the plan says: simulator against ONNX Runtime, and PSNR of every engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Optional

import torch
from torch import Tensor, fx, nn

from ..errors import QuantError
from ..network.surgery import quantizers
from . import engines
from .capture import IntegerPlan
from .float_regions import with_engine_regions
from .graph import aten, attribute
from .simulator import Simulator

DIFFERING = 1e-4
"""Share of output values that may differ from ONNX Runtime's at all (0.01 %); none may by more than one level."""
TOLERANCE = 0.02
"""dB by which an engine's PSNR may miss that of ``basicsr test`` at 8 bits."""


@dataclass(frozen=True)
class ParityImage:
    """One image: name, network input (1, C, H, W), and what its output is compared with, if anything."""

    name: str
    image: Tensor
    truth: Any = None


@dataclass
class Parity:
    """What was measured; PSNR in dB, means over the images that have a ground truth, None where none has.

    Attributes:
        images: Where the images come from, and how many.
        values: Output values compared between simulator and ONNX Runtime, as uint8.
        differing: Share of them that differ at all.
        largest: Largest difference in levels.
        psnr: By who computed: ``test`` (the fake-quantized network, as ``basicsr test``), ``plan`` (the network on the
            file's own grids), ``simulator``, ``onnxruntime``, ``openvino``.
    """

    images: str
    count: int = 0
    values: int = 0
    differing: float = 0.0
    largest: int = 0
    psnr: dict[str, Optional[float]] = field(default_factory=dict)  # noqa: UP045 (read at run time, Python 3.9)

    def to_plain(self) -> dict[str, Any]:
        """Plain data for ``model.json``."""
        return {
            'images': self.images,
            'count': self.count,
            'simulator_vs_onnxruntime': {
                'values': self.values, 'differing': self.differing, 'largest_difference': self.largest,
            },
            'psnr': self.psnr,
        }  # fmt: skip

    def check(self, plan: IntegerPlan, bits: int) -> None:
        """Refuse a file that does not compute what it should.

        Raises:
            QuantError: with the figures.
        """
        # ONNX Runtime runs convolutions of an OpenVINO file in floating point, where its summation is its own.
        if plan.engine == 'onnxruntime' and (self.differing > DIFFERING or self.largest > 1):
            raise QuantError(
                f'parity failed: {100 * self.differing:.4f} % of the output values of ONNX Runtime differ from the '
                f'integer simulator, by up to {self.largest}; allowed: {100 * DIFFERING:g} %, by 1'
            )
        engine = 'openvino' if plan.engine == 'openvino' else 'onnxruntime'
        reference = 'plan' if plan.realigned else 'test'
        found, wanted = self.psnr.get(engine), self.psnr.get(reference)
        if bits == 8 and found is not None and wanted is not None and abs(found - wanted) > TOLERANCE:
            raise QuantError(
                f'parity failed: PSNR in {engine} is {found:.3f} dB, {wanted:.3f} dB in PyTorch; '
                f'allowed difference at 8 bits: {TOLERANCE} dB'
            )


def to_levels(output: Tensor, pixel_range: float = 1.0) -> Tensor:
    """Clip and round an output to the 256 levels of an 8-bit image."""
    return (output.float() * (255.0 / pixel_range)).clamp(0, 255).round()


@torch.no_grad()
def measure(
    net: nn.Module,
    plan: IntegerPlan,
    model: bytes | str,
    images: Sequence[ParityImage],
    source: str,
    psnr: Callable[[Tensor, Any], float],
    *,
    openvino: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> Parity:
    """Run all of them over the same images.

    Args:
        net: The quantized network, in eval mode on the CPU.
        plan: What was exported.
        model: The file, as bytes or path.
        images: At least one.
        source: Where they come from.
        psnr: PSNR of an output against :attr:`ParityImage.truth`.
        openvino: Run OpenVINO too (f32).
        report: Called with a line for each image.
    """
    simulator = Simulator(with_engine_regions(plan.graph), engine_layers(plan.graph))
    runs: dict[str, engines.Run] = {'plan': plan.graph, 'simulator': simulator}
    runs['onnxruntime'] = engines.onnxruntime_runner(model)
    if openvino:
        runs['openvino'] = engines.openvino_runner(model)
    found = Parity(source)
    sums: dict[str, list[float]] = {}
    for item in images:
        outputs = {name: run(item.image) for name, run in runs.items()}
        with switched_off(net, plan.left_out):
            outputs = {'test': net(item.image), **outputs}
        apart = (to_levels(outputs['simulator']) - to_levels(outputs['onnxruntime'])).abs()
        found.count += 1
        found.differing += float((apart > 0).sum())
        found.values += apart.numel()
        found.largest = max(found.largest, int(apart.max()))
        if item.truth is not None:
            for name, output in outputs.items():
                sums.setdefault(name, []).append(psnr(output, item.truth))
        report(f'{item.name}: {int((apart > 0).sum())} of {apart.numel()} values differ')
    found.differing /= max(1, found.values)
    found.psnr = {name: sum(values) / len(values) for name, values in sums.items()}
    return found


@contextmanager
def switched_off(net: nn.Module, names: Sequence[str]) -> Any:
    """Within it the quantizers of these names pass their input on."""
    held = [q for name, q in quantizers(net).items() if name in names]
    with ExitStack() as stack:
        for quantizer in held:
            stack.callback(setattr, quantizer, 'enabled', quantizer.enabled)
            quantizer.enabled = False
        yield


def engine_layers(graph: fx.GraphModule) -> dict[str, engines.Run]:
    """Convolutions with weights in floating point, each as a one-layer file in ONNX Runtime, by node name."""
    found: dict[str, engines.Run] = {}
    for node in graph.graph.nodes:
        weight = attribute(graph, node.args[1]) if node.target is aten.conv2d.default else None
        if weight is not None and all(not isinstance(argument, str) for argument in node.args):
            bias = attribute(graph, node.args[2]) if len(node.args) > 2 else None
            found[node.name] = engines.onnxruntime_runner(_one_layer(weight, bias, *node.args[3:]))
    return found


def _one_layer(
    weight: Tensor, bias: Tensor | None, stride: Any = (1, 1), padding: Any = (0, 0), dilation: Any = (1, 1),
    groups: int = 1,
) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    def pair(value: Any) -> list[int]:
        return list(value) * (2 // len(value)) if isinstance(value, (list, tuple)) else [value, value]

    inputs = ['x', 'weight'] + (['bias'] if bias is not None else [])
    node = helper.make_node(
        'Conv', inputs, ['y'], strides=pair(stride), pads=pair(padding) * 2, dilations=pair(dilation), group=groups
    )
    constants = [numpy_helper.from_array(weight.detach().numpy(), 'weight')]
    constants += [numpy_helper.from_array(bias.detach().numpy(), 'bias')] if bias is not None else []
    shape: list[Any] = ['n', weight.shape[1] * groups, 'h', 'w']
    given = helper.make_tensor_value_info('x', TensorProto.FLOAT, shape)
    made = helper.make_tensor_value_info('y', TensorProto.FLOAT, ['n', weight.shape[0], 'oh', 'ow'])
    model = helper.make_model(
        helper.make_graph([node], 'layer', [given], [made], constants), opset_imports=[helper.make_opsetid('', 21)],
        ir_version=10,
    )
    return model.SerializeToString()  # type: ignore[no-any-return]
