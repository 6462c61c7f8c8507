"""How other projects name the tensors of the same networks, and the way from their names to ours.

A convention is a table of patterns for one architecture. It is used where a file's names are not the network's own and
every name of the file is in the table; what comes out is then loaded as strictly as any other file. Names tell nothing
about pixel ranges: where a file holds its mean shifts they are compared with the network's, and elsewhere the range is
said in the table's note.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Union

import torch
from torch import Tensor, nn

from ..errors import QuantError

Target = Union[str, Callable[[re.Match], str], None]  # noqa: UP007 (read at run time, Python 3.9)
"""A replacement for a pattern's match; None for tensors that the network keeps elsewhere."""


@dataclass(frozen=True)
class Convention:
    """One project's names for one architecture.

    Args:
        project: Whose names they are.
        rules: Pattern of a whole name -> the network's own name; the first that matches counts.
        mean_shifts: The file holds ``sub_mean`` and ``add_mean`` as 1x1 convolutions, which the network holds as
            options (``img_range``, ``rgb_mean``).
        refused: Why such a file cannot be used although the names are known.
    """

    project: str
    rules: tuple[tuple[str, Target], ...]
    mean_shifts: bool = False
    refused: str = ''


_MEAN_SHIFT = r'(sub|add)_mean\.(shifter\.)?(weight|bias)'


def _even(match: re.Match) -> str:
    """Up-samplers that are counted in steps; ours count each convolution and each pixel shuffle."""
    return f'upsample.{2 * int(match[1])}.{match[2]}'


def _upsampler_with_activation(match: re.Match) -> str:
    return f'upsample.{3 * int(match[1])}.{match[2]}'


def _from_one(prefix: str, target: str) -> tuple[str, Target]:
    """Blocks that are counted from one, as attributes; ours are a list from zero."""
    return rf'{prefix}(\d+)\.(.+)', lambda m: f'{target}.{int(m[1]) - 1}.{m[2]}'


def _cascade(match: re.Match) -> str:
    """CARN's names, written for each of the nested cascades: b1 b2 b3 are blocks, c1 c2 c3 their fusions."""
    parts = {'b': 'blocks', 'c': 'fusions'}
    path = ''.join(f'.{parts[part[0]]}.{int(part[1:]) - 1}' for part in match[1].split('.'))
    conv = 'conv' if path.endswith('.fusions', 0, -2) else f'conv{int(match[2]) // 2 + 1}'
    return f'body{path}.{conv}.{match[3]}'


_EDSR_PYTORCH_ENDS: tuple[tuple[str, Target], ...] = (
    (r'head\.0\.(.+)', r'conv_first.\1'),
    (r'body\.\d+\.(weight|bias)', r'conv_after_body.\1'),
    (r'tail\.0\.(\d+)\.(.+)', r'upsample.\1.\2'),
    (r'tail\.1\.(.+)', r'conv_last.\1'),
    (_MEAN_SHIFT, None),
)
_DISTILLATION: tuple[tuple[str, Target], ...] = (
    (r'fea_conv\.(.+)', r'conv_first.\1'),
    (r'c\.0\.(.+)', r'fusion.\1'),
    (r'LR_conv\.(.+)', r'conv_after_body.\1'),
    (r'upsampler\.0\.(.+)', r'conv_last.\1'),
)
_CARN = Convention(
    'CARN-pytorch',
    (
        (r'entry\.(.+)', r'conv_first.\1'),
        (r'exit\.(.+)', r'conv_last.\1'),
        (r'((?:b\d\.)?[bc]\d)\.body\.(\d)\.(weight|bias)', _cascade),
        # 0 and 3: a convolution, its ReLU, its pixel shuffle
        (r'upsample\.up(\d?)\.body\.(\d+)\.(.+)', r'upsample@\1.\2.\3'),
        (_MEAN_SHIFT, None),
    ),
    mean_shifts=True,
)

