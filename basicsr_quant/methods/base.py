"""What a quantization method is to the rest of the package."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..errors import QuantError
from ..network.calibration import Observations, observe, set_tensor_ranges
from ..network.folding import fold_batch_norms
from ..network.plan import LayerPlan, Plan, TensorPlan
from ..network.stages import Stages
from ..network.surgery import apply_plan, quant_layers, quantizers
from ..nn import weight_rows
from ..quantizers import OBSERVERS, LearnedRange, NetworkMeasure, Observer, Quantizer, RelativeRange, percentile_of
from ..registry import Registry
from ..schema import option, read
from ..sparsity import apply_sparsity

METHODS: Registry[type[Method]] = Registry('quantization method')
"""Methods by the name that ``quant.method`` takes. To add one: a file in this folder with a decorated subclass."""

logger = logging.getLogger('basicsr')


@dataclass(frozen=True)
class RangeOptions:
    """Options that every method with learned ranges has.

    Args:
        init: Where ranges start: ``percentile`` (ODM, DDTB), ``mse`` (least reconstruction error), ``dobi``
            (2DQuant's search for it), ``minmax`` or ``ema_minmax`` (PAMS, AdaBM).
        percentile: The percentile p; ranges start at the (100 - p)-th and the p-th.
        range_lr: Learning rate of range parameters as a multiple of the network's, in units of each range's
            calibrated width (ODM: 10).
    """

    init: str = option('percentile', choices=('percentile', 'mse', 'dobi', 'minmax', 'ema_minmax'))
    percentile: float = option(99.0, low=50.0, high=100.0)
    range_lr: float = option(10.0, low=0.0)


class Method:
    """Base class of methods. Subclasses say which quantizers a layer gets, how they start and how they train.

    Args:
        settings: ``Plan.settings``: plain data with ``zero_point``, ``w_granularity``, ``reference_compat``
            and ``options``, as :func:`settings_of` makes them.

    Class attributes:
        Options: Frozen dataclass of the options under the method's own key.
        default_zero_point: What the method's paper uses.
        zero_points: What ``quant.zero_point`` may be.
        default_w_granularity: ``tensor`` (the papers) or ``channel``.
        chooses_bits: Whether calibration may give layers other bits than the plan says.
        takes_products: Whether its input quantizers do for operands of matrix products (``quant.attention``).
        changes_weights: Whether calibration changes weights and biases, not ranges alone.
        is_static: Whether ranges and bits are the same for every image, which export needs.
        static_with: Of a method that is not, the options with which it is.
        takes_skip: Whether ``skip: quantized`` goes with a method that is not static: tensors around additions then
            have quantizers of their own.
        has_reference_compat: Whether published code exists whose faults ``reference_compat`` reproduces.
        starts_from: Methods whose quantized files may be the start of a training, see :meth:`adopt`.
    """

    name: ClassVar[str]
    Options: ClassVar[type] = RangeOptions
    default_zero_point: ClassVar[str] = 'float'
    zero_points: ClassVar[tuple[str, ...]] = ('float', 'integer')
    default_w_granularity: ClassVar[str] = 'tensor'
    chooses_bits: ClassVar[bool] = False
    changes_weights: ClassVar[bool] = False
    has_reference_compat: ClassVar[bool] = False
    takes_products: ClassVar[bool] = False
    is_static: bool = True
    static_with: ClassVar[str] = ''
    takes_skip: ClassVar[bool] = False
    starts_from: ClassVar[tuple[str, ...]] = ()

    def __init__(self, settings: dict[str, Any]) -> None:
        self.zero_point: str = settings['zero_point']
        self.per_channel: bool = settings['w_granularity'] == 'channel'
        self.reference_compat: bool = settings['reference_compat']
        self.options: Any = read(self.Options, settings['options'], f'quant.{self.name}')

    def check(self, plan: Plan) -> None:
        """Refuse a plan that the method cannot carry out; called before anything is built.

        Raises:
            QuantError: naming the layer or option, and what to write.
        """

    def complete_plan(self, plan: Plan, net: nn.Module) -> Plan:
        """Add to a plan, as plain data in its settings, what the method reads from the FP32 network ``net``.

        Raises:
            QuantError: if the method cannot be used on this network.
        """
        return plan

    def complete(self, net: nn.Module, plan: Plan) -> None:
        """Do to the network, in place, what ``plan`` says beside its layers; they hold their quantizers by now."""

    @property
    def bit_limits(self) -> tuple[int, int]:
        """The fewest and the most bits that a layer may choose: the ends of a picture's colour scale."""
        return 2, 8

    @property
    def shares_tensors(self) -> bool:
        """Whether a layer's input quantizer may be that of a tensor of as many bits: its bits must not change then."""
        return self.is_static and not self.chooses_bits

    # -- quantizers ------------------------------------------------------------------------------------------------

    def make_input(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        """Build the quantizer of a layer's input activation."""
        raise NotImplementedError

    def make_weight(self, layer: LayerPlan, module: nn.Module) -> Quantizer:
        """Build the quantizer of a layer's weight."""
        raise NotImplementedError

    def make_measures(self, plan: Plan) -> dict[str, NetworkMeasure]:
        """Build what the network measures of its whole input for its quantizers, by name."""
        return {}

    def make_tensor(self, tensor: TensorPlan) -> Quantizer:
        """Build the quantizer of a tensor that no layer's input quantizer stands for: its calibrated extremes."""
        return LearnedRange(tensor.bits, learn=False, zero_point='integer')

    def range_shape(self, module: nn.Module) -> tuple[int, ...]:
        """Shape of a weight's range: () per tensor, (C, 1, ..., 1) per output channel, over the rows of the weight."""
        rows = weight_rows(module)
        return (rows.shape[0],) + (1,) * (rows.dim() - 1) if self.per_channel else ()

    # -- calibration -----------------------------------------------------------------------------------------------

    @property
    def needs_images(self) -> bool:
        """Whether calibration looks at images; without them ``quant.calibration`` may be left out."""
        return True

    def calibrate(self, net: nn.Module, batches: Iterable[Tensor], stages: Stages | None = None) -> Observations:
        """Set every range from the FP32 network's activations on ``batches`` and from its weights.

        Args:
            net: The quantized network; its quantizers are to be set.
            batches: Inputs of shape (N, C, H, W), gone through one after another, by some methods more than once (so
                a list, or a loader, but no generator). A method that draws from them at random keeps them in a
                :class:`~basicsr_quant.network.tensor_store.TensorStore`.
            stages: What follows the stages and their times.

        A layer that the network never calls keeps an unset range, with a warning.

        Raises:
            QuantError: if ``batches`` is empty.
        """
        stages = stages or Stages()
        seen = observe(net, stages.over('observing activations', batches), self.make_observer)
        if not seen.images and quant_layers(net):
            raise QuantError('quant.calibration: the data set gave no image')
        self.start_ranges(net, seen, stages)
        return seen

    def start_ranges(self, net: nn.Module, seen: Observations, stages: Stages) -> None:
        """Give every quantizer the range it starts with, from what was observed."""
        idle = [name for name in seen.observers if name not in seen.stds]
        if idle:
            logger.warning('Calibration never reached %d layers, which keep an unset range: %s.', len(idle), idle)
        set_tensor_ranges(net, seen)
        for name, layer in stages.over('setting ranges', list(quant_layers(net).items())):
            if name in seen.stds:
                self.start_input(layer.input_quantizer, seen.observers[name])
            if isinstance(layer.weight_quantizer, Quantizer):
                self.start_weight(layer.weight_quantizer, weight_rows(layer))

    def make_observer(self, name: str, quantizer: Quantizer) -> Observer:
        """The observer of a layer's input."""
        return self._observer(quantizer)

    def start_input(self, quantizer: Any, observer: Observer) -> None:
        """Set an input quantizer's range from what its observer saw."""
        quantizer.set_range(*observer.range())

    def start_weight(self, quantizer: Any, weight: Tensor) -> None:
        """Set a weight quantizer's range."""
        observer = self._observer(quantizer, symmetric=True, per_channel=self.per_channel)
        observer.update(weight)
        quantizer.set_range(*observer.range())

    def _observer(self, quantizer: Quantizer, symmetric: bool = False, per_channel: bool = False) -> Observer:
        return self._observer_of(self.options.init, quantizer, symmetric, per_channel)

    def _observer_of(self, init: str, quantizer: Quantizer, symmetric: bool, per_channel: bool) -> Observer:
        kwargs: dict[str, Any] = {'per_channel': per_channel}
        if init == 'percentile':
            percent = self.options.percentile
            kwargs['percent'] = percentile_of(quantizer.num_bits) if percent is None else percent
        elif init in ('mse', 'dobi'):
            kwargs.update(bits=quantizer.num_bits, symmetric=symmetric, narrow_range=quantizer.narrow_range)
            kwargs.update(zero_point=quantizer.zero_point)
        return OBSERVERS[init](**kwargs)

    def adopt(self, state: Mapping[str, Tensor], own: Mapping[str, Tensor], feature_scale: float) -> dict[str, Tensor]:
        """Make the tensors of a network quantized by a method of ``starts_from`` into this method's.

        Args:
            state: State dict of the other method's network.
            own: State dict of this method's network, as built.
            feature_scale: As the other network's calibration measured it.
        """
        raise NotImplementedError

    @property
    def measures_start(self) -> bool:
        """Whether a network taken over by :meth:`adopt` goes through :meth:`measure_start` before it trains."""
        return False

    def measure_start(self, net: nn.Module, batches: Iterable[Tensor]) -> None:
        """Measure on images, as for :meth:`calibrate`, what the other method's file does not hold."""
        raise NotImplementedError

    # -- training --------------------------------------------------------------------------------------------------

    def parameter_groups(self, net: nn.Module, params: Iterable[Any], lr: float) -> list[dict[str, Any]]:
        """Split what a host gives its optimizer: range parameters go into groups of their own, at ``range_lr`` times
        the learning rate of the group they stood in.

        Args:
            net: The quantized network.
            params: Parameters, or optimizer groups of them.
            lr: The optimizer's default learning rate.
        """
        ranges = {id(p) for q in quantizers(net).values() if isinstance(q, RelativeRange) for p in q.range_parameters()}
        params = list(params)
        groups = params if params and isinstance(params[0], dict) else [{'params': params}]
        split = []
        for group in groups:
            members = list(group['params'])
            others = [p for p in members if id(p) not in ranges]
            own = [p for p in members if id(p) in ranges and p.requires_grad]
            if others:
                split.append({**group, 'params': others})
            if own:
                split.append({**group, 'params': own, 'lr': group.get('lr', lr) * self.options.range_lr})
        return split

    @property
    def leaves_parameters_unused(self) -> bool:
        """Whether some parameters get no gradient in a training step, which a distributed wrapper has to know."""
        return False

    def attach(self, net: nn.Module, optimizer: torch.optim.Optimizer, feature_scale: float) -> Training:
        """Make ``optimizer`` train ``net`` as the method says.

        Args:
            net: The bare quantized network, calibrated.
            optimizer: Its optimizer, built from :meth:`parameter_groups`.
            feature_scale: c as calibration measured it, or as ``quant.feature_scale`` fixes it.
        """
        return Training(net, optimizer)


class Training:
    """The state of a running training: hooks on the optimizer, and figures for the log."""

    def __init__(self, net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.net = net
        optimizer.register_step_post_hook(self._after_step)
        self._ranges = [q for q in quantizers(net).values() if isinstance(q, RelativeRange)]

    def _after_step(self, *_: object) -> None:
        for q in self._ranges:
            q.clamp_range()

    def log(self) -> dict[str, float]:
        """Figures of the last step for the host's log."""
        inputs = [layer.input_quantizer for layer in quant_layers(self.net).values()]
        bits = [q.num_bits for q in inputs if isinstance(q, Quantizer)]
        return {'bits': sum(bits) / len(bits)} if bits else {}


def settings_of(method: str, **settings: Any) -> dict[str, Any]:
    """Plain settings of a plan: the method's defaults, with ``settings`` over them."""
    cls = METHODS[method]
    options: Any = read(cls.Options, settings.pop('options', None), f'quant.{method}')
    plain: dict[str, Any] = {
        'zero_point': cls.default_zero_point,
        'w_granularity': cls.default_w_granularity,
        'reference_compat': False,
        'options': dataclasses.asdict(options),
    }
    plain.update({k: v for k, v in settings.items() if v is not None})
    return plain


def method_of(plan: Plan) -> Method:
    """The method that a plan names, with the plan's settings."""
    return METHODS[plan.method](plan.settings)


def quantize(net: nn.Module, plan: Plan) -> nn.Module:
    """Apply ``plan`` to ``net`` in place with the quantizers and masks of its methods, and return ``net``.

    BatchNorms that the plan folds are gone afterwards, see :mod:`basicsr_quant.network.folding`.
    """
    method = method_of(plan)
    method.check(plan)
    fold_batch_norms(net, plan.settings.get('folded', {}))
    net = apply_plan(
        net,
        plan,
        method.make_input,
        method.make_weight,
        method.make_measures(plan),
        method.make_tensor,
        share_tensors=method.shares_tensors,
    )
    method.complete(net, plan)
    if plan.sparsity is not None:
        apply_sparsity(net, plan.sparsity)
    return net
