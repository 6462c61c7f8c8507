"""A folder of static files and what says which patch goes to which: written, proven, loaded again."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import QuantError
from ..network.patches import Patchwise
from ..network.plan import Plan
from . import engines
from .compare_files import bits_of_router
from .export import export, versions
from .family import Family, frozen
from .files import check_writable, write_bytes
from .loading import Loaded, load_file
from .onnx_file import OPSET
from .parity import ParityImage, switched_off
from .router import Router

MANIFEST = 'family.json'
NOTE = (
    'on a CPU members differ in accuracy, not in speed: 8-bit kernels run all of them; each file holds the weights'
)


def check_folder(path: str) -> None:
    """Refuse a folder that a family cannot be written as, before any work.

    Raises:
        QuantError: naming it.
    """
    target = Path(path)
    if target.suffix in ('.onnx', '.xml') or target.is_file():
        raise QuantError(f'-o {path}: bits that follow the image are exported as several files; give a folder')
    if target.is_dir() and any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise QuantError(f'-o {path} is a folder with other things in it; give a new one')
    check_writable(target.absolute().parent, f'-o {path}')


def export_family(
    net: nn.Module,
    plan: Plan,
    family: Family,
    path: str,
    *,
    shape: tuple[int, ...],
    images: Sequence[ParityImage],
    source: str,
    psnr: Callable[[Tensor, Any], float],
    counted: Sequence[str],
    patch: tuple[int, int] | None = None,
    engine: str = 'onnxruntime',
    opset: int = OPSET,
    facts: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Export each member as :func:`.export.export` does, prove each, and measure the family as a whole.

    Args:
        net: The adaptive network, in eval mode on the CPU.
        plan: Its plan.
        family: From :func:`.family.family_of`.
        path: The folder; a family that is there is replaced when everything is proven.
        shape, images, source, psnr, engine, opset, facts, report: As there.
        counted: Layers that FAB counts.
        patch: Size and stride of patches that images are cut into, None for whole images.

    Returns:
        What ``family.json`` holds.

    Raises:
        QuantError: if a member cannot be exported, fails parity, or the folder cannot be written.
    """
    check_folder(path)
    target = Path(path).absolute()
    temporary = target.with_name(f'.{target.name}.{os.getpid()}.tmp')
    total = len(family.bits)
    try:
        members, files, left_out = [], [], []
        for number, bits in enumerate(family.bits, 1):
            twin, plan_of_member = frozen(net, bits, plan)
            by_layer = {layer.layer: layer.a_bits for layer in plan_of_member}
            fab = sum(by_layer[name] for name in counted) / max(1, len(counted))
            report(f'member {number} of {total}: inputs at {fab:.2f} bits')
            file = temporary / f'member_{number}.onnx'
            done = export(
                twin, plan_of_member, str(file), shape=shape, images=images, source=source, psnr=psnr,
                engine=engine, opset=opset, facts=facts, report=report,
            )  # fmt: skip
            files.append(file)
            left_out = done.plan.left_out
            members.append({'file': file.name, 'fab': fab, 'bytes': done.file_bytes, 'bits': dict(bits)})
        router = _router(files, members, family.thresholds, engine, None)[0]
        manifest = {
            **(facts or {}),
            'method': plan.method,
            'engine': engine,
            'patch': None if patch is None else {'size': patch[0], 'stride': patch[1]},
            'router': {'measure': 'complexity', 'thresholds': list(family.thresholds), 'rule': family.rule},
            'agreement': None if family.agreement is None else vars(family.agreement),
            'members': members,
            'parity': _whole(net, router, images, source, psnr, counted, patch, left_out),
            'note': NOTE,
            'versions': versions(),
        }
        for line in summary(manifest):
            report(line)
        write_bytes(temporary / MANIFEST, (json.dumps(manifest, indent=2) + '\n').encode())
        _replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def summary(manifest: Mapping[str, Any]) -> list[str]:
    """What is printed of a family as a whole."""
    found = manifest['parity']
    size = sum(member['bytes'] for member in manifest['members'])
    lines = [f'{len(manifest["members"])} members, {size:,} bytes; {manifest["router"]["rule"]}']
    if manifest['agreement']:
        said = manifest['agreement']
        lines.append(
            f'on those patches {100 * said["equal"]:.1f} % of the decisions are the bits that the network itself '
            f'chose, {100 * said["lower"]:.1f} % are fewer'
        )
    bits = f'FAB {found["fab"]["test"]:.2f} and {found["fab"]["family"]:.2f}'
    level = ''
    if found['psnr']['test'] is not None:
        level = f'PSNR {found["psnr"]["test"]:.3f} and {found["psnr"]["family"]:.3f} dB, '
    lines.append(f'basicsr test and the family on {found["count"]} images ({found["images"]}): {level}{bits}')
    return [*lines, manifest['note']]


