"""BasicSR's face of the methods: what is added to a host model, whichever it is."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
from basicsr.utils.dist_util import master_only
from basicsr.utils.registry import MODEL_REGISTRY
from torch import Tensor, nn
from tqdm import tqdm

from ..config import CalibrationConfig
from ..data.calibration import CalibrationImages, dataset_options
from ..methods import calibrate, copy_calibrated, method_of, needs_images
from ..methods.base import Training
from ..methods.distillation import Distillation
from ..network.masking import masks_in_force, start_masks
from ..network.patches import Patchwise
from ..network.plan import Plan
from ..network.ranks import same_on_all_ranks
from ..network.stages import Stages
from ..network.surgery import plan_in_force, quantizers
from ..sparsity import SparseTraining, SparsityMethod, sparsity_of
from . import checkpoint
from .evaluation import Evaluation
from .preparation import load_teacher

logger = logging.getLogger('basicsr')


@MODEL_REGISTRY.register()
def QuantizedModel(opt: dict[str, Any]) -> Any:
    """Build the host model that the option file names, combined with :class:`QuantizedModelMixin`."""
    base = MODEL_REGISTRY.get(opt['quant_run']['model_type'])
    return type(f'Quantized{base.__name__}', (QuantizedModelMixin, base), {})(opt)


class QuantizedModelMixin:
    """Calibrates, trains, saves, loads and tests a quantized ``net_g`` under any model that derives from SRModel.

    The host's methods do their own work; each override here adds one thing and calls them. ``opt['quant_run']`` is
    what the seam prepared: plan, calibration, checkpoint.
    """

    opt: dict[str, Any]
    net_g: nn.Module

    def __init__(self, opt: dict[str, Any]) -> None:
        self._run = opt['quant_run']
        plan: Plan = self._run['plan']
        self._method = method_of(plan)
        self._sparsity: SparsityMethod | None = None if plan.sparsity is None else sparsity_of(plan.sparsity)
        self._calibration: dict[str, Any] = {}
        self._stages = Stages(functools.partial(tqdm, unit='step', leave=False, disable=None))
        self._training: Training | None = None
        self._sparse_training: SparseTraining | None = None
        self._distillation: Distillation | None = None
        self._evaluation: Evaluation | None = None
        self._wrap = False
        logger.info('The plan: %s\n', self._run.pop('card'))
        if self._run['checkpoint'] is not None:
            logger.info('Checkpoint: %s (%s).', self._run['checkpoint'], self._run['note'])
        if any(m is not None and m.leaves_parameters_unused for m in (self._method, self._sparsity)):
            opt['find_unused_parameters'] = True
        super().__init__(opt)  # type: ignore[call-arg]
        if self._sparsity is not None and not self._run.get('loaded_masks'):
            start_masks(self._bare())
        self._calibrate_if_needed()
        self._run['plan'] = masks_in_force(self._bare(), self._run['plan'])
        if self._method.chooses_bits:
            self._run['plan'] = plan_in_force(self._bare(), self._run['plan'])
        if opt['is_train']:
            self._begin_training()
        else:
            self._evaluation = Evaluation(self._run, opt, self._calibration_results())
            if self._run['command'] == 'calibrate':
                self.save_network([self.net_g], 'net_g', 'calibrated', ['params'])

    # -- building --------------------------------------------------------------------------------------------------

    def model_to_device(self, net: nn.Module) -> nn.Module:
        # The host wraps before it loads; the wrapper has to wait for the calibrated network.
        if self._wrap or not _is_quantized(net):
            return super().model_to_device(net)  # type: ignore[misc, no-any-return]
        return net.to(self.device)  # type: ignore[attr-defined]

    def _begin_training(self) -> None:
        # After the host model is whole: a subclass's feed_data, which calibration needs, may use what it makes last.
        net = self._bare()
        self._wrap = True
        self.net_g = self.model_to_device(net)
        if hasattr(self, 'net_g_ema') and (not self._loaded_quantized() or self._measures_start()):
            copy_calibrated(net, self.net_g_ema, self._run['plan'])
        scale = self._run['feature_scale'] or self._calibration.get('feature_scale', 1.0)
        self._training = self._method.attach(net, self.optimizer_g, scale)  # type: ignore[attr-defined]
        if self._sparsity is not None:
            self._sparse_training = self._sparsity.attach(net, self.optimizer_g)  # type: ignore[attr-defined]
        distill = self._run['distill']
        if distill is not None:
            own = {k: v for k, v in self.opt['network_g'].items() if k not in ('type', 'base_type', 'plan')}
            network = {'type': self.opt['network_g']['base_type'], **own}
            teacher = load_teacher(network, distill['teacher'], distill['key'])
            self._distillation = Distillation(net, teacher, distill['weights'], distill['loss'])
            count = len(distill['weights'])
            logger.info('Teacher: %s, %s losses on %d layers.', distill['teacher'], distill['loss'], count)

    def get_optimizer(self, optim_type: str, params: Any, lr: float, **kwargs: Any) -> torch.optim.Optimizer:
        groups = self._method.parameter_groups(self._bare(), params, lr)
        if self._sparsity is not None:
            groups = self._sparsity.parameter_groups(self._bare(), groups, lr)
        return super().get_optimizer(optim_type, groups, lr, **kwargs)  # type: ignore[misc, no-any-return]

    def _bare(self) -> nn.Module:
        return self.get_bare_model(self.net_g)  # type: ignore[attr-defined, no-any-return]

    # -- calibration -----------------------------------------------------------------------------------------------

    def _loaded_quantized(self) -> bool:
        return bool(self._run.get('loaded_quantized'))

    def _measures_start(self) -> bool:
        """Whether the network was made by another method, and this one still has to look at images."""
        return bool(self.opt['is_train'] and self._run.get('taken_over') and self._method.measures_start)

    def _calibrate_if_needed(self) -> None:
        follows = self._measures_start()
        if (self._loaded_quantized() and not follows) or not quantizers(self._bare()):
            return
        config = self._run['calibration'] or CalibrationConfig()
        train = self.opt['datasets'].get('train') if self.opt['is_train'] else None
        looks = follows or needs_images(self._run['plan'])
        options = dataset_options(config, train, self.opt.get('scale', 1)) if looks else {}
        start = time.time()
        net = self._bare()
        same_on_all_ranks(net.state_dict())  # without a checkpoint each rank has drawn its own weights
        before = set(vars(self))
        images = CalibrationImages(config, options, self._to_lq, self.opt['manual_seed']) if looks else ()
        if follows:
            self._method.measure_start(net, self._stages.over('measuring features', images))
        else:
            seen = calibrate(net, self._run['plan'], images, self._stages)
        for name in set(vars(self)) - before:  # what feed_data left behind
            delattr(self, name)
        if follows:
            same_on_all_ranks(net.state_dict())
            logger.info('Measured on %s what the start does not hold, in %.1f s.', options['name'], time.time() - start)
            return
        scale = torch.tensor(seen.feature_scale, dtype=torch.float64, device=self.device)  # type: ignore[attr-defined]
        same_on_all_ranks({**net.state_dict(), 'feature scale': scale})
        self._calibration = {'feature_scale': float(scale), 'images': seen.images}
        if seen.choices:
            self._calibration['choices'] = seen.choices
        source = f'on {seen.images} images of {options["name"]}' if looks else 'without images'
        scale_found = f'; feature scale c = {seen.feature_scale:.4g}' if looks else ''
        logger.info(
            'Calibrated %d quantizers (method %s) %s in %.1f s%s.',
            len(quantizers(net)), self._run['plan'].method, source, time.time() - start, scale_found,
        )  # fmt: skip
        times = ', '.join(f'{name} {seconds:.1f} s' for name, seconds in self._stages.seconds.items())
        logger.info('Stages: %s.', times or 'none')

    def _calibration_results(self) -> dict[str, Any] | None:
        if not self._calibration:
            return None
        known = {key: self._calibration.get(key) for key in ('images', 'feature_scale', 'choices')}
        return {**known, 'seconds': self._stages.seconds or None}

    def _to_lq(self, data: Any) -> Tensor:
        self.feed_data(data)
        return self.lq  # type: ignore[attr-defined, no-any-return]

    # -- training --------------------------------------------------------------------------------------------------

    def get_current_log(self) -> dict[str, float]:
        log = dict(super().get_current_log())  # type: ignore[misc]
        for source in (self._training, self._sparse_training, self._distillation):
            if source is not None:
                log.update(source.log())
        return log

    # -- files -----------------------------------------------------------------------------------------------------

    def load_network(self, net: nn.Module, load_path: str, strict: bool = True, param_key: str = 'params') -> None:
        bare = self.get_bare_model(net)  # type: ignore[attr-defined]
        if not _is_quantized(bare):
            return super().load_network(net, load_path, strict, param_key)  # type: ignore[misc, no-any-return]
        file = checkpoint.read_network_file(load_path)
        if file.plan is not None:
            checkpoint.compare_plans(file, self._run['plan'], bare)
            self._run['loaded_quantized'] = file.has_ranges(self._run['plan'])
            self._run['loaded_masks'] = file.plan.sparsity is not None
            self._run['taken_over'] = self._run['loaded_quantized'] and file.plan.method != self._run['plan'].method
            self._calibration = checkpoint.calibration_of(file, bare)
        found, _ = file.state(param_key)
        kind = 'FP32' if file.plan is None else f'quantized ({file.plan.method})'
        logger.info('Loading %s from %s, a %s file, with param key: [%s].', type(bare).__name__, load_path, kind, found)
        file = checkpoint.adopted(file, bare, self._run['plan'], param_key)
        named = checkpoint.load_state(bare, file, param_key, strict)
        if named is not None:
            logger.info('Its tensors have the names of %s.', named)
        return None

    @master_only
    def save_network(self, net: Any, net_label: str, current_iter: Any, param_key: Any = 'params') -> None:
        nets = [self.get_bare_model(n) for n in (net if isinstance(net, list) else [net])]  # type: ignore[attr-defined]
        if not all(_is_quantized(n) for n in nets):
            return super().save_network(net, net_label, current_iter, param_key)  # type: ignore[misc, no-any-return]
        keys = param_key if isinstance(param_key, list) else [param_key]
        label = 'latest' if current_iter == -1 else current_iter
        folder = self.opt['path'].get('models') or os.path.join(self._run['experiment'], 'models')
        os.makedirs(folder, exist_ok=True)
        path = os.path.join(folder, f'{net_label}_{label}.pth')
        states = {key: n.state_dict() for key, n in zip(keys, nets)}
        plan = masks_in_force(nets[0], self._run['plan'])
        checkpoint.save_network_file(path, states, plan, self._calibration)
        logger.info('Saved %s.', path)
        if plan.sparsity is not None and label in ('latest', 'calibrated'):
            packed = f'{path[: -len(".pth")]}_packed.pth'
            checkpoint.save_network_file(packed, states, plan, self._calibration, packed=True)
            sizes = [os.path.getsize(file) for file in (packed, path)]
            logger.info('Saved %s, with what the masks keep: %s bytes of %s.', packed, *(f'{n:,}' for n in sizes))
        return None

    # -- testing ---------------------------------------------------------------------------------------------------

    def feed_data(self, data: dict[str, Any]) -> None:
        super().feed_data(data)  # type: ignore[misc]
        if self._evaluation is not None:
            self._evaluation.begin_image(data)

    def test(self) -> None:
        if self._evaluation is None:
            super().test()  # type: ignore[misc]
            return
        self._evaluation.watch(self._bare())
        start = time.time()
        with self._in_patches():
            super().test()  # type: ignore[misc]
        self._evaluation.seconds = time.time() - start

    @contextlib.contextmanager
    def _in_patches(self) -> Iterator[None]:
        """Within it the host's test runs the network patch by patch where ``quant.patch`` asks for it."""
        net, patch = self.net_g, self._run['patch']
        if patch is not None:
            self.net_g = Patchwise(self._bare(), patch.size, patch.stride)
        try:
            yield
        finally:
            self.net_g = net

    def get_current_visuals(self) -> dict[str, Tensor]:
        visuals = super().get_current_visuals()  # type: ignore[misc]
        if self._evaluation is not None:
            self._evaluation.end_image(visuals)
        return visuals  # type: ignore[no-any-return]

    def validation(self, dataloader: Any, *args: Any, **kwargs: Any) -> None:
        if self._evaluation is None:
            return super().validation(dataloader, *args, **kwargs)  # type: ignore[misc, no-any-return]
        self._evaluation.begin_dataset(dataloader)
        super().validation(dataloader, *args, **kwargs)  # type: ignore[misc]
        self._evaluation.end_dataset(self)
        return None


def _is_quantized(net: nn.Module) -> bool:
    return hasattr(net, '_quant_context')
