"""The teacher of ``quant.distill`` under MMEngine."""

from __future__ import annotations

import os

from mmengine.registry import MODELS
from mmengine.runner.checkpoint import CheckpointLoader
from torch import nn

from ..errors import QuantError
from ..models.checkpoint import load_teacher, network_file, read_network_file
from ..random_state import preserved
from .generator import run_of


def teacher_of(net: nn.Module) -> nn.Module | None:
    """Build the teacher that the ``quant`` block of ``net`` asks for, in floating point or quantized as its file says.

    ``start`` and ``fp32`` are the config's ``load_from``; a run that resumes finds its name in the checkpoint. Any path
    or address that MMEngine loads will do, and BasicSR's network files.

    Returns:
        The teacher; None where there is nothing to distil.

    Raises:
        QuantError: if there is no such file, or it is of another network.
    """
    run = run_of(net)
    distill = run.config.distill
    if distill is None or not run.distilled:
        return None
    path = distill.teacher
    if path in ('start', 'fp32'):
        if run.start is None:
            raise QuantError(f'quant.distill.teacher: {path!r} is load_from, which is not given')
        path = run.start
    path = os.path.expanduser(path)
    if path.endswith('.safetensors'):
        file = read_network_file(path)
    else:
        try:
            file = network_file(path, CheckpointLoader.load_checkpoint(path, map_location='cpu', logger='current'))
        except FileNotFoundError:
            raise QuantError(f'quant.distill.teacher: there is no checkpoint {path}') from None
    if distill.teacher == 'fp32' and file.plan is not None:
        raise QuantError(f"quant.distill.teacher: 'fp32' given, but {path} is quantized; write start, or another path")
    with preserved():
        teacher = MODELS.build(run.generator)
    return load_teacher(file, teacher, 'params')
