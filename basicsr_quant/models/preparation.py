"""Everything that can be decided and refused before the host starts: method, plan, model class, checkpoint."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from basicsr.utils.registry import ARCH_REGISTRY, MODEL_REGISTRY
from torch import nn

from ..config import CalibrationConfig, QuantConfig, read_config
from ..data.calibration import dataset_options, number_of_images
from ..data.check import check_dataset
from ..errors import QuantError
from ..methods import method_of, needs_images
from ..methods.distillation import layer_weights
from ..network.plan import Plan
from ..network.trace import trace
from ..random_state import preserved
from ..report.plan_card import plan_card
from ..sparsity import SparsityConfig, read_sparsity
from . import checkpoint


def prepare(
    raw: Mapping[str, Any],
    block: Any,
    *,
    command: str,
    root: str,
    is_train: bool,
    debug: bool,
    resuming: bool,
    asked: Mapping[str, Any],
) -> dict[str, Any]:
    """Check ``quant:`` and ``sparsity:`` against the rest of the option file and return what the model needs.

    Args:
        raw: The option file with ``--force_yml`` applied, test sets selected.
        block: Its ``quant:`` block.
        command: ``train``, ``test``, ``calibrate`` ...
        root: The working directory, root of ``experiments/`` and ``results/``.
        is_train: Whether the host trains.
        debug: The host's ``--debug``, which renames the experiment.
        resuming: The run goes on from a training state; ``path.pretrain_network_g`` is not read.
        asked: What the command line asked for beside the host's flags.

    Returns:
        ``plan``, ``calibration``, ``feature_scale``, ``patch``, ``save_bits``, ``distill``, ``checkpoint``,
        ``param_key``, ``note``, ``experiment``, ``w_bits``, ``a_bits``, ``command``, ``card``.
    """
    config, sparsity = read_config(block), read_sparsity(raw.get('sparsity'))
    _check_model(raw['model_type'], config, sparsity, is_train)
    net = build_float(raw['network_g'])
    traced = trace(net)
    plan = config.plan(net, traced, training=is_train, sparsity=sparsity)
    name = f'debug_{raw["name"]}' if debug and not raw['name'].startswith('debug') else raw['name']
    experiment = os.path.join(root, 'experiments', name)
    path, key, note = choose_checkpoint(raw, command, experiment, plan, is_train, asked.get('checkpoint'))
    if not resuming:
        file = None
        if path is not None:
            file = checkpoint.read_network_file(path)
            if file.plan is not None and config.fold_bn is None:
                plan = _folded_as(file.plan, plan)
            _check_file(file, key, net, plan, strict=raw['path'].get('strict_load_g', True))
        _check_masks(sparsity, file, is_train)
        _check_calibration(raw, config, file, plan, path, is_train)
    return {
        'plan': plan,
        'calibration': config.calibration,
        'feature_scale': config.feature_scale,
        'patch': config.patch,
        'save_bits': config.save_bits,
        'distill': _distill(raw, config, net, plan) if is_train else None,
        'checkpoint': path,
        'param_key': key,
        'note': note,
        'experiment': experiment,
        'command': command,
        'card': plan_card(traced, plan),
        'w_bits': config.w_bits,
        'a_bits': config.a_bits,
    }


def can_report(raw: Mapping[str, Any]) -> bool:
    """Whether the result files can be made for an option file without ``quant:``: a model that tests as SRModel does,
    and a network that runs on a dummy image."""
    from basicsr.models.sr_model import SRModel
    from basicsr.models.video_base_model import VideoBaseModel

    cls = MODEL_REGISTRY.get(raw['model_type'])
    if not (isinstance(cls, type) and issubclass(cls, SRModel)) or issubclass(cls, VideoBaseModel):
        return False
    try:
        trace(build_float(raw['network_g']))
    except QuantError:
        return False
    return True


def build_float(network: Mapping[str, Any]) -> nn.Module:
    """Build the FP32 network of ``network_g`` without touching the random state.

    Raises:
        QuantError: for options that the architecture does not take.
    """
    options = {k: v for k, v in network.items() if k != 'type'}
    kind = network['type']
    try:
        with preserved(), warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'torch.meshgrid')  # said once a process; the host's own affair
            return ARCH_REGISTRY.get(kind)(**options)  # type: ignore[no-any-return]
    except QuantError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        raise QuantError(f'network_g: {kind} cannot be built from its options: {error}') from None


def _check_model(model_type: str, config: QuantConfig, sparsity: SparsityConfig | None, is_train: bool) -> None:
    from basicsr.models.sr_model import SRModel
    from basicsr.models.srgan_model import SRGANModel
    from basicsr.models.video_base_model import VideoBaseModel

    cls = MODEL_REGISTRY.get(model_type)
    if not (isinstance(cls, type) and issubclass(cls, SRModel)):
        block = 'quant' if sparsity is None else 'sparsity'
        raise QuantError(f'model_type: {model_type} does not derive from SRModel, so {block}: cannot be used with it')
    if is_train and issubclass(cls, (SRGANModel, VideoBaseModel)) and (config.method != 'none' or sparsity):
        kind = 'GAN' if issubclass(cls, SRGANModel) else 'video'
        given = f'quant.method {config.method!r}' if sparsity is None else f'sparsity.method {sparsity.method!r}'
        raise QuantError(
            f'model_type: {model_type} is a {kind} model; training it with {given} is not '
            'supported, `basicsr calibrate` and `basicsr test` are'
        )


def choose_checkpoint(
    raw: Mapping[str, Any], command: str, experiment: str, plan: Plan, is_train: bool, asked: str | None
) -> tuple[str | None, str | None, str]:
    """Which network file, which entry of it, and a sentence that says so."""
    given = raw['path'].get('pretrain_network_g')
    given = os.path.expanduser(given) if given else None
    key = raw['path'].get('param_key_g', 'params')
    if is_train or command == 'calibrate':
        if command == 'calibrate' and given is None:
            raise QuantError('path.pretrain_network_g is missing; `basicsr calibrate` quantizes that FP32 network')
        return given, key, 'path.pretrain_network_g'
    if asked is not None:
        return asked, _averaged(asked, raw), '--checkpoint'
    own = [os.path.join(experiment, 'models', f'net_g_{label}.pth') for label in ('latest', 'calibrated')]
    own = sorted((p for p in own if os.path.isfile(p)), key=os.path.getmtime)
    untouched = plan.method == 'none' and plan.sparsity is None
    if own and not (untouched and given is not None):
        return own[-1], _averaged(own[-1], raw), "the experiment's own"
    if given is None:
        raise QuantError(
            f"nothing to test: there is no {os.path.join(experiment, 'models', 'net_g_latest.pth')}, "
            'path.pretrain_network_g is not set and --checkpoint not given'
        )
    return given, key, 'path.pretrain_network_g'


def _folded_as(theirs: Plan, plan: Plan) -> Plan:
    """The plan with BatchNorms folded as in a quantized file, where the option file leaves it open."""
    settings = {k: v for k, v in plan.settings.items() if k != 'folded'}
    if theirs.settings.get('folded'):
        settings['folded'] = theirs.settings['folded']
    return replace(plan, settings=settings)


def _distill(raw: Mapping[str, Any], config: QuantConfig, net: nn.Module, plan: Plan) -> dict[str, Any] | None:
    """Teacher file, its entry, and what is compared how; the file is tried on the network."""
    distill = config.distill
    if distill is None or plan.method == 'none':
        return None
    weights = layer_weights(net, distill.layer_weights(), distill.weight)
    path, key = distill.teacher, None
    if path in ('start', 'fp32'):
        path, key = raw['path'].get('pretrain_network_g'), raw['path'].get('param_key_g', 'params')
        if path is None:
            raise QuantError(
                f'quant.distill.teacher: {distill.teacher!r} is path.pretrain_network_g, which is not given'
            )
    path = os.path.expanduser(path)
    teacher = load_teacher(raw['network_g'], path, key)
    if distill.teacher == 'fp32' and hasattr(teacher, '_quant_context'):
        raise QuantError(f"quant.distill.teacher: 'fp32' given, but {path} is quantized; write start, or another path")
    return {'teacher': path, 'key': key, 'weights': weights, 'loss': distill.loss}


def load_teacher(network: Mapping[str, Any], path: str, key: str | None) -> nn.Module:
    """The network of ``path``, in floating point or quantized as the file says."""
    return checkpoint.load_teacher(checkpoint.read_network_file(path), build_float(network), key)


def _averaged(path: str, raw: Mapping[str, Any]) -> str:
    """The entry of an experiment's file: the averaged weights where training kept them, as its validation used."""
    if 'param_key_g' in raw['path']:
        return str(raw['path']['param_key_g'])
    return 'params_ema' if 'params_ema' in checkpoint.read_network_file(path).states else 'params'


