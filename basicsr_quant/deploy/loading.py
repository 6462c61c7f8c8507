"""A network as ``basicsr upscale`` uses it, whatever file it comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import QuantError
from . import engines

_PROBE = 32


@dataclass(frozen=True)
class Loaded:
    """A network that is ready to run.

    Args:
        run: (N, C, h, w) float32 in 0-1 to (N, C, h scale, w scale).
        channels: C.
        scale: Up-scaling factor.
        fixed: Height and width of the only input that it takes, or None.
        batched: Whether N may be more than 1.
        tile: Side of a tile that it is meant for, or None.
        summary: What to tell of the tiles that went through it, or None.
    """

    run: engines.Run
    channels: int
    scale: int
    fixed: tuple[int, int] | None = None
    batched: bool = True
    tile: int | None = None
    summary: Callable[[], str] | None = None


def load_file(path: Path, engine: str | None = None, threads: int | None = None) -> Loaded:
    """Load an ONNX or OpenVINO file; what it takes and makes is asked of the file itself.

    Args:
        path: ``.onnx`` or ``.xml``.
        engine: Who runs a ``.onnx``: ``onnxruntime`` (default) or ``openvino``.
        threads: Threads of the engine; None leaves the choice to it.

    Raises:
        QuantError: if the engine refuses the file, or it is no network from an image to a larger one.
    """
    if path.suffix == '.xml' or engine == 'openvino':
        run = engines.openvino_runner(str(path), threads=threads)
    else:
        run = engines.onnxruntime_runner(str(path), threads=threads)
    batch, channels, height, width = run.shape if len(run.shape) == 4 else (0, 0, 0, 0)
    if channels not in (1, 3):
        raise QuantError(f'{path} takes an input of shape {list(run.shape)}; (N, 1 or 3, height, width) is needed')
    probe = (height or _PROBE, width or _PROBE)
    fixed = None if height is None or width is None else (height, width)
    made = run(torch.zeros(1, channels, *probe)).shape
    scale = made[-1] // probe[1] if len(made) == 4 else 0
    if scale < 1 or tuple(made) != (1, channels, probe[0] * scale, probe[1] * scale):
        raise QuantError(f'{path} makes {list(made)} of {[1, channels, *probe]}, no image enlarged by a whole number')
    return Loaded(run, channels, scale, fixed, batched=batch is None)
