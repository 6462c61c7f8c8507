"""The ``quant:`` block of an option file, checked once and made into frozen dataclasses."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Optional, Union

from torch import nn

from .errors import QuantError, nearest
from .methods import METHODS, method_of, settings_of
from .network.equalization import equalizable
from .network.folding import foldable
from .network.integer_tensors import ENGINES, executed, tensors_of
from .network.plan import FLOAT_BITS, Plan
from .network.planning import LayerRule, PlanRequest, make_plan
from .network.trace import NetworkTrace
from .schema import check_keys, option, read
from .sparsity import SparsityConfig

_BITS = (*range(2, 9), FLOAT_BITS)
_BITS_TEXT = 'a whole number from 2 to 8, or 32 for floating point'


@dataclass(frozen=True)
class CalibrationConfig:
    """``quant.calibration``: where ranges come from.

    Args:
        num_images: Number of images, the first ones of the data set; by default 100, or all where there are fewer.
        patch_size: Side in LQ pixels of the centre crop taken from each image; 0 takes whole images. 96 in AdaBM.
        dataset: Options of any BasicSR data set; None is the training set (``basicsr train`` only).
    """

    num_images: Optional[int] = option(None, low=1)  # noqa: UP045 (read at run time, Python 3.9)
    patch_size: int = option(96, low=0)
    dataset: Optional[dict] = None  # type: ignore[type-arg]  # noqa: UP045


@dataclass(frozen=True)
class PatchConfig:
    """``quant.patch``: test and calibrate run images patch by patch, see :class:`~.network.patches.Patchwise`.

    Args:
        size: Side of a patch in LQ pixels (AdaBM, CADyQ: 96).
        stride: Distance of neighbouring patches; as ``size`` where it is not given, without overlap.
    """

    size: int = option(96, low=8)
    stride: int = option(96, low=1)


@dataclass(frozen=True)
class DistillConfig:
    """``quant.distill``: a teacher beside the training, see :class:`~.methods.distillation.Distillation`.

    Args:
        teacher: ``start`` (the network that training starts from, ``path.pretrain_network_g``), ``fp32`` (the same,
            which has to be in floating point), or the path of a network file, in floating point or quantized.
        loss: ``attention`` (PAMS, CADyQ, DDTB) or ``feature`` (AdaBM).
        layers: Globs over module names, a list or glob -> weight; None: the last block of the body.
        weight: For layers without a weight of their own; 1000 in the papers for the final body feature.
    """

    teacher: str = 'start'
    loss: str = option('attention', choices=('attention', 'feature'))
    layers: Optional[Union[dict, tuple]] = None  # type: ignore[type-arg]  # noqa: UP007, UP045
    weight: float = option(1000.0, low=0.0)

    def layer_weights(self) -> dict[str, float] | None:
        """Glob -> weight."""
        if self.layers is None:
            return None
        given = self.layers if isinstance(self.layers, Mapping) else dict.fromkeys(self.layers, self.weight)
        for glob, weight in given.items():
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < float('inf'):
                raise QuantError(f"quant.distill.layers.'{glob}': {weight!r} given, a number of at least 0 needed")
        return {str(glob): float(weight) for glob, weight in given.items()}


@dataclass(frozen=True)
class FirstStageConfig:
    """``quant.first_stage``: train the network that this method starts from, before it (CADyQ: an 8-bit PAMS network).

    Args:
        total_iter: Its iterations; None: as many as ``train.total_iter``. Milestones of the schedule move along.
        lr: Its learning rate; None: that of ``train.optim_g``.
        options: Options of its method.
    """

    total_iter: Optional[int] = option(None, low=1)  # noqa: UP045
    lr: Optional[float] = option(None, low=0.0)  # noqa: UP045
    options: Optional[dict] = None  # type: ignore[type-arg]  # noqa: UP045


@dataclass(frozen=True)
class QuantConfig:
    """The whole block. See the README for what each key means."""

    method: str
    w_bits: int = 8
    a_bits: int = 8
    scope: str = 'body'
    skip: str = 'fp'
    engine: str = 'onnxruntime'
    layers: Mapping[str, LayerRule] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    attention: bool = False
    feature_scale: float | None = None
    calibration: CalibrationConfig | None = None
    fold_bn: bool | None = None
    equalize: bool = False
    patch: PatchConfig | None = None
    distill: DistillConfig | None = None
    first_stage: FirstStageConfig | None = None
    save_bits: bool = False

    def plan(
        self,
        net: nn.Module,
        traced: NetworkTrace,
        *,
        training: bool = False,
        sparsity: SparsityConfig | None = None,
    ) -> Plan:
        """Plan ``net``, an FP32 network; ``traced`` tells which inputs follow a ReLU, and what can be folded.

        Args:
            net: The network in floating point.
            traced: Its trace.
            training: For ``basicsr train``, which by default leaves BatchNorm as it is.
            sparsity: The ``sparsity:`` block beside this one.

        Raises:
            QuantError: if a glob matches no layer, nothing is left to quantize, or the method refuses the plan.
        """
        request = PlanRequest(
            self.method, self.w_bits, self.a_bits, self.scope, self.layers, self.settings, self.attention
        )
        rectified = frozenset(layer.name for layer in traced.layers if layer.rectified)
        plan = make_plan(net, request, rectified, frozenset(traced.unused), traced.functional)
        plan.settings.update(self._changes(plan, net, traced, training))
        if self.method != 'none' and not plan.quantized:
            refused = [layer for layer in plan if not layer.chosen]
            because = f" (of '{refused[0].layer}': {refused[0].why})" if refused else ''
            raise QuantError(
                f'quant: nothing is left to quantize: scope {self.scope!r}, w_bits {self.w_bits}, a_bits {self.a_bits} '
                f"and quant.layers leave every layer in floating point{because}; use 'method: none' if that is meant"
            )
        products = [layer.layer for layer in plan.quantized if layer.operands]
        if products and not METHODS[self.method].takes_products:
            raise QuantError(
                f"quant.attention: true given, but method {self.method!r} cannot quantize the matrix products of "
                f"'{products[0]}'; leave quant.attention out"
            )
        method = method_of(plan)
        method.check(plan)
        plan = method.complete_plan(plan, net)
        if self.skip == 'quantized':
            plan = replace(plan, tensors=executed(tensors_of(net, traced.input_shape, plan), self.engine))
        if sparsity is not None:
            if METHODS[self.method].changes_weights:
                raise QuantError(
                    f'quant.method: {self.method!r} given, which moves every weight, those that sparsity masks too; '
                    'use mse'
                )
            plan = replace(plan, sparsity=sparsity.plan(net, traced))
        return plan

    def _changes(self, plan: Plan, net: nn.Module, traced: NetworkTrace, training: bool) -> dict[str, dict[str, str]]:
        """What happens to the FP32 network before it is quantized."""
        if not plan.quantized:
            return {}
        # Published codes keep BatchNorm behind the quantized convolution, and so does training unless it is asked to.
        fold = self.fold_bn if self.fold_bn is not None else not (training or self.settings['reference_compat'])
        folded = foldable(net, traced) if fold else {}
        weights = {layer.layer for layer in plan if layer.w_bits < FLOAT_BITS}
        changes = {'folded': folded} if folded else {}
        if self.equalize:
            changes['equalized'] = equalizable(net, traced, folded, weights)
        return changes


@dataclass(frozen=True)
class _Scalars:
    """The keys of the block that hold one value."""

    w_bits: int = 8
    a_bits: int = 8
    scope: str = option('body', choices=('body', 'all'))
    skip: str = option('fp', choices=('fp', 'quantized'))
    engine: str = option('onnxruntime', choices=ENGINES)
    attention: bool = False
    w_granularity: Optional[str] = option(None, choices=('tensor', 'channel'))  # noqa: UP045 (as above)
    zero_point: Optional[str] = option(None, choices=('float', 'integer'))  # noqa: UP045
    feature_scale: Union[float, str] = 'auto'  # noqa: UP007
    reference_compat: bool = False
    fold_bn: Optional[bool] = None  # noqa: UP045 (as above)
    equalize: bool = False
    bias_correction: str = option('none', choices=('none', 'empirical'))
    save_bits: bool = False


def read_config(block: Any) -> QuantConfig:
    """Check the ``quant:`` block and return it.

    Raises:
        QuantError: for anything that is not as documented, naming the option, what was given and what is allowed.

    >>> read_config({'method': 'odm', 'w_bits': 4, 'a_bits': 4}).settings['zero_point']
    'float'
    >>> read_config({'method': 'pams', 'odm': {'gate': 'sign'}})
    Traceback (most recent call last):
    basicsr_quant.errors.QuantError: quant.odm is given, but quant.method is 'pams'; options of a method go with it only
    """
    if not isinstance(block, Mapping):
        raise QuantError(f'quant must hold `key: value` pairs such as `method: odm`, not {block!r}')
    method = block.get('method')
    if method is None:
        raise QuantError(f'quant.method is missing; allowed: {" | ".join(METHODS)}')
    if method not in METHODS:
        raise QuantError(f'quant.method: {method!r} given{nearest(method, METHODS)}, allowed: {" | ".join(METHODS)}')
    for other in METHODS:
        if other in block and other != method:
            raise QuantError(
                f'quant.{other} is given, but quant.method is {method!r}; options of a method go with it only'
            )
    scalar_keys = list(_Scalars.__dataclass_fields__)
    blocks = ('layers', 'calibration', 'patch', 'distill', 'first_stage')
    check_keys(block, ['method', *scalar_keys, *blocks, method], 'quant')
    scalars = read(_Scalars, {k: block[k] for k in scalar_keys if k in block}, 'quant')
    _check_method(method, scalars)
    settings = settings_of(
        method,
        zero_point=scalars.zero_point,
        w_granularity=scalars.w_granularity,
        reference_compat=scalars.reference_compat,
        options=block.get(method),
        bias_correction=None if scalars.bias_correction == 'none' else scalars.bias_correction,
    )
    w_bits, a_bits = _bits(scalars.w_bits, 'quant.w_bits'), _bits(scalars.a_bits, 'quant.a_bits')
    if METHODS[method].chooses_bits:
        settings['bits'] = f'W{w_bits}A{a_bits}'
    return QuantConfig(
        method=method,
        w_bits=w_bits,
        a_bits=a_bits,
        scope=scalars.scope,
        skip=scalars.skip,
        engine=scalars.engine,
        layers=_read_layers(block.get('layers')),
        settings=settings,
        attention=scalars.attention,
        feature_scale=_read_feature_scale(scalars.feature_scale),
        calibration=_read_calibration(block.get('calibration')),
        fold_bn=scalars.fold_bn,
        equalize=scalars.equalize,
        patch=_read_patch(block.get('patch')),
        distill=_read_distill(block.get('distill')),
        first_stage=_read_first_stage(block.get('first_stage'), method),
        save_bits=scalars.save_bits,
    )


def _check_method(method: str, scalars: _Scalars) -> None:
    cls = METHODS[method]
    if scalars.engine != 'onnxruntime' and scalars.skip != 'quantized':
        raise QuantError(
            f'quant.engine: {scalars.engine!r} given, which places the quantizers of `skip: quantized`; write that too'
        )
    if scalars.skip == 'quantized' and not (cls.is_static or cls.takes_skip):
        raise QuantError(f"quant.skip: 'quantized' given, but method {method!r} has ranges of its own for every image")
    if scalars.zero_point is not None and scalars.zero_point not in cls.zero_points:
        allowed = ' | '.join(cls.zero_points)
        raise QuantError(f'quant.zero_point: {scalars.zero_point!r} given, allowed with method {method!r}: {allowed}')
    if scalars.reference_compat and not cls.has_reference_compat:
        raise QuantError(f'quant.reference_compat: true given, but method {method!r} has no such form; leave it out')


def _bits(value: Any, path: str) -> int:
    if isinstance(value, bool) or value not in _BITS:
        raise QuantError(f'{path}: {value!r} given, {_BITS_TEXT} needed')
    return int(value)


def _read_layers(given: Any) -> dict[str, LayerRule]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise QuantError(f"quant.layers must hold 'name glob': fp or {{w_bits: 8, a_bits: 8}} pairs, not {given!r}")
    rules = {}
    for glob, rule in given.items():
        path = f"quant.layers.'{glob}'"
        if rule == 'fp':
            rules[str(glob)] = LayerRule(FLOAT_BITS, FLOAT_BITS)
        elif isinstance(rule, Mapping):
            check_keys(rule, ('w_bits', 'a_bits'), path)
            rules[str(glob)] = LayerRule(**{k: _bits(_number(v), f'{path}.{k}') for k, v in rule.items()})
        else:
            raise QuantError(f'{path}: {rule!r} given, allowed: fp, or {{w_bits: 8, a_bits: 8}}')
    return rules


def _number(value: Any) -> Any:
    return int(value) if isinstance(value, str) and value.isdigit() else value


def _read_feature_scale(given: float | str) -> float | None:
    if given == 'auto':
        return None
    if isinstance(given, float) and given > 0:
        return given
    raise QuantError(f'quant.feature_scale: {given!r} given, allowed: auto, or a number above 0')


def _read_calibration(given: Any) -> CalibrationConfig | None:
    return None if given is None else read(CalibrationConfig, given, 'quant.calibration')


def _read_patch(given: Any) -> PatchConfig | None:
    if given is None:
        return None
    if isinstance(given, Mapping) and 'stride' not in given:
        given = {**given, 'stride': given.get('size', PatchConfig.size)}
    patch = read(PatchConfig, given, 'quant.patch')
    if patch.stride > patch.size:
        raise QuantError(
            f'quant.patch.stride: {patch.stride} given, at most quant.patch.size = {patch.size} allowed; '
            'pixels between the patches would be lost'
        )
    return patch


def _read_distill(given: Any) -> DistillConfig | None:
    if given is None:
        return None
    distill = read(DistillConfig, given, 'quant.distill')
    distill.layer_weights()
    return distill


def _read_first_stage(given: Any, method: str) -> FirstStageConfig | None:
    if given is None:
        return None
    before = METHODS[method].starts_from
    if not before:
        able = ' | '.join(name for name in METHODS if METHODS[name].starts_from)
        raise QuantError(f'quant.first_stage is given, but method {method!r} has one stage; allowed with: {able}')
    stage = read(FirstStageConfig, given, 'quant.first_stage')
    read(METHODS[before[0]].Options, stage.options, 'quant.first_stage.options')
    return stage
