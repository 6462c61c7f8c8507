"""The whole calibration of a network: what prepares it, the method's own, and what corrects it."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from itertools import islice

from torch import Tensor, nn

from ..network.bias_correction import IMAGES, correct_biases
from ..network.calibration import Observations
from ..network.equalization import equalize
from ..network.plan import Plan
from ..network.stages import Stages
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
        images = list(islice(batches, IMAGES))
        left = correct_biases(net, images, lambda layers: stages.over('correcting biases', layers))
        if left:
            logger.warning('Bias correction: %d layers have no bias and stay as they are: %s.', len(left), left)
    return seen


def needs_images(plan: Plan) -> bool:
    """Whether calibration looks at images; without them ``quant.calibration`` may be left out."""
    return bool(plan.quantized) and (method_of(plan).needs_images or _corrects(plan))


def _corrects(plan: Plan) -> bool:
    return plan.settings.get('bias_correction') == 'empirical'