CONVENTIONS: Mapping[str, tuple[Convention, ...]] = {
    'EDSR': (
        Convention(
            'EDSR-PyTorch',
            (
                (r'body\.(\d+)\.body\.0\.(.+)', r'body.\1.conv1.\2'),
                (r'body\.(\d+)\.body\.[23]\.(weight|bias)', r'body.\1.conv2.\2'),  # 3: PAMS and DDTB keep a quantizer at 2
                (r'body\.(\d+)\.(conv[12]\..+)', r'body.\1.\2'),  # DAQ and AdaBM name them so
                *_EDSR_PYTORCH_ENDS,
            ),
            mean_shifts=True,
        ),
        Convention(
            'MMagic',
            (
                (r'upsample\.(\d+)\.upsample_conv\.(.+)', _even),
                (r'((?:conv_first|conv_last|conv_after_body|body)\..+)', r'\1'),
            ),
        ),
    ),
    'RCAN': (
        Convention(
            'EDSR-PyTorch',
            (
                (r'body\.(\d+)\.body\.(\d+)\.body\.3\.conv_du\.(\d)\.(.+)',
                 lambda m: f'body.{m[1]}.residual_group.{m[2]}.rcab.3.attention.{int(m[3]) + 1}.{m[4]}'),
                (r'body\.(\d+)\.body\.(\d+)\.body\.(\d)\.(.+)', r'body.\1.residual_group.\2.rcab.\3.\4'),
                (r'body\.(\d+)\.body\.\d+\.(weight|bias)', r'body.\1.conv.\2'),
                *_EDSR_PYTORCH_ENDS,
            ),
            mean_shifts=True,
        ),
    ),
    'MSRResNet': (
        Convention(
            'KAIR',
            (
                (r'recon_trunk\.(.+)', r'body.\1'),
                (r'HRconv\.(.+)', r'conv_hr.\1'),
                (r'((?:conv_first|conv_last|upconv[12])\..+)', r'\1'),
            ),
        ),
        Convention(
            'MMagic',
            (
                (r'trunk_net\.(.+)', r'body.\1'),
                (r'upsample(\d)\.upsample_conv\.(.+)', r'upconv\1.\2'),
                (r'((?:conv_first|conv_last|conv_hr)\..+)', r'\1'),
            ),
            refused="MMagic's MSRResNet has no activation behind its up-samplers, BasicSR's has: they are different "
            'networks',
        ),
    ),
    'RRDBNet': (
        Convention(
            'KAIR',
            (
                (r'RRDB_trunk\.(\d+)\.RDB(\d)\.(.+)', r'body.\1.rdb\2.\3'),
                (r'trunk_conv\.(.+)', r'conv_body.\1'),
                (r'upconv(\d)\.(.+)', r'conv_up\1.\2'),
                (r'HRconv\.(.+)', r'conv_hr.\1'),
                (r'((?:conv_first|conv_last)\..+)', r'\1'),
            ),
        ),
        Convention(
            'ESRGAN, first version',
            (
                (r'model\.1\.sub\.(\d+)\.RDB(\d)\.conv(\d)\.0\.(.+)', r'body.\1.rdb\2.conv\3.\4'),
                (r'model\.1\.sub\.\d+\.(weight|bias)', r'conv_body.\1'),
                (r'model\.0\.(.+)', r'conv_first.\1'),
                (r'model\.3\.(.+)', r'conv_up1.\1'),
                (r'model\.6\.(.+)', r'conv_up2.\1'),
                (r'model\.8\.(.+)', r'conv_hr.\1'),
                (r'model\.10\.(.+)', r'conv_last.\1'),
            ),
        ),
    ),
    'SRResNetBN': (
        Convention(
            "PyTorch's super-resolution tutorial",
            (
                (r'conv_input\.(.+)', r'conv_first.\1'),
                (r'relu\.(.+)', r'prelu_first.\1'),
                (r'residual\.(\d+)\.relu\.(.+)', r'body.\1.prelu.\2'),
                (r'residual\.(.+)', r'body.\1'),
                (r'conv_mid\.(.+)', r'conv_after_body.\1'),
                (r'bn_mid\.(.+)', r'bn_after_body.\1'),
                (r'up\.(\d)\.conv\.(.+)', _upsampler_with_activation),
                (r'up\.(\d)\.relu\.(.+)', lambda m: f'upsample.{3 * int(m[1]) + 2}.{m[2]}'),
                (r'conv_output\.(.+)', r'conv_last.\1'),
            ),
        ),
    ),
    'IMDN': (Convention("the authors' (Zheng222/IMDN)", (_from_one('IMDB', 'body'), *_DISTILLATION)),),
    'RFDN': (Convention('NTIRE ESR', (_from_one('B', 'body'), *_DISTILLATION)),),
    'CARN': (_CARN,),
    'CARNM': (_CARN,),
    'RDN': (
        Convention(
            'EDSR-PyTorch',
            (
                (r'SFENet1\.(.+)', r'conv_first.\1'),
                (r'SFENet2\.(.+)', r'conv_second.\1'),
                (r'RDBs\.(\d+)\.convs\.(\d+)\.conv\.0\.(.+)', r'body.\1.convs.\2.\3'),
                (r'RDBs\.(\d+)\.LFF\.(.+)', r'body.\1.fusion.\2'),
                (r'GFF\.0\.(.+)', r'fusion.\1'),
                (r'GFF\.1\.(.+)', r'conv_after_body.\1'),
                (r'UPNet\.(\d+)\.(.+)', r'upsample.\1.\2'),
            ),
        ),
        Convention(
            'MMagic',
            (
                (r'sfe1\.(.+)', r'conv_first.\1'),
                (r'sfe2\.(.+)', r'conv_second.\1'),
                (r'rdbs\.(\d+)\.layers\.(\d+)\.conv\.(.+)', r'body.\1.convs.\2.\3'),
                (r'rdbs\.(\d+)\.lff\.(.+)', r'body.\1.fusion.\2'),
                (r'gff\.0\.(.+)', r'fusion.\1'),
                (r'gff\.1\.(.+)', r'conv_after_body.\1'),
                (r'upscale\.(\d+)\.(.+)', r'upsample.\1.\2'),
                (r'output\.(.+)', r'conv_last.\1'),
            ),
        ),
    ),
    'IDN': (
        Convention(
            'IDN-pytorch, CADyQ',
            (
                (r'fblock\.module\.0\.(.+)', r'conv_first.\1'),
                (r'fblock\.module\.2\.(.+)', r'conv_second.\1'),
                (r'dblocks\.(\d+)\.enhancement_(top|bottom)\.(\d)\.(.+)',
                 lambda m: f'body.{m[1]}.{"upper" if m[2] == "top" else "lower"}.{int(m[3]) // 2}.{m[4]}'),
                (r'dblocks\.(\d+)\.compression\.(.+)', r'body.\1.compression.\2'),
                (r'deconv\.(.+)', r'deconv_last.\1'),
            ),
        ),
    ),
}  # fmt: skip
"""Conventions by class of the network. SwinIR, SRVGGNetCompact and RRDBNet have one naming in BasicSR, MMagic (and, for
SwinIR, KAIR); those need no table."""


