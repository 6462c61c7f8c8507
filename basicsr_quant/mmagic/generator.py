"""Any network of a config's ``generator=``, quantized, still of its own class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.registry import MODELS
from torch import nn

from ..config import QuantConfig, read_config
from ..errors import QuantError
from ..methods import method_of, quantize
from ..methods.base import Method
from ..methods.distillation import layer_weights
from ..network.plan import Plan
from ..network.surgery import quantizers
from ..network.trace import trace
from ..report.plan_card import plan_card
from ..sparsity import SparsityMethod, read_sparsity, sparsity_of


@dataclasses.dataclass
class QuantRun:
    """What a quantized network carries with it, as the attribute ``quant_run``.

    Attributes:
        config: The ``quant`` block.
        plan: The plan; after calibration with the bits that the method chose.
        calibration: What calibration measured (``feature_scale``, ``images``); goes into checkpoints as plain data.
        has_ranges: Calibration has run, or a checkpoint with ranges was loaded.
        generator: Config of the network in floating point.
        scale: What the network enlarges images by.
        distilled: Module -> weight of its loss, for ``quant.distill``; empty without.
        has_masks: Masks were ranked, or loaded.
        taken_over: The loaded checkpoint is of another method, which this one starts from.
        start: File that training starts from (``load_from``), which ``distill.teacher`` may name; resuming keeps it.
        seconds: Wall time of calibration by stage.
    """

    config: QuantConfig
    plan: Plan
    generator: dict[str, Any] = dataclasses.field(default_factory=dict)
    scale: int = 1
    distilled: dict[str, float] = dataclasses.field(default_factory=dict)
    calibration: dict[str, Any] = dataclasses.field(default_factory=dict)
    has_ranges: bool = False
    has_masks: bool = False
    taken_over: bool = False
    start: str | None = None
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def method(self) -> Method:
        return method_of(self.plan)

    @property
    def sparsity(self) -> SparsityMethod | None:
        return None if self.plan.sparsity is None else sparsity_of(self.plan.sparsity)


@MODELS.register_module()
def QuantizedNetwork(
    generator: Mapping[str, Any], quant: Mapping[str, Any] | None = None, sparsity: Mapping[str, Any] | None = None
) -> nn.Module:
    """Build ``generator``, plan it and replace its layers by quantized ones; tensor names stay.

    Registered in MMEngine's root registry, from which every project's falls back; the inner network is looked up in
    the scope of the config. ``rgb_mean`` and other plain attributes stay as they are.

    Args:
        generator: Config of any network that takes one image tensor: EDSRNet, MSRResNet, RDNNet, SwinIRNet ...
        quant: The block of BasicSR's option files; ``calibration.dataset`` is a data set config of MMEngine. Whether a
            run trains is not known here: BatchNorm stays as it is unless ``fold_bn`` asks for it.
        sparsity: The block of that name: N:M masks, with quantization or alone.

    Raises:
        QuantError: for anything in ``quant`` that is not as documented, and for a network that cannot be traced.
    """
    if quant is None and sparsity is None:
        raise QuantError("QuantizedNetwork has neither quant=dict(method='odm', ...) nor sparsity=dict(...)")
    config = read_config({'method': 'none'} if quant is None else plain(quant))
    if config.first_stage is not None:
        raise QuantError(
            'quant.first_stage is given; MMEngine trains one network in a run: train the first stage by a config of '
            "its own (method 'pams') and name its file as load_from"
        )
    net: nn.Module = MODELS.build(generator)
    traced = trace(net)
    plan = config.plan(net, traced, training=True, sparsity=read_sparsity(plain(sparsity)))
    run = QuantRun(config, plan, plain(generator), max(traced.output_shape[-1] // traced.input_shape[-1], 1))
    if config.distill is not None and plan.quantized:
        run.distilled = layer_weights(net, config.distill.layer_weights(), config.distill.weight)
    quantize(net, plan)
    net.quant_run = run  # type: ignore[assignment]
    print_log(f'The plan: {plan_card(traced, plan)}', logger='current')
    if quantizers(net):
        net.register_forward_pre_hook(_ForgottenCalibration())
    return net


def plain(value: Any) -> Any:
    """``value`` with MMEngine's dictionaries and lists made into Python's own."""
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def run_of(net: nn.Module) -> QuantRun:
    """What :func:`QuantizedNetwork` noted on ``net``."""
    return net.quant_run  # type: ignore[return-value]


def quantized_networks(model: nn.Module) -> dict[str, nn.Module]:
    """The quantized networks of ``model`` by their names in its checkpoints: ``generator``, ``generator_ema``.

    Distributed wrappers, of the whole or of a part, are looked through; their names do not count.
    """
    while is_model_wrapper(model) and isinstance(model.module, nn.Module):
        model = model.module
    found = {}
    for name, module in model.named_modules():
        if isinstance(getattr(module, 'quant_run', None), QuantRun):
            found['.'.join(part for part in name.split('.') if part != 'module')] = module
    return found


def the_quantized_network(model: nn.Module) -> tuple[str, nn.Module]:
    """The one quantized network of ``model`` that is trained and tested, and its name.

    Raises:
        QuantError: if there is none, or more than one (averaged copies, ``..._ema``, not counted).
    """
    found = {name: net for name, net in quantized_networks(model).items() if not name.endswith('_ema')}
    if len(found) != 1:
        have = ', '.join(found) or 'none'
        raise QuantError(
            f'one quantized network is needed in a model, generator=dict(type=QuantizedNetwork, ...); found: {have}'
        )
    return next(iter(found.items()))


class _ForgottenCalibration:
    """Refuses the first pass of a network without ranges, whose output would be noise; then never looks again."""

    def __init__(self) -> None:
        self.looked = False

    def __call__(self, net: nn.Module, inputs: object) -> None:
        if self.looked or not all(q.enabled for q in quantizers(net).values()):
            return
        self.looked = True
        if not run_of(net).has_ranges:
            raise QuantError(
                'the quantized network has no ranges; add dict(type=RangeCalibrationHook) to custom_hooks, or load a '
                'quantized checkpoint'
            )
