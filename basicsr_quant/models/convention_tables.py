"""How other projects name the tensors of the networks that are registered here: facts, one table for each."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Union

Target = Union[str, Callable[[re.Match[str]], str], None]
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


def _even(match: re.Match[str]) -> str:
    """Up-samplers that are counted in steps; ours count each convolution and each pixel shuffle."""
    return f'upsample.{2 * int(match[1])}.{match[2]}'


def _upsampler_with_activation(match: re.Match[str]) -> str:
    return f'upsample.{3 * int(match[1])}.{match[2]}'


def _from_one(prefix: str, target: str) -> tuple[str, Target]:
    """Blocks that are counted from one, as attributes; ours are a list from zero."""
    return rf'{prefix}(\d+)\.(.+)', lambda m: f'{target}.{int(m[1]) - 1}.{m[2]}'


def _cascade(match: re.Match[str]) -> str:
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
                # PAMS and DDTB keep a quantizer at 2 and the convolution at 3; DAQ and AdaBM name both convolutions
                (r'body\.(\d+)\.body\.[23]\.(weight|bias)', r'body.\1.conv2.\2'),
                (r'body\.(\d+)\.(conv[12]\..+)', r'body.\1.\2'),
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
                (r'UPNet\.(\d+)\.(.+)', r'upnet@\1.\2'),
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