def load_family(path: Path, engine: str | None = None, threads: int | None = None) -> Loaded:
    """A folder that :func:`export_family` wrote, as one network.

    Raises:
        QuantError: if it is none, or a file of it is missing or refused.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding='utf-8'))
        members, thresholds = manifest['members'], manifest['router']['thresholds']
        names = [path / str(member['file']) for member in members]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise QuantError(f'-m {path} is no folder of `basicsr export`: {MANIFEST}: {error}') from None
    missing = [str(name) for name in names if not name.is_file()]
    if missing or len(thresholds) != len(names) - 1:
        raise QuantError(f'-m {path} is not whole: ' + (f'{missing[0]} is missing' if missing else 'thresholds'))
    router, first = _router(names, members, thresholds, engine or manifest.get('engine'), threads)
    tile = (manifest.get('patch') or {}).get('size')
    return Loaded(router, first.channels, first.scale, first.fixed, first.batched, tile, router.summary)


def _router(
    files: Sequence[Path], members: Sequence[Mapping[str, Any]], thresholds: Sequence[float], engine: str | None,
    threads: int | None,
) -> tuple[Router, Loaded]:  # fmt: skip
    loaded = [load_file(file, engine if engine == 'openvino' else None, threads) for file in files]
    fabs = [float(member['fab']) for member in members]
    return Router([found.run for found in loaded], thresholds, fabs, loaded[0].batched), loaded[0]


@torch.no_grad()
def _whole(
    net: nn.Module, router: Router, images: Sequence[ParityImage], source: str,
    psnr: Callable[[Tensor, Any], float], counted: Sequence[str], patch: tuple[int, int] | None,
    left_out: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """PSNR and FAB of the adaptive network in PyTorch, without what the engine leaves out, and of its family there."""
    passes: list[float] = []
    context: Any = net._quant_context
    planned = {name: float(getattr(net.get_submodule(name).input_quantizer, 'num_bits', 0)) for name in counted}

    def adaptive(image: Tensor) -> Tensor:
        with switched_off(net, left_out):
            output = net(image)
        bits = {**planned, **{name: float(found.mean()) for name, found in context.bits.items()}}
        passes.append(sum(bits[name] for name in counted) / max(1, len(counted)))
        return output  # type: ignore[no-any-return]

    levels: dict[str, list[float]] = {'test': [], 'family': []}
    fabs: dict[str, list[float]] = {'test': [], 'family': []}
    routed = bits_of_router(router)
    for item in images:
        passes.clear()
        for name, run in (('test', adaptive), ('family', router)):
            output = in_patches(run, patch)(item.image)
            if item.truth is not None:
                levels[name].append(psnr(output, item.truth))
        fabs['test'].append(sum(passes) / len(passes))
        fabs['family'].append(routed())
    return {
        'images': source,
        'count': len(images),
        'psnr': {name: sum(found) / len(found) if found else None for name, found in levels.items()},
        'fab': {name: sum(found) / len(found) for name, found in fabs.items()},
    }


def in_patches(run: engines.Run, patch: tuple[int, int] | None) -> engines.Run:
    """``run`` patch by patch, as ``quant.patch`` has it."""
    return run if patch is None else Patchwise(_Module(run), *patch)


class _Module(nn.Module):
    def __init__(self, run: engines.Run) -> None:
        super().__init__()
        self.run = run

    def forward(self, image: Tensor) -> Tensor:
        return self.run(image)


def _replace(temporary: Path, target: Path) -> None:
    """Put a whole folder in the place of one that may be there."""
    old = target.with_name(f'.{target.name}.{os.getpid()}.old')
    try:
        if target.exists():
            os.replace(target, old)
        os.replace(temporary, target)
    except OSError as error:
        if old.exists() and not target.exists():
            os.replace(old, target)
        raise QuantError(f'{target} cannot be written: {error.strerror or error}') from None
    shutil.rmtree(old, ignore_errors=True)
