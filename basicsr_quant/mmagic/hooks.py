"""The hook that calibrates, trains by the method, and keeps checkpoints whole."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS
from torch import Tensor, nn

from ..errors import QuantError
from ..methods.base import Training
from ..network.surgery import quantizers
from .calibration import calibrate, folder_of
from .checkpoints import fit_checkpoint, quant_entry, save_network
from .generator import plain, quantized_networks, run_of, the_quantized_network


@HOOKS.register_module()
class RangeCalibrationHook(Hook):
    """Gives a quantized network its ranges where the loaded checkpoint has none, and trains it by its method.

    Before training (and before a test or validation without training): ranges are set in place, from
    ``quant['calibration']['dataset']``, in training by default from the training set; resuming and testing a quantized
    checkpoint never recalibrate. Random states stay as they were and all ranks end with the same ranges. Averaged
    copies of the network (``generator_ema``) get the same ranges.

    Checkpoints get an entry ``quant`` (the plan, and what calibration measured). Besides, ``work_dir`` gets
    ``net_g_calibrated.pth`` after a calibration for a test and ``net_g_latest.pth`` after training: files of tensors
    and plain data that BasicSR loads too.

    Args:
        log_interval: Iterations between two looks at the method's figures (ODM's cosine ...), which go to the log.
    """

    priority = 'HIGH'  # before CheckpointHook, and before hooks that copy the network in before_train

    def __init__(self, log_interval: int = 100) -> None:
        self.log_interval = log_interval
        self._training: Training | None = None

    # -- files -----------------------------------------------------------------------------------------------------

    def before_run(self, runner: Any) -> None:
        the_quantized_network(runner.model)
        ours = logging.getLogger('basicsr')  # what methods say goes where the runner's own messages go
        if not ours.handlers:
            ours.setLevel(runner.logger.level)
            for handler in runner.logger.handlers:
                ours.addHandler(handler)

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        path = runner._load_from if isinstance(runner._load_from, str) else 'the checkpoint'
        fit_checkpoint(runner.model, checkpoint, path)

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint['quant'] = quant_entry(the_quantized_network(runner.model)[1])

    def after_train(self, runner: Any) -> None:
        self._save(runner, 'latest')

    def _save(self, runner: Any, label: str) -> None:
        if is_main_process():
            path = os.path.join(runner.work_dir, f'net_g_{label}.pth')
            save_network(runner.model, path)
            runner.logger.info(f'Saved {path}, which MMagic and BasicSR load.')

    # -- calibration -----------------------------------------------------------------------------------------------

    def before_test(self, runner: Any) -> None:
        self._calibrate_for_test(runner)

    def before_val(self, runner: Any) -> None:
        self._calibrate_for_test(runner)

    def _calibrate_for_test(self, runner: Any) -> None:
        if self._calibrate_if_needed(runner, None):
            self._save(runner, 'calibrated')

    def _calibrate_if_needed(self, runner: Any, train: Mapping[str, Any] | None) -> bool:
        name, net = the_quantized_network(runner.model)
        if run_of(net).has_ranges or not quantizers(net):
            return False
        config = run_of(net).config.calibration
        dataset = train if config is None or config.dataset is None else config.dataset
        if dataset is not None and run_of(net).method.needs_images:
            _refuse_test_sets(runner, dataset)
        calibrate(net, dataset, _to_input(runner.model), runner.seed)
        averaged = quantized_networks(runner.model).get(f'{name}_ema')
        if averaged is not None:
            prefixes = tuple(f'{quantizer}.' for quantizer in quantizers(net))
            ranges = {key: value for key, value in net.state_dict().items() if key.startswith(prefixes)}
            averaged.load_state_dict(ranges, strict=False)
            run_of(averaged).plan, run_of(averaged).has_ranges = run_of(net).plan, True
        return True

    # -- training --------------------------------------------------------------------------------------------------

    def before_train(self, runner: Any) -> None:
        loader = runner.cfg.get('train_dataloader') or {}
        self._calibrate_if_needed(runner, plain(loader.get('dataset')) if isinstance(loader, Mapping) else None)
        if self._training is not None:  # train() called twice
            return
        name, net = the_quantized_network(runner.model)
        run = run_of(net)
        optimizer = _optimizer_of(runner.optim_wrapper, name)
        _check_groups(net, optimizer)
        _check_wrapper(runner.model, run.method.leaves_parameters_unused)
        scale = run.config.feature_scale or run.calibration.get('feature_scale', 1.0)
        self._training = run.method.attach(net, optimizer, scale)

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        if self._training is not None and self.every_n_train_iters(runner, self.log_interval):
            for key, value in self._training.log().items():
                runner.message_hub.update_scalar(f'train/{key}', value)


def _to_input(model: nn.Module) -> Any:
    """The model's preprocessor as a function from a collated batch to the network's input."""
    bare: Any = getattr(model, 'module', model)

    def to_input(batch: Any) -> Tensor:
        inputs = bare.data_preprocessor(batch, False)['inputs']
        return inputs['img'] if isinstance(inputs, Mapping) else inputs

    return to_input


def _refuse_test_sets(runner: Any, dataset: Mapping[str, Any]) -> None:
    for kind in ('val', 'test'):
        loaders = runner.cfg.get(f'{kind}_dataloader') or []
        for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
            other = loader.get('dataset') if isinstance(loader, Mapping) else None
            if isinstance(other, Mapping) and folder_of(other) == folder_of(dataset) != 'the data set':
                raise QuantError(
                    f"quant['calibration']['dataset'] reads {folder_of(dataset)}, which is a data set of "
                    f'{kind}_dataloader'
                )


def _optimizer_of(wrapper: Any, name: str) -> Any:
    if isinstance(wrapper, OptimWrapperDict):
        if name not in wrapper:
            have = ', '.join(wrapper)
            raise QuantError(f"optim_wrapper has no entry '{name}', which is the quantized network; it has: {have}")
        wrapper = wrapper[name]
    assert isinstance(wrapper, OptimWrapper)
    return wrapper.optimizer


def _check_groups(net: nn.Module, optimizer: Any) -> None:
    """Refuse an optimizer that mixes ranges and weights: the ranges' learning rate is not the network's."""
    groups = [{'params': group['params'], 'lr': group['lr']} for group in optimizer.param_groups]
    rate = getattr(run_of(net).method.options, 'range_lr', 1.0)
    split = run_of(net).method.parameter_groups(net, groups, 0.0)
    if rate != 1.0 and len(split) > len(groups):
        raise QuantError(
            f'the optimizer trains ranges at the learning rate of the weights, not at {rate:g} times it; set '
            "optim_wrapper['constructor'] = 'QuantizedOptimWrapperConstructor'"
        )


def _check_wrapper(model: nn.Module, unused: bool) -> None:
    for module in model.modules() if unused else ():
        if getattr(module, 'find_unused_parameters', True) is False:
            raise QuantError(
                'the method leaves parameters without gradient; set model_wrapper_cfg = '
                "dict(type='MMSeparateDistributedDataParallel', find_unused_parameters=True)"
            )
