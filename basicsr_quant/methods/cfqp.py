"""CFQP: clip-free post-training quantization (Kalay, Bilecen, Ayazoglu; BMVC 2023, arXiv 2308.11365)."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from ..errors import QuantError
from ..network.calibration import Observations, evaluating
from ..network.clamp_free import clamp_difference, take_out, with_clamps
from ..network.clamps import FinalClamp, find_final_clamps
from ..network.plan import Plan
from ..network.stages import Stages
from ..network.surgery import floating_point
from ..quantizers import OBSERVERS, LearnedRange, Quantizer
from ..quantizers.fake_quantize import align_zero_point
from ..schema import option
from .base import METHODS
from .observed import MinMaxOptions, ObservedRanges
from .representative import (
    Augmentation,
    Representative,
    RepresentativeImages,
    candidates,
    choose,
    psnr,
)

logger = logging.getLogger('basicsr')

_OUTPUT_BITS = 8
_COMPARED = 32
"""Images of the table that calibration writes, at most."""
_VERIFIED = 8
"""Images on which the network with and without clip is compared, at most."""
_SAME = 1e-5
"""Difference up to which they are the same, as a share of the image range."""
_PAIRS = 7


@dataclass(frozen=True)
class CFQPOptions(MinMaxOptions):
    """Options of CFQP; every default is ours, see :class:`CFQP`.

    Args:
        images: How many representative images set the ranges, at most. Few give the layers inside too narrow ranges in
            networks without a residual (XLSR lost 0.2 dB with 4).
        tolerance: How far their outputs may leave the image range, in steps of 8 bits.
        low, high: The image range, of inputs and outputs: 0 and 1 in BasicSR.
        steps: Most intensity fits of an image; they end at a tenth of the tolerance. 0 takes images as they are.
        max_gain: Intensities are scaled by no more than this.
        gamma: Also tries x^gamma and x^(1/gamma); 1 does not.
        flip: Also tries each image mirrored.
        output_range: ``calibrated`` takes the output's extremes on the representative images, as converters do;
            ``target`` sets it to the image range itself, where the engine lets one.
        compare: Calibrate on the images as they are too, and log a table of both.
    """

    images: int = option(100, low=1)
    tolerance: float = option(0.5, low=0.0)
    low: float = option(0.0)
    high: float = option(1.0)
    steps: int = option(8, low=0)
    max_gain: float = option(2.0, low=1.0)
    gamma: float = option(1.0, low=1.0)
    flip: bool = option(False)
    output_range: str = option('calibrated', choices=('calibrated', 'target'))
    compare: bool = option(True)


@METHODS.register('cfqp')
class CFQP(ObservedRanges):
    """Min-max ranges from representative images, for a network whose last clamp is taken out.

    Mobile networks end in a clipped activation, min(max(x, 0), 1): engines run it as operators of their own over the
    whole output. Without it, plain min-max calibration gives the output tensor the range of the network's over- and
    undershoot, so its 8-bit codes are no longer pixels: someone has to rescale and clip them. CFQP chooses and changes
    the calibration images until the FP32 network's output without clip spans the image range and no more; then code c
    of the output is the pixel c, and saturation of the integer arithmetic does the clip's work.

    From the abstract: the clip goes, no retraining; representative images are augmented from outputs of the FP32
    network alone; INT8. The paper's body was not available to us. Our reading, all of it options: the augmentation is
    the affine intensity change whose closed form maps the output's extremes onto the image range, repeated on measured
    outputs (:meth:`Augmentation.fitted`), with gamma and flips on request; an image qualifies if its output leaves the
    range by at most half an 8-bit step; chosen are the one nearest to both ends, then those of widest output
    (:func:`choose`), as many as asked for. Nothing is read but FP32 outputs: no ground truth, no quantized network.

    The network gains ``output_quantizer``, 8 bits, at its output: the tensor whose range all this is about. Residual
    sums stay in floating point as in every method here, so ABPN's sum of features and anchor is rounded once, at the
    output. The clamps and their places are in ``Plan.settings['output']``, and a checkpoint is refused by a network
    where they are elsewhere.
    """

    name = 'cfqp'
    Options = CFQPOptions

    @property
    def image_range(self) -> tuple[float, float]:
        return self.options.low, self.options.high

    def complete_plan(self, plan: Plan, net: nn.Module) -> Plan:
        if not self.options.low < self.options.high:
            raise QuantError(
                f'quant.cfqp.high: {self.options.high:g} given, more than quant.cfqp.low ({self.options.low:g}) needed'
            )
        clamps = find_final_clamps(net, *self.image_range)
        output = {'low': self.options.low, 'high': self.options.high, 'clamps': [c.to_plain() for c in clamps]}
        return dataclasses.replace(plan, settings={**plan.settings, 'output': output})

    def complete(self, net: nn.Module, plan: Plan) -> None:
        take_out(net, [FinalClamp(**clamp) for clamp in plan.settings['output']['clamps']])
        quantizer = LearnedRange(_OUTPUT_BITS, learn=False, zero_point=self.zero_point)
        net.output_quantizer = quantizer.to(next(net.parameters()).device)
        net.register_forward_hook(_quantize_output)

    # -- calibration -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def calibrate(self, net: nn.Module, batches: Iterable[Tensor], stages: Stages | None = None) -> Observations:
        stages = stages or Stages()
        self._verify(net, batches)
        table = []
        if self.options.compare:
            ordinary = self.set_ranges(net, batches, stages)
            images = stages.over('comparing with FP32', islice(batches, _COMPARED))
            table += self._errors(net, images, 'images as given')
        found: list[Representative] = []
        number = 0
        with self._fp32(net) as network:
            for number, image in enumerate(stages.over('fitting outputs', batches), start=1):
                new = candidates(
                    number - 1, image, network, self.image_range, self._tolerance,
                    starts=self._starts, steps=self.options.steps, max_gain=self.options.max_gain,
                )  # fmt: skip
                if not all(math.isfinite(c.output.low) and math.isfinite(c.output.high) for c in new):
                    raise QuantError(
                        f'the output of {type(net).__name__} on calibration image {number} holds values that are not '
                        'finite; look at path.pretrain_network_g'
                    )
                found += new
        if not found:
            raise QuantError('quant.calibration: the data set gave no image')
        chosen = choose(found, self.options.images, self.image_range, self._tolerance)
        self._warn(chosen)
        representative = RepresentativeImages(batches, chosen, self.image_range)
        seen = self.set_ranges(net, representative, stages)
        if self.options.compare:
            images = stages.over('comparing with FP32', islice(batches, _COMPARED))
            table += self._errors(net, images, 'representative')
            seen.feature_scale = ordinary.feature_scale  # of real images, not of stretched ones
            self._log_table(net, table, next(iter(batches)))
        own = [c for c in found if c.augmentation == Augmentation()]
        seen.images = number
        seen.choices = {
            'representative': [c.to_plain() for c in chosen],
            'output_range': list(self.output_grid(net)),
            'output_psnr': {f'{images}, {reading}': value for images, reading, _, value in table},
            'outside_as_given': sum(c.output.outside for c in own) / len(own),
        }
        return seen

    @property
    def _tolerance(self) -> float:
        return float(self.options.tolerance * self._step)

    @property
    def _step(self) -> float:
        """The step of 8-bit pixels."""
        return float((self.options.high - self.options.low) / (2**_OUTPUT_BITS - 1))

    @property
    def _starts(self) -> list[Augmentation]:
        gammas = dict.fromkeys((1.0, self.options.gamma, 1.0 / self.options.gamma))
        flips = (False, True) if self.options.flip else (False,)
        return [Augmentation(gamma=gamma, flip=flip) for gamma in gammas for flip in flips]

    def set_ranges(self, net: nn.Module, images: Iterable[Tensor], stages: Stages) -> Observations:
        """Min-max calibration as of any network, and of the output."""
        observer = OBSERVERS['minmax']()
        quantizer = _output_quantizer(net)
        handle = quantizer.register_forward_pre_hook(lambda _, given: observer.update(given[0]))
        try:
            seen = super().calibrate(net, images, stages)
        finally:
            handle.remove()
        if self.options.output_range == 'target':
            quantizer.set_range(*map(torch.tensor, self.image_range))
        else:
            quantizer.set_range(*observer.range())
        return seen

    @contextmanager
    def _fp32(self, net: nn.Module) -> Iterator[Callable[[Tensor], Tensor]]:
        """What the FP32 network without clip makes of an image."""
        with evaluating(net), floating_point(net):
            device = next(net.parameters()).device
            yield lambda image: net(image.to(device))

    def _verify(self, net: nn.Module, batches: Iterable[Tensor]) -> None:
        """Refuse if taking the clamps out changed what is left after clamping to the image range."""
        low, high = self.image_range
        device = next(net.parameters()).device
        with evaluating(net), floating_point(net):
            differences = [clamp_difference(net, image.to(device), low, high) for image in islice(batches, _VERIFIED)]
        if max(differences, default=0.0) > _SAME * (high - low):
            raise QuantError(
                f"quant.method: 'cfqp' took the clamps out of {type(net).__name__} and its output clamped to "
                f'[{low:g}, {high:g}] changed by {max(differences):.3g}; is the image range another (quant.cfqp.low, '
                'quant.cfqp.high)?'
            )

    def _warn(self, chosen: list[Representative]) -> None:
        low, high = min(c.output.low for c in chosen), max(c.output.high for c in chosen)
        missed = max(abs(low - self.options.low), abs(high - self.options.high))
        if missed > self._tolerance:
            logger.warning(
                'CFQP: the outputs of the representative images reach from %.4f to %.4f, which misses the image range '
                'by %.1f steps of 8 bits; give more images, or a greater quant.cfqp.max_gain or steps.',
                low, high, missed / self._step,
            )  # fmt: skip

    # -- the table -------------------------------------------------------------------------------------------------

    def output_grid(self, net: nn.Module) -> tuple[float, float]:
        """The values of the output's lowest and highest code."""
        quantizer = _output_quantizer(net)
        lower, upper = quantizer.bounds(torch.empty(0))
        if self.zero_point == 'integer':
            lower, upper = align_zero_point(lower, upper, _OUTPUT_BITS)
        return float(lower), float(upper)

    def _errors(self, net: nn.Module, images: Iterable[Tensor], name: str) -> list[tuple[str, str, str, float]]:
        """Rows (images, reading of the output, output range, dB against FP32 with clip)."""
        (low, high), (bottom, top) = self.image_range, self.output_grid(net)
        device = next(net.parameters()).device
        totals, count = [0.0, 0.0], 0
        with evaluating(net):
            for image in images:
                image = image.to(device)
                with floating_point(net):
                    wanted = net(image).clamp(low, high)
                output = net(image)
                pixels = (output - bottom) / (top - bottom) * (high - low) + low
                for i, read in enumerate((output.clamp(low, high), pixels)):
                    totals[i] += float((read - wanted).double().square().sum())
                count += wanted.numel()
        span = f'[{bottom:.4f}, {top:.4f}]'
        readings = 'rescaled and clipped outside', 'codes are pixels'
        return [(name, r, span, psnr(t / count, self.image_range)) for r, t in zip(readings, totals)]

    def _log_table(self, net: nn.Module, table: list[tuple[str, str, str, float]], image: Tensor) -> None:
        rows = '\n'.join(f'  {name:16} {reading:29} {span:19} {value:6.2f} dB' for name, reading, span, value in table)
        logger.info('CFQP: 8-bit output against FP32 with clip, PSNR of all channels, by calibration:\n%s', rows)
        image = image.to(next(net.parameters()).device)
        seconds: tuple[list[float], list[float]] = [], []
        with evaluating(net):
            for _ in range(_PAIRS):
                seconds[0].append(_seconds(net, image))
                with with_clamps(net):
                    seconds[1].append(_seconds(net, image))
        without, with_clip = map(min, seconds)  # what else the machine does only adds
        logger.info(
            'CFQP: one image takes %.2f ms without the clip, %.3f times that with it, as PyTorch simulates the network '
            'here; on an integer engine the clip is operators of its own, measure there.', 1e3 * without,
            with_clip / without,
        )  # fmt: skip


def _quantize_output(net: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """Forward hook of the root network."""
    return _output_quantizer(net)(output)  # type: ignore[no-any-return]


def _output_quantizer(net: nn.Module) -> Quantizer:
    return net.output_quantizer  # type: ignore[return-value]


def _seconds(net: nn.Module, image: Tensor) -> float:
    """Time of one pass; of the processor on a CPU, where other programs' load would drown the difference."""
    if not image.is_cuda:
        start = time.process_time()
        net(image)
        return time.process_time() - start
    torch.cuda.synchronize(image.device)
    start = time.perf_counter()
    net(image)
    torch.cuda.synchronize(image.device)
    return time.perf_counter() - start
