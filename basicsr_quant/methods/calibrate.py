"""The whole calibration of a network: what prepares it, the method's own, and what corrects it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from ..network.bias_correction import IMAGES, correct_biases
from ..network.calibration import Observations, evaluating, output_error
from ..network.equalization import equalize
from ..network.plan import Plan
from ..network.stages import Stages
from ..network.surgery import floating_point, quant_layers, quant_state
from ..network.tensor_store import TensorStore
from .base import method_of

logger = logging.getLogger('basicsr')


def calibrate(net: nn.Module, plan: Plan, batches: Iterable[Tensor], stages: Stages | None = None) -> Observations:
    """Calibrate ``net`` as its plan says: equalize ranges, set them by the method, correct biases.

    Args:
        net: The network after :func:`.quantize`, with the weights to be quantized in place.
        plan: Its plan.
        batches: As for :meth:`.Method.calibrate`.
        stages: What follows the stages and their times.
    """
    stages = stages or Stages()
    pairs = plan.settings.get('equalized')
    if pairs:
        with stages.stage('equalizing weight ranges'):
            equalize(net, pairs)
    seen = method_of(plan).calibrate(net, batches, stages)
    if _corrects(plan):
        seen.choices['bias_correction'] = _correct(net, list(islice(batches, IMAGES)), stages)
    return seen


@torch.no_grad()
def _correct(net: nn.Module, images: Sequence[Tensor], stages: Stages) -> dict[str, Any]:
    """Correct biases if that brings the output nearer to the FP32 network's, and return what was measured.

    Means that are right need not make an image better: where few values carry most of the error, such as those that a
    range clips, a shift of all of them harms the many others.
    """
    biases = [layer.bias for layer in quant_layers(net).values() if isinstance(layer.bias, Tensor)]
    before = [bias.clone() for bias in biases]
    device = next(net.parameters()).device
    images = [image.to(device) for image in images]

    with closing(TensorStore()) as outputs:

        def error() -> float:
            return output_error(net, images, (outputs[index].to(device) for index in range(len(images))))

        with stages.stage('comparing outputs'):
            with evaluating(net), floating_point(net):
                for image in images:
                    outputs.append(net(image))
            found = {'output_mse_before': error()}
        left = correct_biases(net, images, lambda layers: stages.over('correcting biases', layers))
        with stages.stage('comparing outputs'):
            found['output_mse_after'] = error()
    kept = found['output_mse_after'] <= found['output_mse_before']
    if not kept:
        for bias, value in zip(biases, before):
            bias.copy_(value)
    logger.info(
        'Bias correction: output MSE against FP32 on %d images %.4g before, %.4g after; %s.',
        len(images), found['output_mse_before'], found['output_mse_after'], 'kept' if kept else 'undone',
    )  # fmt: skip
    if left:
        logger.warning('Bias correction: %d layers have no bias and stay as they are: %s.', len(left), left)
    return {'kept': kept, **found}


@torch.no_grad()
def copy_calibrated(source: nn.Module, target: nn.Module, plan: Plan) -> None:
    """Give an averaged copy what calibration set: the quantizers, and all of it where weights or biases changed."""
    state = source.state_dict()
    changed = plan.settings.get('equalized') or _corrects(plan)
    if changed or method_of(plan).changes_weights:
        target.load_state_dict(state)
        return
    prefixes = tuple(f'{name}.' for name in quant_state(source))
    own = {k: v for k, v in state.items() if k.startswith(prefixes)}
    target.load_state_dict(own, strict=False)


def needs_images(plan: Plan) -> bool:
    """Whether calibration looks at images; without them ``quant.calibration`` may be left out."""
    return bool(plan.quantized) and (method_of(plan).needs_images or _corrects(plan))


def _corrects(plan: Plan) -> bool:
    return plan.settings.get('bias_correction') == 'empirical'
