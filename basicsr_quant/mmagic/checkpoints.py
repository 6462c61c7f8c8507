"""Checkpoints: those of BasicSR and MMagic, FP32 and quantized, into a model; network files that both hosts read."""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from typing import Any

from torch import nn

from ..models.checkpoint import (
    adopted,
    calibration_of,
    compare_plans,
    load_state,
    network_file,
    save_network_file,
)
from ..network.masking import masks_in_force
from ..network.surgery import plan_in_force, quantizers
from .generator import quantized_networks, run_of, the_quantized_network


def fit_checkpoint(
    model: nn.Module, checkpoint: MutableMapping[str, Any], path: str, resuming: bool = False
) -> None:
    """Rewrite what MMEngine is about to load into ``model`` so that it fits, in place.

    The quantized networks take their tensors as strictly as under BasicSR: an FP32 file may lack quantizer tensors
    only, a quantized one loads whole and its plan is compared; CADyQ takes one of PAMS over. BasicSR's names and its
    entries ``params`` and ``params_ema`` are understood; tensors beside the networks (discriminators) are left as
    they are.

    Args:
        model: The model, in its distributed wrapper or without.
        checkpoint: Content of the file.
        path: Of the file, for errors, and as the start of a training.
        resuming: The training goes on; it started from what the checkpoint names.

    Raises:
        QuantError: naming the first tensors or the layer that do not fit.
    """
    file = network_file(path, checkpoint)
    networks = quantized_networks(model)
    entry = checkpoint.get('quant') or {}
    state = dict(checkpoint.get('state_dict') or {})
    for name in networks:
        state = {key: tensor for key, tensor in state.items() if not key.startswith(f'{name}.')}
    for name, net in networks.items():
        run = run_of(net)
        key = 'params_ema' if name.endswith('_ema') else 'params'
        if file.plan is not None:
            compare_plans(file, run.plan, net)
            run.calibration = calibration_of(file, net)
            run.taken_over = file.has_ranges(run.plan) and file.plan.method != run.plan.method
            run.has_masks = file.plan.sparsity is not None
        own = adopted(file, net, run.plan, key)
        load_state(net, own, key)
        ranges = tuple(f'{quantizer}.' for quantizer in quantizers(net))
        named = any(k.startswith(ranges) for k in own.state(key)[1])
        run.has_ranges = named if file.plan is None else file.has_ranges(run.plan)
        run.start = entry.get('start') if resuming else path
        if file.plan is not None and run.method.chooses_bits:
            run.plan = plan_in_force(net, run.plan)
        run.plan = masks_in_force(net, run.plan)
        state.update({f'{name}.{key}': tensor for key, tensor in net.state_dict().items()})
    checkpoint['state_dict'] = state


def quant_entry(net: nn.Module) -> dict[str, Any]:
    """What makes a checkpoint a quantized one, as plain data: the plan, what calibration measured, where it began."""
    run = run_of(net)
    plan = masks_in_force(net, run.plan)
    return {'plan': plan.to_plain(), 'calibration': dict(run.calibration), 'start': run.start}


def save_network(model: nn.Module, path: str) -> None:
    """Write the quantized network alone, as tensors and plain data, with MMagic's names: both hosts load it.

    MMEngine's own checkpoints also hold its log, as objects that only MMEngine can read.
    """
    name, net = the_quantized_network(model)
    states = {'params': net.state_dict()}
    averaged = quantized_networks(model).get(f'{name}_ema')
    if averaged is not None:
        states['params_ema'] = averaged.state_dict()
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    run = run_of(net)
    save_network_file(path, states, masks_in_force(net, run.plan), run.calibration)
