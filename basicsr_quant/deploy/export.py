"""From a quantized network to a proven file: plan, file in memory, parity, checks, and only then the disk."""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..errors import QuantError
from ..network.additions import CONTAINER, key_of
from ..network.integer_tensors import executed
from ..network.plan import FLOAT_BITS, Plan
from ..version import __version__
from . import checker
from .capture import IntegerPlan, integer_plan
from .engines import openvino_core
from .files import check_writable, write_bytes
from .onnx_file import OPSET, check_opset, need, packed_onnx
from .parity import Parity, ParityImage, measure
from .tensorrt import check_tensorrt

SUFFIXES = ('.onnx', '.xml')


@dataclass(frozen=True)
class Exported:
    """What an export gave: the plan, the parity figures, the findings in each engine, and bytes on disk."""

    plan: IntegerPlan
    parity: Parity
    findings: list[checker.Findings]
    file_bytes: int


def check_target(path: str, engine: str) -> None:
    """Refuse a file that cannot be written, before any work.

    Raises:
        QuantError: naming the path and what is allowed.
    """
    target = Path(path)
    if target.suffix not in SUFFIXES:
        raise QuantError(f"-o {path}: a name that ends in .onnx is needed, or in .xml for OpenVINO's own format")
    if target.suffix == '.xml' and engine != 'openvino':
        raise QuantError(f'-o {path}: OpenVINO files are made with --engine openvino; {engine} reads .onnx')
    if target.is_dir():
        raise QuantError(f'-o {path} is a folder; give the name of a file')
    check_writable(target.parent, f'-o {path}')


