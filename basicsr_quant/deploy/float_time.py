"""What share of its time an engine computes in floating point: this part integers leave as it is (Amdahl's law)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from torch import Tensor

from . import engines

_WHOLE_NUMBERS = ('int8', 'uint8', 'int16', 'uint16', 'int32', 'int4', 'uint4')
_RUNS = 6
"""Passes; the last one counts. The first two touch memory anew, which takes a quarter longer."""


def onnxruntime_float_share(path: str, image: Tensor, threads: int | None = None) -> float:
    """Share of the time of a pass that ONNX Runtime spends in nodes that neither take nor give integer codes.

    Args:
        path: An exported file.
        image: (1, C, H, W), float32.
        threads: Threads within an operator; None leaves the choice to the engine.
    """
    with tempfile.TemporaryDirectory() as folder:
        session = engines.onnxruntime_session(path, threads=threads, profile=os.path.join(folder, 'profile'))
        name = session.get_inputs()[0].name
        for _ in range(_RUNS):
            session.run(None, {name: image.numpy()})
        events = json.loads(Path(session.end_profiling()).read_text())
    nodes = [e for e in events if e.get('cat') == 'Node' and e['name'].endswith('_kernel_time')]
    last = nodes[len(nodes) - len(nodes) // _RUNS :]
    return _share((not _has_codes(node['args']), float(node['dur'])) for node in last)


def openvino_float_share(path: str, image: Tensor, threads: int | None = None) -> float:
    """As :func:`onnxruntime_float_share` for OpenVINO, whose kernels' names end in the format that they compute in."""
    compiled = engines.openvino_compiled(path, threads=threads, profile=True)
    request = compiled.create_infer_request()
    for _ in range(_RUNS):
        request.infer([np.ascontiguousarray(image.numpy())])
    return _share((not p.exec_type.lower().endswith(('i8', 'u8')), p.real_time.total_seconds())
                  for p in request.profiling_info)  # fmt: skip


def _has_codes(args: dict[str, list[dict[str, object]]]) -> bool:
    tensors = [*args.get('input_type_shape', ()), *args.get('output_type_shape', ())]
    return any(kind in _WHOLE_NUMBERS for tensor in tensors for kind in tensor)


def _share(nodes: Iterable[tuple[bool, float]]) -> float:
    found = list(nodes)
    total = sum(seconds for _, seconds in found)
    return sum(seconds for is_float, seconds in found if is_float) / total if total else 0.0
