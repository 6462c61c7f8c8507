"""Latency of one network in every engine: the same input, in turn, as ratios."""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QuantError
from ..network.plan import Plan
from ..network.surgery import floating_point
from ..network.trace import NetworkTrace, trace
from . import engines
from .capture import IntegerPlan, float_graph, integer_plan
from .export import left_out_names
from .float_time import onnxruntime_float_share, openvino_float_share
from .onnx_file import packed_onnx, to_onnx

GAIN = 4.0
"""How many times more multiply-adds the VNNI instructions do on 8 bits than FMA does in float32."""
_FLOAT_SHARE = {'ONNX Runtime': onnxruntime_float_share, 'OpenVINO': openvino_float_share}
_INT8_FLAGS = ('avx512_vnni', 'avx_vnni', 'amx_int8')


@dataclass(frozen=True)
class Row:
    """One way to run the network.

    Attributes:
        name: The engine.
        number: Format of weights and activations.
        seconds: Median latency.
        file_bytes: Size of the file; None for PyTorch.
        peak_bytes: What loading and one run add to the memory of a fresh process; None for PyTorch.
        bound: Most that int8 could gain over the engine's fp32 by the share of multiply-accumulates that run in
            integers, see :func:`bound_by_macs`; None for other rows.
        time_bound: The same by the time that is left to floating point, see :func:`bound_by_time`.
    """

    name: str
    number: str
    seconds: float
    file_bytes: int | None = None
    peak_bytes: int | None = None
    bound: float | None = None
    time_bound: float | None = None


def has_int8_instructions() -> bool | None:
    """Whether this processor multiplies 8-bit numbers faster; None where that cannot be read."""
    try:
        flags = Path('/proc/cpuinfo').read_text()
    except OSError:
        return None
    return any(flag in flags.split() for flag in _INT8_FLAGS)


@torch.no_grad()
def compare(
    net: nn.Module,
    plan: Plan,
    image: Tensor,
    rounds: int = 5,
    *,
    threads: int | None = None,
    compiled: bool = True,
    memory: bool = True,
    report: Callable[[str], None] = lambda line: None,
) -> list[Row]:
    """Time ``net`` in PyTorch, ONNX Runtime and OpenVINO (where it is installed), FP32 and quantized.

    Args:
        net: The quantized network, calibrated, in eval mode on the CPU; its FP32 rows run it with quantizers off.
        plan: Its plan.
        image: (1, C, H, W).
        rounds: Rounds in which each one runs once, one after another, so that drift falls on all.
        threads: Threads of every engine; None leaves the choice to each.
        compiled: Time ``torch.compile`` too, which needs a C++ compiler; left out where it fails.
        memory: Measure peak memory, each in a process of its own.
        report: Called with lines for the screen.

    Returns:
        The rows, PyTorch eager first.
    """
    shape = tuple(image.shape)
    traced = trace(net, shape, compute=False)
    bounds: dict[tuple[str, str], float] = {}
    left_out = left_out_names(plan, 'openvino')
    lowered = integer_plan(net, shape, 'onnxruntime')
    bounds['ONNX Runtime', 'int8'] = bound_by_macs(lowered, traced)
    with floating_point(net):
        plain, batched = float_graph(net, shape)
    runs: dict[tuple[str, str], engines.Run] = {('PyTorch eager', 'fp32'): plain}
    if compiled:
        fast = _compiled(plain, image, report)
        runs.update({('torch.compile', 'fp32'): fast} if fast is not None else {})
    with tempfile.TemporaryDirectory() as folder:
        files = {'fp32': _save(to_onnx(plain, shape, batched=batched), folder, 'fp32')}
        files['int8'] = _save(packed_onnx(lowered), folder, 'int8')
        where: dict[tuple[str, str], tuple[Path, str | None]] = {
            ('ONNX Runtime', 'fp32'): (files['fp32'], None), ('ONNX Runtime', 'int8'): (files['int8'], None),
        }  # fmt: skip
        if _has_openvino():
            placed = integer_plan(net, shape, 'openvino', leave_out=lambda name: name in left_out)
            bounds['OpenVINO', 'int8'] = bound_by_macs(placed, traced)
            files['openvino'] = _save(packed_onnx(placed), folder, 'openvino')
            where[('OpenVINO', 'fp32')] = (files['fp32'], 'f32')
            where[('OpenVINO', 'bf16')] = (files['fp32'], 'bf16')
            where[('OpenVINO', 'int8')] = (files['openvino'], 'f32')
        else:
            report('OpenVINO is not installed, its rows are left out: pip install openvino')
        for key, (path, precision) in where.items():
            if key[0] == 'OpenVINO':
                runs[key] = engines.openvino_runner(str(path), precision=precision, threads=threads)
            else:
                runs[key] = engines.onnxruntime_runner(str(path), threads=threads)
        seconds = {key: statistics.median(values) for key, values in _in_turn(runs, image, rounds).items()}
        rows = []
        for key, median in seconds.items():
            size = peak = limit = None
            if key in where:
                file, precision = where[key]
                engine = 'openvino' if key[0] == 'OpenVINO' else 'onnxruntime'
                size = file.stat().st_size
                peak = _peak(file, engine, precision, shape, threads) if memory else None
                if key in bounds:
                    share = _FLOAT_SHARE[key[0]](str(file), image, threads)
                    limit = bound_by_time(seconds[key[0], 'fp32'], share * median)
            rows.append(Row(*key, median, size, peak, bounds.get(key), limit))
    return rows