def export(
    net: nn.Module,
    plan: Plan,
    path: str,
    *,
    shape: tuple[int, ...],
    images: Sequence[ParityImage],
    source: str,
    psnr: Callable[[Tensor, Any], float],
    engine: str = 'onnxruntime',
    opset: int = OPSET,
    dynamic: bool = True,
    facts: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> Exported:
    """Export ``net`` to ``path`` and ``path`` with suffix .json, proven first: a file that fails is not left behind.

    Args:
        net: A quantized, calibrated network in eval mode on the CPU.
        plan: Its plan.
        path: ``.onnx``, or ``.xml`` for OpenVINO's own format (``.bin`` beside it).
        shape: An input shape that the network takes.
        images, source, psnr: What parity is measured on, see :func:`.parity.measure`.
        engine: One of :data:`~basicsr_quant.network.integer_tensors.ENGINES`. OpenVINO adds the branch of a residual
            block without rounding it first: its file, and the PyTorch network it is compared with, leave those
            quantizers out.
        opset: ONNX opset.
        dynamic: Let height and width be free.
        facts: Goes into the JSON file as it is: scale, checkpoint ...
        report: Called with lines for the screen.

    Raises:
        QuantError: if the network cannot be exported, the file cannot be written, or parity fails.
    """
    check_target(path, engine)
    check_opset(opset, engine)
    need('onnx', 'onnxscript', 'onnxruntime', *(('openvino',) if engine == 'openvino' else ()))
    left_out = left_out_names(plan, engine)
    lowered = integer_plan(net, shape, engine, dynamic=dynamic, leave_out=lambda name: name in left_out)
    model = packed_onnx(lowered, opset)
    content = model.SerializeToString()
    has_openvino = _installed('openvino')
    parity = measure(net, lowered, content, images, source, psnr, openvino=has_openvino, report=report)
    findings = [checker.check_onnxruntime(lowered, content)]
    if has_openvino:
        findings.append(checker.check_openvino(lowered, content))
    if engine == 'tensorrt':
        findings.append(check_tensorrt(model))
    for line in summary(lowered, parity, findings):
        report(line)
    parity.check(lowered, _bits(plan))
    faults = [fault for found in findings for fault in found.faults]
    if faults:
        raise QuantError(f'the graph is not clean: {faults[0]}' + (f' ({len(faults)} faults)' if faults[1:] else ''))
    size = _write(content, path)
    card = _card(plan, lowered, parity, findings, size, opset, dict(facts or {}))
    write_bytes(Path(path).with_suffix('.json'), (json.dumps(card, indent=2) + '\n').encode())
    return Exported(lowered, parity, findings, size)


def left_out_names(plan: Plan, engine: str) -> set[str]:
    """Names of the quantizers that an engine would not execute, or better does without."""
    kept = executed(plan.tensors, engine)
    return {f'{CONTAINER}.{key_of(tensor.tensor)}' for tensor in plan.tensors if tensor not in kept}


def summary(plan: IntegerPlan, parity: Parity, findings: Sequence[checker.Findings]) -> list[str]:
    """What is printed after an export."""
    lines = [
        f'simulator against ONNX Runtime on {parity.count} images ({parity.images}): '
        f'{100 * parity.differing:.4f} % of {parity.values} values differ, none by more than {parity.largest}'
    ]
    if parity.psnr:
        names = {'test': 'basicsr test', 'plan': "PyTorch, the file's grids", 'simulator': 'integer simulator',
                 'onnxruntime': 'ONNX Runtime', 'openvino': 'OpenVINO (f32)'}  # fmt: skip
        lines.append('PSNR: ' + ', '.join(f'{names[k]} {v:.3f} dB' for k, v in parity.psnr.items() if v is not None))
    if plan.realigned:
        change = ''
        if parity.psnr:
            change = f'; PSNR {(parity.psnr["plan"] or 0) - (parity.psnr["test"] or 0):+.3f} dB'
        lines.append(
            f'{len(plan.realigned)} grids moved onto integer codes, {plan.realigned[0]} first '
            f'(by up to {largest_shift(plan):.2f} steps){change}'
        )
    if plan.left_out:
        lines.append(
            f'{len(plan.left_out)} quantizers before additions and functions are left out: {plan.engine} fuses those; '
            'the figures above are without them'
        )
    return lines + [line for found in findings for line in found.lines()]


def largest_shift(plan: IntegerPlan) -> float:
    """How far the grids of the file lie from the checkpoint's, in steps."""
    shifts = [grid.shift for grid in plan.activations.values()] + [found.error for found in plan.weights.values()]
    return max(shifts, default=0.0)


def _write(content: bytes, path: str) -> int:
    if Path(path).suffix == '.onnx':
        write_bytes(path, content)
        return len(content)
    import openvino

    with tempfile.TemporaryDirectory() as folder:
        onnx_path, xml = os.path.join(folder, 'model.onnx'), os.path.join(folder, 'model.xml')
        Path(onnx_path).write_bytes(content)
        openvino.save_model(openvino_core().read_model(onnx_path), xml, compress_to_fp16=False)
        parts = {suffix: Path(folder, f'model{suffix}').read_bytes() for suffix in ('.bin', '.xml')}
    for suffix, part in parts.items():  # the .xml last: without it nobody looks for the other
        write_bytes(Path(path).with_suffix(suffix), part)
    return sum(map(len, parts.values()))


def _card(
    plan: Plan, lowered: IntegerPlan, parity: Parity, findings: Sequence[checker.Findings], size: int, opset: int,
    facts: dict[str, Any],
) -> dict[str, Any]:
    layers = plan.quantized
    return {
        **facts,
        'method': plan.method,
        'w_bits': sorted({layer.w_bits for layer in layers}),
        'a_bits': sorted({layer.a_bits for layer in layers}),
        'skip': 'quantized' if plan.tensors else 'fp',
        'tensors': [{'tensor': t.tensor, 'bits': t.bits, 'kind': t.kind} for t in plan.tensors],
        'input': {'name': 'input', 'shape': [1, lowered.shape[1], *_sides(lowered)], 'type': 'float32'},
        'engine': lowered.engine,
        'opset': opset,
        'file_bytes': size,
        'realigned': {'grids': lowered.realigned, 'largest_shift': largest_shift(lowered)},
        'left_out': lowered.left_out,
        'parity': parity.to_plain(),
        'nodes': {found.engine: {'integer': found.integer, 'float': found.floating} for found in findings},
        'float_nodes': [{'node': n.layer or n.name, 'kind': n.kind, 'why': n.why} for n in lowered.nodes if n.why],
        'versions': versions(),
    }


def _sides(lowered: IntegerPlan) -> list[Any]:
    return ['height', 'width'] if lowered.dynamic else list(lowered.shape[2:])


def _bits(plan: Plan) -> int:
    """The fewest bits of a quantized layer."""
    return min(min(layer.w_bits, layer.a_bits) for layer in plan.quantized) if plan.quantized else FLOAT_BITS


def versions() -> dict[str, str]:
    """Of this package and of those that a file comes from."""
    from importlib.metadata import PackageNotFoundError, version

    found = {'basicsr_quant': __version__}
    for name in ('torch', 'onnx', 'onnxscript', 'onnxruntime', 'openvino'):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _installed(package: str) -> bool:
    import importlib.util

    return importlib.util.find_spec(package) is not None
