"""DAQ: channel-wise distribution-aware quantization (Hong, Kim, Baik, Oh, Lee; WACV 2022)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import islice
from typing import Optional

import torch
from torch import Tensor, nn

from ..errors import QuantError
from ..network.calibration import Observations, observe, output_error
from ..network.plan import FLOAT_BITS, LayerPlan, Plan
from ..network.stages import Stages
from ..network.surgery import quant_layers
from ..quantizers import DISTRIBUTIONS, OBSERVERS, DistributionRange, DistributionWeight, Quantizer, step_table
from ..schema import option
from .base import METHODS, Method

logger = logging.getLogger('basicsr')

_TABLES = ('optimal', 'reference')

_PUBLISHED = {
    'distribution': ('gaussian',),
    'step_table': ('auto', 'reference'),
    'w_step_table': (None, 'auto', 'reference'),
    'mixed_precision': (False,),
    'w_granularity': ('tensor',),
}
"""What may stand beside ``reference_compat: true``; ``auto`` gives way to it."""


@dataclass(frozen=True)
class DAQOptions:
    """Options of DAQ.

    Args:
        distribution: The density whose step table is used, ``gaussian`` in the published code.
        step_table: ``optimal`` takes the step of least MSE for the bits, ``reference`` the next wider one as the
            published code, see :func:`~basicsr_quant.quantizers.step_table`. ``auto`` runs every combination on the
            calibration images and takes the one whose output is nearest to the FP32 network's.
        w_step_table: The same for the weights; by default as ``step_table``.
        stat_bits: Bits of each channel's mean and deviation, 2 to 8 (the authors: 4 for EDSR-baseline, 8 for EDSR);
            32 leaves them in floating point.
        mixed_precision: Bits of each channel of each image by its relative sensitivity, ``a_bits`` being their mean.
        images: How many calibration images the choices are made on, at most.
    """

    distribution: str = option('gaussian', choices=DISTRIBUTIONS)
    step_table: str = option('auto', choices=('auto', *_TABLES))
    w_step_table: Optional[str] = option(None, choices=('auto', *_TABLES))  # noqa: UP045 (read at run time, 3.9)
    stat_bits: int = option(32, choices=(*range(2, 9), FLOAT_BITS))
    mixed_precision: bool = option(False)
    images: int = option(8, low=1)


@METHODS.register('daq')
class DAQ(Method):
    """Activations standardized per image and channel, weights by their deviation; nothing is learned.

    Grids and gradients: :class:`DistributionRange`, :class:`DistributionWeight`. The network runs as it is or is
    trained with them (the gradient passes every value unchanged); ranges follow the current tensors, so there are none
    to train.

    Deviations from the published code, all undone by ``reference_compat: true``: inputs behind a ReLU are clamped
    above, so that a channel has at most 2^b codes; whether an input is one is read from the network's structure and
    not from the batch; each of activations and weights takes the step table that serves it better; the mean is
    quantized with the deviation where ``stat_bits`` is given, and a quantized deviation never falls below the
    smallest one. In every form a single pixel has deviation 0 and a dead channel gives zeros, where the published code
    gives NaN or works around them.

    Mixed precision has no published code, and its formula is not known to us. Our reading of "relative sensitivity":
    log2 of the channel's deviation relative to the geometric mean of the channels', in whole bits, the mean over the
    channels of each image held at ``a_bits``, see :func:`allocate_bits`.
    """

    name = 'daq'
    is_static = False
    Options = DAQOptions
    zero_points = ('float',)
    has_reference_compat = True

    def check(self, plan: Plan) -> None:
        linear = [p.layer for p in plan if p.a_bits < FLOAT_BITS and p.type.endswith('Linear')]
        if linear:
            globs = dict.fromkeys(f'*.{n.rpartition(".")[2]}' if '.' in n else n for n in linear)
            if any(fnmatchcase(p.layer, glob) for p in plan if not p.type.endswith('Linear') for glob in globs):
                globs = dict.fromkeys(linear)
            raise QuantError(
                f"quant.method: 'daq' standardizes the channels of images, and layer '{linear[0]}' is a Linear; keep "
                f'such layers in floating point: quant.layers: {{{", ".join(f"{g!r}: fp" for g in globs)}}}'
            )
        if self.reference_compat:
            given = {**dataclasses.asdict(self.options), 'w_granularity': 'channel' if self.per_channel else 'tensor'}
            for key, allowed in _PUBLISHED.items():
                if given[key] not in allowed:
                    path = f'quant.{key}' if key == 'w_granularity' else f'quant.daq.{key}'
                    raise QuantError(
                        f'{path}: {given[key]!r} given with quant.reference_compat: true, which stands for the '
                        'published code; leave one of them out'
                    )

    def make_input(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        return DistributionRange(
            layer.a_bits,
            layer.rectified,
            stat_bits=self.options.stat_bits,
            mixed=self.options.mixed_precision,
            published=self.reference_compat,
            name=layer.layer,
        )

    def make_weight(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        return DistributionWeight(layer.w_bits, self.per_channel)

    @property
    def _wanted(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The tables to choose from, for activations and for weights."""
        if self.reference_compat:
            return ('reference',), ('reference',)
        given = self.options.step_table, self.options.w_step_table or self.options.step_table
        return tuple(_TABLES if name == 'auto' else (name,) for name in given)  # type: ignore[return-value]

    @property
    def needs_images(self) -> bool:
        return any(len(tables) > 1 for tables in self._wanted)

    @torch.no_grad()
    def calibrate(self, net: nn.Module, batches: Iterable[Tensor], stages: Stages | None = None) -> Observations:
        stages = stages or Stages()
        pairs = [(a, w) for a in self._wanted[0] for w in self._wanted[1]]
        self._set_steps(net, *pairs[0])
        if not self.needs_images:
            return Observations()
        images = list(islice(batches, self.options.images))
        if not images:
            raise QuantError('quant.calibration: the data set gave no image')
        images = [image.to(next(net.parameters()).device) for image in images]
        seen, targets = _observe_outputs(net, stages.over('observing activations', images))
        if len(pairs) > 1:
            errors = {}
            for pair in stages.over('choosing step tables', pairs):
                self._set_steps(net, *pair)
                errors[pair] = output_error(net, images, targets)
            best = min(errors, key=lambda pair: errors[pair])
            self._set_steps(net, *best)
            seen.choices['step_table'], seen.choices['w_step_table'] = best
            seen.choices['output_mse'] = {f'activations {a}, weights {w}': e for (a, w), e in errors.items()}
            logger.info('DAQ: output MSE against FP32 on %d images by step table:\n%s', len(images), '\n'.join(
                f'  activations {a:9}  weights {w:9}  {error:.4g}{"  chosen" if (a, w) == best else ""}'
                for (a, w), error in errors.items()
            ))  # fmt: skip
        return seen

    def _set_steps(self, net: nn.Module, activations: str, weights: str) -> None:
        for layer in quant_layers(net).values():
            for quantizer, table in ((layer.input_quantizer, activations), (layer.weight_quantizer, weights)):
                if isinstance(quantizer, (DistributionRange, DistributionWeight)):
                    quantizer.set_steps(step_table(self.options.distribution, reference=table == 'reference'))


def _observe_outputs(net: nn.Module, images: Iterable[Tensor]) -> tuple[Observations, list[Tensor]]:
    """What any calibration measures, and the FP32 network's outputs, in one pass."""
    outputs: list[Tensor] = []
    handle = net.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    try:
        seen = observe(net, images, lambda name, quantizer: OBSERVERS['minmax']())
    finally:
        handle.remove()
    return seen, outputs
