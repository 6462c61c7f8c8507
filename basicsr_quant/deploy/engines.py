"""Running exported files: ONNX Runtime and OpenVINO, and what they made of the graph."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import QuantError
from .onnx_file import need

Run = Callable[[Tensor], Tensor]
"""A network behind an engine: (N, C, H, W) float32 in, the same out."""


def onnxruntime_session(model: Any, *, threads: int | None = None, optimized: str | None = None) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        model: Path, or serialized model.
        threads: Threads within an operator; None leaves the choice to the engine.
        optimized: Where to write the graph that is really executed.

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
    try:
        return onnxruntime.InferenceSession(model, options, providers=['CPUExecutionProvider'])
    except Exception as error:  # the engine has exceptions of its own for each cause
        raise QuantError(f'ONNX Runtime refuses {_called(model)}: {_first_line(error)}') from None


def onnxruntime_runner(model: Any, *, threads: int | None = None) -> Run:
    """A function that runs a file in ONNX Runtime."""
    session = onnxruntime_session(model, threads=threads)
    name = session.get_inputs()[0].name

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {name: np.ascontiguousarray(image.numpy())})[0])

    return run


def openvino_compiled(model: Any, *, precision: str | None = 'f32', threads: int | None = None) -> Any:
    """A model compiled by OpenVINO for the CPU.

    Args:
        model: Path of an ONNX or IR file, or a serialized ONNX model.
        precision: ``f32``, ``bf16``, or None for the engine's default (bf16 where the processor has it).

    Raises:
        QuantError: if the file is refused.
    """
    need('openvino')
    import openvino

    config: dict[str, Any] = {'PERFORMANCE_HINT': 'LATENCY'}
    if precision is not None:
        config['INFERENCE_PRECISION_HINT'] = precision
    if threads:
        config['INFERENCE_NUM_THREADS'] = threads
    core = openvino.Core()
    try:
        if isinstance(model, bytes):
            with tempfile.TemporaryDirectory() as folder:
                path = os.path.join(folder, 'model.onnx')
                Path(path).write_bytes(model)
                return core.compile_model(core.read_model(path), 'CPU', config)
        return core.compile_model(core.read_model(os.fspath(model)), 'CPU', config)
    except Exception as error:
        raise QuantError(f'OpenVINO refuses {_called(model)}: {_first_line(error)}') from None


def openvino_runner(model: Any, *, precision: str | None = 'f32', threads: int | None = None) -> Run:
    """A function that runs a file in OpenVINO."""
    compiled = openvino_compiled(model, precision=precision, threads=threads)

    def run(image: Tensor) -> Tensor:
        return torch.from_numpy(compiled(np.ascontiguousarray(image.numpy()))[0].copy())

    return run


def _called(model: Any) -> str:
    return 'this model' if isinstance(model, bytes) else str(model)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]