def _check_file(file: checkpoint.NetworkFile, key: str | None, net: nn.Module, plan: Plan, strict: bool) -> None:
    if file.plan is not None:
        checkpoint.compare_plans(file, plan, net)
        return
    checkpoint.load_state(net, file, key, strict)
    bad = [name for name, tensor in net.state_dict().items() if not tensor.isfinite().all()]
    if bad:
        raise QuantError(f"{file.path} holds values that are not finite, in '{bad[0]}'")


def _check_masks(sparsity: SparsityConfig | None, file: checkpoint.NetworkFile | None, is_train: bool) -> None:
    """Refuse to calibrate or test a network whose masks come out of a training that was not."""
    if is_train or sparsity is None or not sparsity.learns or (file is not None and file.plan is not None):
        return
    there = 'no file is given' if file is None else f'{file.path} has no masks'
    raise QuantError(
        f'sparsity.method: {sparsity.method!r} learns its masks in training, but {there}; run `basicsr train` first, '
        'or use one_shot'
    )


def _check_calibration(
    raw: Mapping[str, Any],
    config: QuantConfig,
    file: checkpoint.NetworkFile | None,
    plan: Plan,
    path: str | None,
    is_train: bool,
) -> None:
    if file is not None and file.has_ranges(plan):
        assert file.plan is not None
        if file.plan.method == plan.method or not (is_train and method_of(plan).measures_start):
            return
    elif not needs_images(plan):
        return
    if config.calibration is None and not is_train:
        raise QuantError(
            f'{path} is an FP32 file and has no ranges; add quant.calibration (LQ images), or train first, '
            'or name a quantized file by --checkpoint'
        )
    train = raw['datasets'].get('train') if is_train else None
    wanted = config.calibration or CalibrationConfig()
    options = dataset_options(wanted, train, raw.get('scale', 1))
    there = check_dataset(options, 'quant.calibration.dataset')
    if there is not None:
        number_of_images(wanted, there, options)
    folder = options.get('dataroot_lq') or options.get('dataroot_gt')
    for name, other in raw['datasets'].items():
        if name.split('_')[0] in ('val', 'test') and folder in (other.get('dataroot_lq'), other.get('dataroot_gt')):
            raise QuantError(f'quant.calibration.dataset reads {folder}, which is the test set datasets.{name}')
