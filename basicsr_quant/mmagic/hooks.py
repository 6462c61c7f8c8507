"""The hook that calibrates, trains by the method, and keeps checkpoints whole."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from torch import Tensor, nn

from ..errors import QuantError
from ..methods import copy_calibrated
from ..methods.base import Training
from ..methods.distillation import Distillation
from ..methods.extra_loss import scale_extra_losses
from ..network.masking import masks_in_force, start_masks
from ..network.patches import Patchwise
from ..network.surgery import quantizers
from ..sparsity import SparseTraining
from .calibration import calibrate, folder_of
from .checkpoints import fit_checkpoint, quant_entry, save_network
from .distillation import teacher_of
from .generator import plain, quantized_networks, run_of, the_quantized_network
from .optimizer import check_distribution, check_groups, loss_factor, wrapper_of
from .visualization import QuantizationVisualizationHook


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
        self._sparse_training: SparseTraining | None = None
        self._distillation: Distillation | None = None
        self._wrapper: Any = None
        self._whole: nn.Module | None = None

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
        fit_checkpoint(runner.model, checkpoint, path, resuming=bool(runner._resume))

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
        _, net = the_quantized_network(runner.model)
        config = run_of(net).config
        if config.save_bits and not any(isinstance(h, QuantizationVisualizationHook) for h in runner.hooks):
            raise QuantError(
                'quant.save_bits: true given, but nothing draws them; add dict(type=QuantizationVisualizationHook) to '
                'custom_hooks'
            )
        patch = config.patch
        if patch is not None:
            self._whole = net
            _replace(runner.model, net, Patchwise(net, patch.size, patch.stride).eval())

    def after_test(self, runner: Any) -> None:
        if self._whole is not None:
            patchwise = next(m for m in runner.model.modules() if isinstance(m, Patchwise) and m.net is self._whole)
            _replace(runner.model, patchwise, self._whole)
            self._whole = None

    def before_val(self, runner: Any) -> None:
        self._calibrate_for_test(runner)

    def _calibrate_for_test(self, runner: Any) -> None:
        if self._calibrate_if_needed(runner, None):
            self._save(runner, 'calibrated')

    def _calibrate_if_needed(self, runner: Any, train: Mapping[str, Any] | None, training: bool = False) -> bool:
        name, net = the_quantized_network(runner.model)
        follows = training and run_of(net).taken_over and run_of(net).method.measures_start
        started = self._start_masks(net, training)
        if (run_of(net).has_ranges and not follows) or not quantizers(net):
            if started:
                self._copy_to_average(runner, name, net)
            return started
        config = run_of(net).config.calibration
        dataset = train if config is None or config.dataset is None else config.dataset
        if dataset is not None and (follows or run_of(net).method.needs_images):
            _refuse_test_sets(runner, dataset)
        calibrate(net, dataset, _to_input(runner.model), runner.seed)
        self._copy_to_average(runner, name, net)
        return True

    def _start_masks(self, net: nn.Module, training: bool) -> bool:
        run = run_of(net)
        if run.sparsity is None or run.has_masks:
            return False
        if run.sparsity.learns and not training:
            raise QuantError(
                f'sparsity.method: {run.sparsity.name!r} learns its masks in training, but the checkpoint has none; '
                'train first, or use one_shot'
            )
        start_masks(net)
        run.plan, run.has_masks = masks_in_force(net, run.plan), True
        return True

    def _copy_to_average(self, runner: Any, name: str, net: nn.Module) -> None:
        averaged = quantized_networks(runner.model).get(f'{name}_ema')
        if averaged is not None:
            copy_calibrated(net, averaged, run_of(net).plan)
            own, run = run_of(averaged), run_of(net)
            own.plan, own.has_ranges, own.has_masks = run.plan, run.has_ranges, run.has_masks

    # -- training --------------------------------------------------------------------------------------------------

    def before_train(self, runner: Any) -> None:
        name, net = the_quantized_network(runner.model)
        teacher = teacher_of(net) if self._training is None else None
        loader = runner.cfg.get('train_dataloader') or {}
        dataset = plain(loader.get('dataset')) if isinstance(loader, Mapping) else None
        self._calibrate_if_needed(runner, dataset, training=True)
        if self._training is not None:  # train() called twice
            return
        run = run_of(net)
        self._wrapper = wrapper_of(runner.optim_wrapper, name)
        optimizer = self._wrapper.optimizer
        check_groups(net, optimizer)
        parts = [part for part in (run.method, run.sparsity) if part is not None]
        check_distribution(runner.model, any(part.leaves_parameters_unused for part in parts))
        scale = run.config.feature_scale or run.calibration.get('feature_scale', 1.0)
        self._training = run.method.attach(net, optimizer, scale)
        self._sparse_training = run.sparsity.attach(net, optimizer) if run.sparsity is not None else None
        if teacher is not None and run.config.distill is not None:
            self._distillation = Distillation(net, teacher, run.distilled, run.config.distill.loss)
            source, loss = run.config.distill.teacher, run.config.distill.loss
            runner.logger.info(f'Teacher: {source}, {loss} losses on {len(run.distilled)} layers.')

    def before_train_iter(self, runner: Any, batch_idx: int, data_batch: Any = None) -> None:
        scale_extra_losses(loss_factor(self._wrapper))

    def after_train_iter(
        self, runner: Any, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        scale_extra_losses(1.0)
        if self._training is not None and self.every_n_train_iters(runner, self.log_interval):
            for source in (self._training, self._sparse_training, self._distillation):
                for key, value in (source.log() if source is not None else {}).items():
                    runner.message_hub.update_scalar(f'train/{key}', value)


def _replace(model: nn.Module, module: nn.Module, other: nn.Module) -> None:
    """Put ``other`` in the place of ``module`` within ``model``."""
    name = next(name for name, found in model.named_modules() if found is module)
    parent, _, child = name.rpartition('.')
    setattr(model.get_submodule(parent), child, other)


def _to_input(model: nn.Module) -> Any:
    """The model's preprocessor as a function from a collated batch to the network's input."""
    bare: Any = getattr(model, 'module', model)

    def to_input(batch: Any) -> Tensor:
        inputs = bare.data_preprocessor(batch, False)['inputs']
        return inputs['img'] if isinstance(inputs, Mapping) else inputs

    return to_input


def _refuse_test_sets(runner: Any, dataset: Mapping[str, Any]) -> None:
    folder, files = folder_of(dataset), dataset.get('ann_file') or ''
    for kind in ('val', 'test'):
        loaders = runner.cfg.get(f'{kind}_dataloader') or []
        for loader in loaders if isinstance(loaders, (list, tuple)) else [loaders]:
            other = loader.get('dataset') if isinstance(loader, Mapping) else None
            if not isinstance(other, Mapping) or folder == 'the data set' or folder_of(other) != folder:
                continue
            theirs = other.get('ann_file') or ''
            if files == theirs or not (files and theirs):  # two lists may part a folder
                listed = f', as {theirs} lists it' if files == theirs and files else ''
                raise QuantError(
                    f"quant['calibration']['dataset'] reads {folder}{listed}, which is a data set of "
                    f'{kind}_dataloader; name other images, or set ann_file to a list of them'
                )
