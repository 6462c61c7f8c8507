"""A folder that model servers load: Triton Inference Server and OpenVINO Model Server have the same layout."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ..errors import QuantError
from .files import check_writable, write_bytes

_NAME = re.compile(r'[A-Za-z0-9_.-]+')
MOST_IMAGES = 8
"""Requests that Triton puts together at most; tiles of one size go through the network at once."""
_DELAY = 2000


def check_repository(path: str, model: str) -> None:
    """Refuse a model repository that cannot be written, before any work.

    Raises:
        QuantError: naming it, or a name that servers do not take.
    """
    if not _NAME.fullmatch(Path(model).stem):
        raise QuantError(f'--triton: a name of letters, digits, _ . and - is needed, not {Path(model).stem!r}')
    if Path(path).is_file():
        raise QuantError(f'--triton {path} is a file; give a folder')
    check_writable(Path(path), f'--triton {path}')


def write_repository(path: str, model: str, engine: str, shape: Sequence[int | None]) -> Path:
    """Write ``<path>/<name>/1/model.*`` and ``<path>/<name>/config.pbtxt``; the name is that of the file.

    Args:
        path: The repository; other models in it are left alone.
        model: An exported file. TensorRT's engine has to be built from it into ``1/model.plan``, on the machine that
            serves it.
        engine: Who runs it.
        shape: Of the input, None where a side is free.

    Returns:
        The folder of the model.

    Raises:
        QuantError: if something cannot be written.
    """
    source = Path(model)
    folder = Path(path) / source.stem
    for file in (source, source.with_suffix('.bin')) if source.suffix == '.xml' else (source,):
        try:
            write_bytes(folder / '1' / f'model{file.suffix}', file.read_bytes())
        except OSError as error:
            shutil.rmtree(folder / '1', ignore_errors=True)
            raise QuantError(f'{file} cannot be read: {error.strerror}') from None
    write_bytes(folder / 'config.pbtxt', triton_config(source.stem, engine, source.suffix, shape).encode())
    return folder


def triton_config(name: str, engine: str, suffix: str, shape: Sequence[int | None]) -> str:
    """The text of ``config.pbtxt`` for a network (N, C, H, W) to (N, C, H scale, W scale) in float32.

    Where the batch is free, Triton puts requests of one size together.
    """
    batch, channels, *sides = shape
    dims = ', '.join(str(side or -1) for side in (channels, *sides))
    free = batch is None
    own = f'{batch}, ' if not free else ''
    output = f'{own}{channels}, -1, -1'
    backend = {'tensorrt': 'tensorrt', 'openvino': 'openvino'}.get(engine, 'onnxruntime')
    file = 'default_model_filename: "model.onnx"\n' if suffix == '.onnx' and engine == 'openvino' else ''
    batching = f'dynamic_batching {{ max_queue_delay_microseconds: {_DELAY} }}\n' if free else ''
    kind = 'KIND_GPU' if engine == 'tensorrt' else 'KIND_CPU'
    return (
        f'name: "{name}"\n'
        f'backend: "{backend}"\n'
        f'{file}'
        f'max_batch_size: {MOST_IMAGES if free else 0}\n'
        f'input [ {{ name: "input", data_type: TYPE_FP32, dims: [ {own}{dims} ] }} ]\n'
        f'output [ {{ name: "output", data_type: TYPE_FP32, dims: [ {output} ] }} ]\n'
        f'{batching}'
        f'instance_group [ {{ kind: {kind}, count: 1 }} ]\n'
    )
