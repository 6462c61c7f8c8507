"""Time of a calibration over the plain forward passes on the same images: pairs in turn, so that drift falls on both."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..methods import calibrate, quantize
from ..network.calibration import evaluating
from ..network.plan import Plan
from .step_time import StepTime, ratios_of, synchronize


def compare_calibration(net: nn.Module, plan: Plan, images: Iterable[Tensor], pairs: int = 5) -> StepTime:
    """Time plain forward passes of the FP32 network over ``images`` and a whole calibration with them, in turn.

    Args:
        net: FP32 network in its place; calibrated is a copy.
        plan: What to quantize.
        images: Inputs (1, C, h, w), gone through again and again.
        pairs: Number of pairs; one more is run first and not counted.
    """
    quantized = quantize(copy.deepcopy(net), plan)
    device = next(net.parameters()).device

    @torch.no_grad()
    def plain() -> None:
        with evaluating(net):
            for image in images:
                net(image.to(device))

    def run() -> None:
        calibrate(quantized, plan, images)

    times: tuple[list[float], list[float]] = ([], [])
    for index in range(1 + pairs):
        for step, found in zip((plain, run), times):
            synchronize(device)
            start = time.perf_counter()
            step()
            synchronize(device)
            if index:
                found.append(time.perf_counter() - start)
    return ratios_of(*times)
