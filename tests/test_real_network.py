"""A real pretrained network on real images; skipped where BASICSR_QUANT_DATA is not set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from basicsr_quant import compat
from basicsr_quant.cli import main

pytestmark = [
    pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed'),
    pytest.mark.slow,
]


def edsr(assets: Path) -> dict[str, Any]:
    """EDSR-b8f64 x2 on Set5, as a test file of BasicSR."""
    benchmark = assets / 'benchmarks/Set5'
    return {
        'name': 'edsr', 'model_type': 'SRModel', 'scale': 2, 'num_gpu': 0, 'manual_seed': 0,
        'datasets': {'test': {
            'name': 'Set5', 'type': 'PairedImageDataset', 'dataroot_gt': str(benchmark / 'HR'),
            'dataroot_lq': str(benchmark / 'LR_bicubic/X2'), 'filename_tmpl': '{}x2', 'io_backend': {'type': 'disk'},
        }},
        'network_g': {
            'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 64, 'num_block': 8, 'upscale': 2,
            'img_range': 2.0,
        },
        'path': {'pretrain_network_g': str(assets / 'weights/EDSR-b8f64_x2.pth')},
    }  # fmt: skip


def run(command: str, options: dict[str, Any], option_file: Any, folder: Path) -> dict[str, Any]:
    assert main([command, '-opt', option_file(options)]) == 0
    return json.loads((folder / 'results/edsr/metrics.json').read_text())  # type: ignore[no-any-return]


def test_fp32_is_what_the_host_computes(
    assets: Path, option_file: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = edsr(assets)
    found = run('test', options, option_file, tmp_path)['datasets']['Set5']
    assert found['psnr'] == pytest.approx(37.801, abs=5e-4)
    assert found['psnr'] == host_psnr(options)


def host_psnr(options: dict[str, Any]) -> float:
    """The same figure from BasicSR's own classes, without a line of this package in between."""
    from basicsr.archs import build_network
    from basicsr.data import build_dataset
    from basicsr.metrics.psnr_ssim import calculate_psnr
    from basicsr.utils import tensor2img

    net = build_network(options['network_g'])
    net.load_state_dict(torch.load(options['path']['pretrain_network_g'], weights_only=True)['params'])
    figures = []
    with torch.no_grad():
        for pair in build_dataset({**options['datasets']['test'], 'phase': 'test', 'scale': 2}):
            images = [tensor2img([image]) for image in (net(pair['lq'][None]), pair['gt'][None])]
            figures.append(calculate_psnr(*images, crop_border=2, test_y_channel=True))
    return float(sum(figures) / len(figures))


@pytest.mark.parametrize(
    ('method', 'bits', 'least'),
    [('minmax', 8, 37.55), ('percentile', 4, 36.6), ('mse', 4, 37.4)],
)
def test_calibration_keeps_the_quality(
    method: str, bits: int, least: float, assets: Path, option_file: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    options = edsr(assets)
    lq = {'dataroot_lq': str(assets / 'calib/LR_bicubic/X2')}
    calibration = {'num_images': 16, 'dataset': lq}
    options['quant'] = {'method': method, 'w_bits': bits, 'a_bits': bits, 'calibration': calibration}
    found = run('calibrate', options, option_file, tmp_path)
    assert found['datasets']['Set5']['psnr'] > least
    assert found['cost']['fab'] == bits