def table(rows: list[Row]) -> tuple[list[str], list[list[Any]]]:
    """Header and cells: latency as ratios to PyTorch eager and to the same engine's fp32."""
    eager = rows[0].seconds
    own = {row.name: row.seconds for row in rows if row.number == 'fp32'}
    header = ['engine', 'numbers', 'x PyTorch eager', "x the engine's fp32", 'at most by MACs', 'by time',
              'ms (median)', 'file bytes', 'peak MiB']  # fmt: skip
    return header, [
        [
            row.name, row.number, f'{eager / row.seconds:.2f}x', f'{own[row.name] / row.seconds:.2f}x',
            *(None if bound is None else f'{bound:.2f}x' for bound in (row.bound, row.time_bound)),
            f'{1000 * row.seconds:.1f}', row.file_bytes,
            None if row.peak_bytes is None else round(row.peak_bytes / 2**20),
        ]
        for row in rows
    ]  # fmt: skip


def bound_by_macs(plan: IntegerPlan, traced: NetworkTrace) -> float:
    """Most that integers can gain, with the share of multiply-accumulates that run in them (Amdahl):
    1 / ((1 - share) + share / 4)."""
    integer = {node.layer for node in plan.nodes if node.integer and node.layer}
    done = sum(layer.macs for layer in traced.layers if layer.name in integer)
    share = done / traced.macs if traced.macs else 0.0
    return 1 / ((1 - share) + share / GAIN)


def bound_by_time(fp32: float, left: float) -> float:
    """Most that integers can gain over a pass of ``fp32`` seconds of which ``left`` stay in floating point:
    fp32 / (left + (fp32 - left) / 4). What moves data without a multiplication counts here, as it does in the engine.

    >>> bound_by_time(1.0, 0.2)
    2.5
    """
    return fp32 / (left + max(0.0, fp32 - left) / GAIN)


def _in_turn(
    runs: dict[tuple[str, str], engines.Run], image: Tensor, rounds: int
) -> dict[tuple[str, str], list[float]]:
    for run in runs.values():
        run(image)
    seconds: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            start = time.perf_counter()
            run(image)
            seconds[key].append(time.perf_counter() - start)
    return seconds


def _compiled(net: nn.Module, image: Tensor, report: Callable[[str], None]) -> engines.Run | None:
    try:
        fast = torch.compile(net)
        fast(image)
        return fast  # type: ignore[no-any-return]
    except Exception as error:  # no compiler, or a graph it does not take
        report(f'torch.compile is left out: {type(error).__name__}: {" ".join(str(error).split())[:120]}')
        return None


def _save(model: Any, folder: str, name: str) -> Path:
    path = Path(folder, f'{name}.onnx')
    path.write_bytes(model.SerializeToString())
    return path


def _has_openvino() -> bool:
    import importlib.util

    return importlib.util.find_spec('openvino') is not None


_PEAK = """
import {package}
from basicsr_quant.deploy import engines
import torch
def peak():
    for line in open('/proc/self/status'):
        if line.startswith('VmHWM'):
            return int(line.split()[1]) * 1024
image = torch.rand({shape})
before = peak()
run = engines.{engine}_runner({path!r}, threads={threads}{precision})
run(image)
print(peak() - before)
"""


def _peak(path: Path, engine: str, precision: str | None, shape: tuple[int, ...], threads: int | None) -> int | None:
    """Growth of the resident peak of a fresh process while the file is loaded and run once."""
    if not Path('/proc/self/status').exists():
        return None
    extra = '' if precision is None else f', precision={precision!r}'
    script = _PEAK.format(package=engine, shape=shape, engine=engine, path=str(path), threads=threads, precision=extra)
    done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, check=False)
    if done.returncode:
        raise QuantError(f'measuring the memory of {path.name} failed: {done.stderr.strip().splitlines()[-1]}')
    return int(done.stdout.split()[-1])