def adapt(net: nn.Module, state: Mapping[str, Tensor], path: str) -> tuple[dict[str, Tensor], str | None]:
    """Bring ``state`` to the names of ``net``.

    Args:
        net: The network, quantized or not; it is not changed.
        state: Tensors of a file, without ``module.`` and the like.
        path: Of the file, for errors.

    Returns:
        The tensors by the network's names, and whose names the file has (None: the network's own, or none known).

    Raises:
        QuantError: for a file that follows a convention in part, listing what did not map; for one whose mean shifts
            differ from the network's; for one that is known to be of another network.
    """
    own = set(net.state_dict())
    if not set(state) - own:
        return dict(state), None
    best: tuple[int, Convention, dict[str, str | None], list[str]] | None = None
    for convention in CONVENTIONS.get(type(net).__name__, ()):
        names, unknown = _rename(convention, state)
        known = sum(name not in own for name in names)
        if known and (best is None or len(unknown) < best[0]):
            best = len(unknown), convention, names, unknown
    if best is None:
        return dict(state), None
    _, convention, names, unknown = best
    network = type(net).__name__
    if convention.refused:
        raise QuantError(f'{path} has the names of {convention.project} for {network}, but {convention.refused}')
    if unknown:
        raise QuantError(
            f'{path} looks like a {network} with the names of {convention.project}, but {_count(len(unknown))} did '
            f'not map: {_some(unknown)}'
        )
    if convention.mean_shifts:
        _check_mean_shifts(net, state, path)
    pairs = [(name, target) for name, target in names.items() if target is not None]
    renamed = {target: state[name] for name, target in pairs}
    return _one_upsampler(net, renamed), convention.project


def _rename(convention: Convention, state: Iterable[str]) -> tuple[dict[str, str | None], list[str]]:
    names: dict[str, str | None] = {}
    unknown = []
    for name in state:
        for pattern, target in convention.rules:
            match = re.fullmatch(pattern, name)
            if match is not None:
                names[name] = target(match) if callable(target) else target and match.expand(target)
                break
        else:
            unknown.append(name)
    return names, unknown


def _one_upsampler(net: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """CARN's files for several scales hold an up-sampler for each (``upsample@2`` ...): the network's own is kept."""
    scale = getattr(net, 'upscale', None)
    return {
        re.sub(r'^upsample@\d?', 'upsample', name): tensor
        for name, tensor in state.items()
        if not name.startswith('upsample@') or name.split('.')[0] in ('upsample@', f'upsample@{scale}')
    }


def _check_mean_shifts(net: Any, state: Mapping[str, Tensor], path: str) -> None:
    """Compare the file's ``x - range * mean`` with what the network's options say."""
    shift = {name.replace('shifter.', ''): tensor for name, tensor in state.items()}
    weight, bias = shift.get('sub_mean.weight'), shift.get('sub_mean.bias')
    if weight is None or bias is None:
        return
    pixels = getattr(net, 'pixels', net)
    mean, img_range = pixels.mean.flatten().cpu(), float(pixels.img_range)
    if not torch.allclose(weight[:, :, 0, 0].float(), torch.eye(len(weight)), atol=1e-4):
        raise QuantError(f'{path} scales colours by its own deviations (sub_mean.weight), which the network does not')
    if len(bias) != len(mean) or not torch.allclose(-bias.float(), mean * img_range, rtol=1e-3, atol=1e-5):
        theirs = ', '.join(f'{-value:.4f}' for value in bias.tolist())
        ours = ', '.join(f'{value:.4f}' for value in (mean * img_range).tolist())
        raise QuantError(
            f'{path} takes the mean ({theirs}) off its input, the network {img_range:g} x rgb_mean = ({ours}); set '
            'network_g.img_range and rgb_mean to those of the file'
        )


def _count(number: int) -> str:
    return f'{number} tensor' + ('s' if number > 1 else '')


def _some(names: list[str], most: int = 8) -> str:
    return ', '.join(names[:most]) + (f' and {len(names) - most} more' if len(names) > most else '')
