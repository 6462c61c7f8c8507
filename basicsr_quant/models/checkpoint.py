"""Network files: FP32 ones as people have them, and quantized ones with their plan."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..compat.files import atomic_save
from ..errors import QuantError
from ..methods import METHODS, method_of, quantize
from ..network.clamps import FinalClamp
from ..network.folding import fold_state, folds_of
from ..network.plan import Plan
from ..network.sparsity_plan import SparsityPlan
from ..network.surgery import quant_state, quantizers
from ..random_state import preserved
from ..sparsity.storage import pack_state, unpack_state
from . import conventions


@dataclass(frozen=True)
class NetworkFile:
    """What a network file holds.

    Attributes:
        path: Where it was read.
        states: State dicts by key: ``params``, ``params_ema``, ``state_dict``; ``None`` for a file that is a bare state
            dict.
        plan: The plan of a quantized file, else None.
        calibration: What calibration measured (``feature_scale``), of a quantized file.
    """

    path: str
    states: Mapping[str | None, dict[str, Tensor]]
    plan: Plan | None = None
    calibration: Mapping[str, Any] = field(default_factory=dict)

    def has_ranges(self, plan: Plan) -> bool:
        """Whether the file is of a quantized network, or of one that ``plan`` does not quantize either."""
        return self.plan is not None and not (self.plan.sparsity and plan.quantized and not self.plan.quantized)

    def state(self, key: str | None) -> tuple[str | None, dict[str, Tensor]]:
        """The state dict under ``key``, without the prefixes ``module.`` and ``generator.``.

        For a missing key ``params`` stands in, or the entry of another project (``state_dict``, or the file itself).
        ``params_ema`` of a file of MMagic are the tensors ``generator_ema.``.

        Returns:
            The key that was found, and the state dict.
        """
        found = next((k for k in (key, 'params', 'state_dict', 'model', None) if k in self.states), key)
        if found not in self.states:
            have = ', '.join(str(k) for k in self.states)
            raise QuantError(f"{self.path} has no entry '{key}' (path.param_key_g); it has: {have}")
        state = {k.removeprefix('module.'): v for k, v in self.states[found].items()}
        for prefix in ('generator_ema.',) * (key == 'params_ema') + ('generator.',):
            inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if inner:
                return found, inner
        return found, state


def read_network_file(path: str) -> NetworkFile:
    """Read a ``.pth`` file with ``weights_only=True``, or a ``.safetensors`` file.

    Raises:
        QuantError: if it is missing, cannot be read, or holds no state dict.
    """
    try:
        if path.endswith('.safetensors'):
            content: Any = _read_safetensors(path)
        else:
            content = torch.load(path, map_location='cpu', weights_only=True)
    except QuantError:
        raise
    except FileNotFoundError:
        raise QuantError(f'there is no checkpoint {path}') from None
    except Exception as error:
        reason = str(error).strip().splitlines()[0][:120]
        raise QuantError(f'{path} cannot be read as a checkpoint: {type(error).__name__}: {reason}') from None
    if not isinstance(content, Mapping):
        raise QuantError(f'{path} holds a {type(content).__name__}; a network file holds tensors by name')
    return network_file(path, content)


def network_file(path: str, content: Mapping[str, Any]) -> NetworkFile:
    """What ``content``, read from ``path``, is as a network file: of BasicSR, of MMagic, or a bare state dict.

    Raises:
        QuantError: if it holds no state dict.
    """
    states: dict[str | None, dict[str, Tensor]] = {
        key: dict(value) for key, value in content.items() if key != 'quant' and _is_state(value)
    }
    if not states and _is_state(content):
        states = {None: dict(content)}
    if not states:
        raise QuantError(f'{path} holds no network; its entries are: {", ".join(map(str, content))}')
    entry = content.get('quant')
    plan = Plan.from_plain(entry['plan']) if entry else None
    if entry and plan is not None and plan.sparsity is not None and entry.get('packed'):
        states = {key: unpack_state(state, plan.sparsity, entry['packed'], path) for key, state in states.items()}
    return NetworkFile(path, states, plan, dict(entry.get('calibration', {})) if entry else {})


def _read_safetensors(path: str) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise QuantError(f'{path} is read with the package safetensors; install it: pip install safetensors') from None
    return load_file(path)  # type: ignore[no-any-return]


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, Tensor) for v in value.values())


def load_state(net: nn.Module, file: NetworkFile, key: str | None, strict: bool = True) -> str | None:
    """Load one state dict of ``file`` into ``net``, which may be quantized.

    An FP32 file may lack quantizer tensors and counts of batches, which only training reads, and nothing else;
    BatchNorms that the network has folded are folded as it is read. A quantized file loads whole. Both may have the
    names of another project, see :mod:`.conventions`.

    Returns:
        Whose names the file has; None where they are the network's own.

    Raises:
        QuantError: naming the first tensors that do not fit.
    """
    _, state = file.state(key)
    state, named = conventions.adapt(net, state, file.path)
    if file.plan is None:
        state = fold_state(state, folds_of(net))
    own = net.state_dict()
    ranges = tuple(f'{name}.' for name in quant_state(net))
    missing = [k for k in own if k not in state]
    if file.plan is None:
        missing = [k for k in missing if not k.startswith(ranges) and not k.endswith('.num_batches_tracked')]
    elif not file.plan.quantized:  # masks and no range: a training that goes on with quantization sets those
        missing = [k for k in missing if not k.startswith(tuple(f'{name}.' for name in quantizers(net)))]
    unexpected = [k for k in state if k not in own]
    resized = [k for k in own if k in state and own[k].shape != state[k].shape]
    if strict and (missing or unexpected or resized):
        wrong = _differences(missing, unexpected, resized, own, state)
        advice = _advice(net, own, state, (unexpected or missing or resized)[0])
        raise QuantError(f'{file.path} is not of this network: {wrong}; {advice}')
    net.load_state_dict({k: v for k, v in state.items() if k in own and k not in resized}, strict=False)
    return named


def _differences(
    missing: list[str], unexpected: list[str], resized: list[str], own: dict[str, Tensor], state: dict[str, Tensor]
) -> str:
    parts = []
    if resized:
        k = resized[0]
        parts.append(f"'{k}' is {tuple(state[k].shape)} in the file and {tuple(own[k].shape)} in the network")
        if len(resized) > 1:
            parts[-1] += f' (and {len(resized) - 1} more differ in size)'
    if missing:
        parts.append(f"{len(missing)} tensors are missing in the file, '{missing[0]}' first")
    if unexpected:
        parts.append(f"{len(unexpected)} tensors are unknown to the network, '{unexpected[0]}' first")
    return '; '.join(parts)


def _advice(net: nn.Module, own: Mapping[str, Tensor], state: Mapping[str, Tensor], name: str) -> str:
    """What to write in the option file for a file that is not of ``net``; ``name`` is a tensor that does not fit."""
    kinds = conventions.networks_named(state)
    if kinds and type(net).__name__ not in kinds:
        return f'the names are those of {" or ".join(kinds)}, so write network_g: {{type: {kinds[0]}, ...}}'
    block = re.match(r'(.*?)\.\d+\.', name)
    if block is not None:
        counts = [
            len({found[1] for key in tensors if (found := re.match(rf'{re.escape(block[1])}\.(\d+)\.', key))})
            for tensors in (state, own)
        ]
        if all(counts) and counts[0] != counts[1]:
            return f"'{block[1]}' has {counts[0]} parts in the file and {counts[1]} in the network: change network_g"
    return 'write the network_g that the file was trained with'


def compare_plans(file: NetworkFile, plan: Plan, net: nn.Module | None = None) -> None:
    """Refuse a quantized file whose plan is not the option file's; with ``net``, one of another host's names counts."""
    assert file.plan is not None
    theirs = file.plan if net is None else conventions.adapt_plan(net, file.plan, file.path)
    _compare_sparsity(file.path, theirs.sparsity, plan.sparsity)
    if not file.has_ranges(plan):
        return
    if theirs.method != plan.method and theirs.method not in METHODS[plan.method].starts_from:
        raise QuantError(
            f"{file.path} was made with quant.method '{theirs.method}', the option file says '{plan.method}'"
        )
    for key, value in plan.settings.items():
        if key in ('zero_point', 'w_granularity', 'bits') and theirs.settings.get(key) != value:
            raise QuantError(
                f"{file.path} was made with quant.{key} '{theirs.settings.get(key)}', the option file says '{value}'"
            )
    if theirs.settings.get('output') != plan.settings.get('output'):
        raise QuantError(
            f'{file.path} was made with {_output(theirs)}, the option file and this network give {_output(plan)}'
        )
    if theirs.tensors != plan.tensors:
        kind = ['quantized' if one.tensors else 'fp' for one in (theirs, plan)]
        same = kind[0] == kind[1]
        raise QuantError(
            f"{file.path} was made with quant.skip '{kind[0]}'"
            + (' for other tensors than this network has' if same else f", the option file says '{kind[1]}'")
        )
    theirs_folded, folded = (p.settings.get('folded', {}) for p in (theirs, plan))
    if theirs_folded != folded:
        raise QuantError(
            f'{file.path} was made with {len(theirs_folded)} BatchNorm layers folded, the option file folds '
            f'{len(folded)}; set quant.fold_bn: {"true" if theirs_folded else "false"}'
        )
    if theirs.method == plan.method:
        for key in ('bits', 'select_weights'):
            found, wanted = (p.settings.get('options', {}).get(key) for p in (theirs, plan))
            found, wanted = (list(v) if isinstance(v, (list, tuple)) else v for v in (found, wanted))
            if found is not None and wanted is not None and found != wanted:
                raise QuantError(
                    f'{file.path} was made with quant.{plan.method}.{key} {found}, the option file says {wanted}'
                )
    ours = {layer.layer: layer for layer in plan.quantized}
    for layer in theirs.quantized:
        mine = ours.pop(layer.layer, None)
        bits = None if mine is None else (mine.w_bits, mine.a_bits)
        if bits is not None and METHODS[plan.method].chooses_bits:
            continue  # the bits that were asked for are among the settings
        if bits != (layer.w_bits, layer.a_bits):
            here = 'in floating point' if bits is None else f'W{bits[0]}A{bits[1]}'
            raise QuantError(
                f"{file.path} has layer '{layer.layer}' at W{layer.w_bits}A{layer.a_bits}, "
                f'the option file has it {here}'
            )
    if ours:
        raise QuantError(f"{file.path} has layer '{next(iter(ours))}' in floating point, the option file quantizes it")


def _compare_sparsity(path: str, theirs: SparsityPlan | None, ours: SparsityPlan | None) -> None:
    if theirs is None or ours is None:
        if theirs is not ours:
            where = 'the option file has no sparsity block' if ours is None else 'the option file has a sparsity block'
            raise QuantError(f'{path} was made {"without" if theirs is None else "with"} sparsity, {where}')
        return
    for key, name in (('method', 'method'), ('group', 'M'), ('budget', 'budget')):
        found, wanted = getattr(theirs, key), getattr(ours, key)
        if found != wanted:
            raise QuantError(f'{path} was made with sparsity.{name} {found}, the option file says {wanted}')
    names, wanted_names = ({layer.layer for layer in plan.layers} for plan in (theirs, ours))
    if names != wanted_names:
        one = sorted(names ^ wanted_names)[0]
        kind = 'masked' if one in names else 'dense'
        raise QuantError(f"{path} has layer '{one}' {kind}, the option file does not")


def _output(plan: Plan) -> str:
    """What a clip-free plan takes out of its network, in words."""
    output = plan.settings.get('output') or {}
    clamps = '; '.join(str(FinalClamp(**clamp)) for clamp in output.get('clamps', []))
    return f'image range [{output["low"]:g}, {output["high"]:g}] and clamps {clamps}' if output else 'no clamp'


def adopted(file: NetworkFile, net: nn.Module, plan: Plan, key: str | None) -> NetworkFile:
    """A quantized file as the network of ``plan`` loads its entry ``key``: where another method made it, its tensors
    made over, and its own names."""
    if file.plan is None or file.plan.method == plan.method or not file.has_ranges(plan):
        return file
    found, state = file.state(key)
    state, _ = conventions.adapt(net, state, file.path)
    scale = float(file.calibration.get('feature_scale', 1.0))
    return replace(file, states={found: method_of(plan).adopt(state, net.state_dict(), scale)}, plan=plan)


def calibration_of(file: NetworkFile, net: nn.Module) -> dict[str, Any]:
    """What the calibration of a quantized file measured, with the names of ``net``."""
    if file.plan is None:
        return {}
    modules = conventions.module_names(net, file.plan, file.path)
    return dict(conventions.translated(file.calibration, modules))


def load_teacher(file: NetworkFile, net: nn.Module, key: str | None) -> nn.Module:
    """Make ``net``, an FP32 network of the same architecture, the network of ``file``: quantized where that is.

    Raises:
        QuantError: if the file is of another network.
    """
    try:
        if file.plan is not None:
            with preserved():
                quantize(net, conventions.adapt_plan(net, file.plan, file.path))
        load_state(net, file, key or 'params')
    except QuantError as error:
        raise QuantError(f'quant.distill.teacher: {error}') from None
    return net


def save_network_file(
    path: str, states: Mapping[str, dict[str, Tensor]], plan: Plan, calibration: Any, packed: bool = False
) -> None:
    """Write a quantized network file in the host's format, whole or not at all.

    Args:
        path: Where to.
        states: By entry, ``params`` and ``params_ema``.
        plan: In force.
        calibration: What it measured, plain data.
        packed: Store of masked weights what the masks keep; such a file is read here like any other, for tests and
            as a start, but holds too little to resume from.
    """
    content: dict[str, Any] = {key: {k: v.cpu() for k, v in state.items()} for key, state in states.items()}
    content['quant'] = {'plan': plan.to_plain(), 'calibration': dict(calibration)}
    if packed and plan.sparsity is not None:
        for key in states:
            content[key], content['quant']['packed'] = pack_state(content[key], plan.sparsity)
    atomic_save(content, path)
