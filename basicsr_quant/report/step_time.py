"""Time and memory of a training step, quantized over plain: pairs of steps in turn, so that drift falls on both."""

from __future__ import annotations

import copy
import gc
import resource
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..methods import method_of, quantize
from ..methods.distillation import Distillation
from ..network.plan import Plan

Batch = tuple[Tensor, Tensor]
Distill = tuple[Mapping[str, float], str]


@dataclass(frozen=True)
class StepTime:
    """Ratios of one method's training step to the plain one.

    Attributes:
        ratio: Median over pairs of (quantized step time / plain step time).
        low, high: Least and greatest ratio of a pair.
        plain_seconds: Median time of the plain step.
        pairs: Number of pairs.
    """

    ratio: float
    low: float
    high: float
    plain_seconds: float
    pairs: int


def make_step(
    net: nn.Module, plan: Plan | None, batch: Batch, lr: float = 1e-4, distill: Distill | None = None
) -> Callable[[], None]:
    """A training step of ``net`` on ``batch``: forward, L1, backward, Adam, and what the method adds.

    Args:
        net: FP32 network; a copy of it is trained.
        plan: What to quantize; None for the plain step.
        batch: LQ (N, C, h, w) and GT (N, C, H, W).
        lr: Learning rate.
        distill: Weights of layers and loss, of a teacher as the network is at the start.
    """
    lq, gt = batch
    net = copy.deepcopy(net).train()
    if plan is None:
        optimizer = torch.optim.Adam(net.parameters(), lr)
    else:
        quantize(net, plan)
        method = method_of(plan)
        seen = method.calibrate(net, [lq[:1]])
        optimizer = torch.optim.Adam(method.parameter_groups(net, net.parameters(), lr), lr)
        teacher = copy.deepcopy(net) if distill is not None else None
        method.attach(net, optimizer, seen.feature_scale)
        if distill is not None and teacher is not None:
            Distillation(net, teacher, *distill)

    def step() -> None:
        optimizer.zero_grad()
        functional.l1_loss(net(lq), gt).backward()
        optimizer.step()

    return step


def compare_steps(
    net: nn.Module, plan: Plan, batch: Batch, pairs: int = 10, warmup: int = 2, distill: Distill | None = None
) -> StepTime:
    """Time plain and quantized steps in turn."""
    steps = make_step(net, None, batch), make_step(net, plan, batch, distill=distill)
    times: tuple[list[float], list[float]] = ([], [])
    for index in range(warmup + pairs):
        for step, found in zip(steps, times):
            synchronize(batch[0].device)
            start = time.perf_counter()
            step()
            synchronize(batch[0].device)
            if index >= warmup:
                found.append(time.perf_counter() - start)
    return ratios_of(*times)


def ratios_of(plain: list[float], other: list[float]) -> StepTime:
    """The ratios of pairs of times, in seconds."""
    ratios = [q / p for p, q in zip(plain, other)]
    return StepTime(statistics.median(ratios), min(ratios), max(ratios), statistics.median(plain), len(ratios))


def peak_memory(
    net: nn.Module, plan: Plan | None, batch: Batch, steps: int = 3, distill: Distill | None = None
) -> int:
    """Bytes that some training steps add to the process at their peak; meant for a fresh process.

    On the CPU the growth of the peak resident size from before the step is built; on a GPU the peak allocation.
    """
    gc.collect()
    cuda = batch[0].device.type == 'cuda'
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = 0 if cuda else peak_resident()
    step = make_step(net, plan, batch, distill=distill)
    for _ in range(steps):
        step()
    return (torch.cuda.max_memory_allocated() if cuda else peak_resident()) - before


def peak_resident() -> int:
    """Greatest resident size of this process so far, in bytes."""
    # getrusage's figure is no use in a child process: on Linux it starts at its parent's. VmHWM starts anew.
    try:
        lines = Path('/proc/self/status').read_text().splitlines()
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # macOS, in bytes
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('VmHWM'))


def synchronize(device: torch.device) -> None:
    """Wait for what a GPU has still to do."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
