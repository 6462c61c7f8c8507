"""The papers' networks: shapes, the papers' own figures, and the public checkpoints on real images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from basicsr_quant import compat
from basicsr_quant.cli import main
from basicsr_quant.errors import QuantError
from basicsr_quant.network.scope import body_layers, weight_layers
from basicsr_quant.network.trace import trace

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')


@pytest.fixture(autouse=True)
def host() -> None:
    compat.apply()


def build(kind: str, **options: Any) -> nn.Module:
    import basicsr_quant.archs  # noqa: F401 (registers)
    from basicsr_quant.models.preparation import build_float

    return build_float({'type': kind, **options}).eval()


# What stays outside the body, as in the published codes of the quantization papers.
ENDS = {
    'SRResNetBN': ['conv_first', 'conv_after_body', 'upsample.0', 'upsample.3', 'conv_last'],
    'IMDN': ['conv_first', 'fusion', 'conv_after_body', 'conv_last'],
    'RFDN': ['conv_first', 'fusion', 'conv_after_body', 'conv_last'],
    'CARN': ['conv_first', 'upsample.0', 'upsample.3', 'conv_last'],
    'CARNM': ['conv_first', 'upsample.0', 'upsample.3', 'conv_last'],
    'RDN': ['conv_first', 'conv_second', 'fusion', 'conv_after_body', 'upsample.0', 'upsample.2', 'conv_last'],
    'IDN': ['conv_first', 'conv_second', 'deconv_last'],
}
SMALL = {'RDN': {'num_block': 2}}


@pytest.mark.parametrize('kind', ENDS)
@torch.no_grad()
def test_sizes_body_and_refusals(kind: str) -> None:
    for scale in (2, 3, 4):
        net = build(kind, upscale=scale, **SMALL.get(kind, {}))
        assert net(torch.rand(2, 3, 16, 18)).shape == (2, 3, 16 * scale, 18 * scale)
    assert [name for name in weight_layers(net) if name not in body_layers(net)] == ENDS[kind]
    with pytest.raises(QuantError, match='upscale: 5 given, allowed: 2, 3, 4'):
        build(kind, upscale=5)


@pytest.mark.parametrize(('kind', 'options', 'thousands'), [
    ('IMDN', {'upscale': 2}, 694), ('IMDN', {'upscale': 3}, 703), ('IMDN', {'upscale': 4}, 715),  # their table 5
    ('IDN', {'num_in_ch': 1, 'upscale': 4}, 553),  # the figure that later papers quote
    ('RFDN', {'upscale': 4}, 433),  # AIM 2020: 0.433 M
    ('RDN', {'upscale': 2}, 22123),  # quoted as 22,123K
])  # fmt: skip
def test_parameters_are_as_many_as_published(kind: str, options: dict[str, Any], thousands: int) -> None:
    with torch.device('meta'):
        count = sum(p.numel() for p in build(kind, **options).parameters())
    assert abs(count / 1000 - thousands) < 1


@pytest.mark.parametrize(('kind', 'upscale', 'published'), [
    ('CARN', 2, 222.8), ('CARN', 4, 90.9), ('CARNM', 2, 91.2), ('CARNM', 4, 32.5), ('IMDN', 2, 158.8),
    ('IMDN', 4, 40.9),
])  # fmt: skip
def test_multiply_adds_for_1280x720_are_as_published(kind: str, upscale: int, published: float) -> None:
    shape = (1, 3, 720 // upscale, 1280 // upscale)
    assert trace(build(kind, upscale=upscale), shape, compute=False).macs / 1e9 == pytest.approx(published, abs=0.1)


def test_rgb_mean_and_range_cancel_in_a_network_without_weights() -> None:
    net = build('CARN', num_feat=4)
    nn.init.zeros_(net.conv_last.weight)
    nn.init.zeros_(net.conv_last.bias)
    mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1)
    assert torch.equal(net(torch.rand(1, 3, 8, 8)), mean.expand(1, 3, 32, 32))
    assert 'mean' not in ' '.join(net.state_dict())


PUBLIC = {  # network, options, file, scale, stated PSNR on Set5
    'SRResNet': ('SRResNetBN', {'num_block': 8}, 'SRResNet-BN-b8f64_x4.pth', 4, 31.883),
    'IMDN': ('IMDN', {}, 'IMDN_x4.pth', 4, 32.210),
    'CARN': ('CARN', {}, 'CARN_x2.pth', 2, 37.883),
    'RFDN': ('RFDN', {}, 'RFDN-AIM_x4.pth', 4, 32.159),
}


@pytest.mark.slow
@pytest.mark.parametrize('case', PUBLIC)
def test_public_checkpoints_give_the_stated_psnr(
    case: str, assets: Path, option_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    kind, options, file, scale, stated = PUBLIC[case]
    benchmark = assets / 'benchmarks/Set5'
    assert main(['test', '-opt', option_file({
        'name': 'net', 'model_type': 'SRModel', 'scale': scale, 'num_gpu': 0, 'manual_seed': 0,
        'datasets': {'test': {
            'name': 'Set5', 'type': 'PairedImageDataset', 'dataroot_gt': str(benchmark / 'HR'),
            'dataroot_lq': str(benchmark / f'LR_bicubic/X{scale}'), 'filename_tmpl': f'{{}}x{scale}',
            'io_backend': {'type': 'disk'},
        }},
        'network_g': {'type': kind, 'upscale': scale, **options},
        'path': {'pretrain_network_g': str(assets / 'weights' / file)},
    })]) == 0  # fmt: skip
    found = json.loads((tmp_path / 'results/net/metrics.json').read_text())
    assert found['datasets']['Set5']['psnr'] == pytest.approx(stated, abs=1e-3)
