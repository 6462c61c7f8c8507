"""Running exported files: ONNX Runtime and OpenVINO, and what they made of the graph."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import QuantError
from .onnx_file import need

Run = Callable[[Tensor], Tensor]
"""A network behind an engine: (N, C, H, W) float32 in, the same out."""


class Runner:
    """A network behind an engine.

    Args:
        engine: Its name.
        compute: (N, C, H, W) in, the same out.
        shape: Of the input, None where a side is free.

    Raises:
        QuantError: in a call, if the engine fails.
    """

    def __init__(self, engine: str, compute: Callable[[np.ndarray], np.ndarray], shape: Sequence[int | None]) -> None:
        self.engine, self.compute, self.shape = engine, compute, tuple(shape)

    def __call__(self, image: Tensor) -> Tensor:
        try:
            return torch.from_numpy(self.compute(np.ascontiguousarray(image.numpy())))
        except Exception as error:  # out of memory, an input that the file does not take ...
            shape = 'x'.join(map(str, image.shape))
            raise QuantError(f'{self.engine} fails on an input of {shape}: {_first_line(error)}') from None


def onnxruntime_session(
    model: Any, *, threads: int | None = None, optimized: str | None = None, profile: str | None = None
) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        model: Path, or serialized model.
        threads: Threads within an operator; None leaves the choice to the engine.
        optimized: Where to write the graph that is really executed.
        profile: Where to write the time of each node; the file's name begins so.

    Raises:
        QuantError: if the file is refused.
    """
    need('onnxruntime')
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if threads:
        options.intra_op_num_threads = threads
    if optimized is not None:
        options.optimized_model_filepath = optimized
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, profile
    try:
        return onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])
    except Exception as error:  # the engine has exceptions of its own for each cause
        raise QuantError(f'ONNX Runtime refuses {_called(model)}: {_first_line(error)}') from None


def onnxruntime_runner(model: Any, *, threads: int | None = None) -> Runner:
    """A function that runs a file in ONNX Runtime."""
    session = onnxruntime_session(model, threads=threads)
    first = session.get_inputs()[0]

    def compute(image: np.ndarray) -> np.ndarray:
        return session.run(None, {first.name: image})[0]  # type: ignore[no-any-return]

    return Runner('ONNX Runtime', compute, [side if isinstance(side, int) else None for side in first.shape])


@functools.cache
def openvino_core() -> Any:
    """The one OpenVINO core of this process.

    It is never let go of: the CPU plugin gives its thread a stack for signals and, once nothing uses it, takes it away
    in whichever thread that happens. If that is another one, the next signal (a worker of a DataLoader ends) finds none
    and the kernel kills the process.
    """
    import openvino

    return openvino.Core()


def openvino_compiled(
    model: Any, *, precision: str | None = 'f32', threads: int | None = None, profile: bool = False
) -> Any:
    """A model compiled by OpenVINO for the CPU.

    Args:
        model: Path of an ONNX or IR file, or a serialized ONNX model.
        precision: ``f32``, ``bf16``, or None for the engine's default (bf16 where the processor has it).
        threads: Threads; None leaves the choice to the engine.
        profile: Measure the time of each node.

    Raises:
        QuantError: if the file is refused.
    """
    need('openvino')
    config: dict[str, Any] = {'PERFORMANCE_HINT': 'LATENCY'}
    if precision is not None:
        config['INFERENCE_PRECISION_HINT'] = precision
    if threads:
        config['INFERENCE_NUM_THREADS'] = threads
    if profile:
        config['PERF_COUNT'] = True
    core = openvino_core()
    try:
        if isinstance(model, bytes):
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, 'model.onnx')
                Path(path).write_bytes(model)
                return core.compile_model(core.read_model(path), 'CPU', config)
        return core.compile_model(core.read_model(os.fspath(model)), 'CPU', config)
    except Exception as error:
        raise QuantError(f'OpenVINO refuses {_called(model)}: {_first_line(error)}') from None


def openvino_runner(model: Any, *, precision: str | None = 'f32', threads: int | None = None) -> Runner:
    """A function that runs a file in OpenVINO."""
    compiled = openvino_compiled(model, precision=precision, threads=threads)

    def compute(image: np.ndarray) -> np.ndarray:
        return compiled(image)[0].copy()  # type: ignore[no-any-return]

    sides = compiled.input(0).get_partial_shape()
    return Runner('OpenVINO', compute, [side.get_length() if side.is_static else None for side in sides])


def _called(model: Any) -> str:
    return 'this model' if isinstance(model, bytes) else str(model)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
