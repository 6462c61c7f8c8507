"""Time of a calibration over plain forward passes on the same images: pairs in turn, so that drift falls on both."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..methods import calibrate, quantize
from ..network.calibration import evaluating
from ..network.plan import Plan
from .step_time import StepTime, peak_resident, ratios_of, synchronize


class RandomImages:
    """``count`` images of one shape with values in 0..1, the same ones in every pass, made as they are taken."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self.count, self.shape = count, shape

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        return (torch.rand(self.shape, generator=generator) for _ in range(self.count))


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


def peak_memory(net: nn.Module, plan: Plan, images: Iterable[Tensor]) -> int:
    """Bytes that a calibration adds to the process at its peak; meant for a fresh process.

    On the CPU the growth of the peak resident size, on a GPU the peak allocation.
    """
    cuda = next(net.parameters()).device.type == 'cuda'
    quantize(net, plan)
    gc.collect()
    before = 0 if cuda else peak_resident()
    calibrate(net, plan, images)
    return (torch.cuda.max_memory_allocated() if cuda else peak_resident()) - before
