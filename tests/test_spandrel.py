"""Architectures of spandrel as ``network_g``: one file in, the same network out, quantized by the same block."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from basicsr_quant import compat
from basicsr_quant.errors import QuantError

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')


@pytest.fixture(autouse=True)
def host() -> Any:
    compat.apply()
    return pytest.importorskip('spandrel')


def network(kind: str) -> nn.Module:
    """A small network of spandrel's own classes."""
    from spandrel import architectures as a

    torch.manual_seed(0)
    if kind == 'Compact':
        return a.Compact.Compact(num_feat=8, num_conv=2, upscale=2)
    if kind == 'ESRGAN':
        return a.ESRGAN.ESRGAN(num_filters=8, num_blocks=1, scale=4)
    if kind == 'SPAN':
        return a.SPAN.SPAN(num_in_ch=3, num_out_ch=3, feature_channels=8, upscale=2)
    if kind == 'HAT':
        return a.HAT.HAT(img_size=16, window_size=8, embed_dim=12, depths=(2,), num_heads=(2,), mlp_ratio=2, upscale=2,
                         upsampler='pixelshuffle', compress_ratio=3, squeeze_factor=4, num_feat=8)  # fmt: skip
    if kind == 'DAT':
        return a.DAT.DAT(img_size=16, embed_dim=32, split_size=[8, 8], depth=[2], num_heads=[2], expansion_factor=2,
                         upscale=2, upsampler='pixelshuffle')  # fmt: skip
    assert kind == 'OmniSR'
    return a.OmniSR.OmniSR(num_feat=16, up_scale=2, res_num=1, block_num=1, window_size=8)


KINDS = ['Compact', 'ESRGAN', 'SPAN', 'HAT', 'DAT', 'OmniSR']


def saved(kind: str, folder: Path) -> str:
    path = folder / f'{kind}.pth'
    torch.save({'params_ema': network(kind).state_dict()}, path)
    return str(path)


@pytest.mark.parametrize('kind', KINDS)
def test_what_spandrel_computes_to_the_bit_and_quantized(kind: str, tmp_path: Path, host: Any) -> None:
    from basicsr_quant.config import read_config
    from basicsr_quant.methods import method_of, quantize
    from basicsr_quant.models.checkpoint import load_state, read_network_file
    from basicsr_quant.models.preparation import build_float
    from basicsr_quant.network.surgery import floating_point, quant_layers
    from basicsr_quant.network.trace import trace

    path = saved(kind, tmp_path)
    net = build_float({'type': 'Spandrel', 'path': path}).eval()
    fresh = copy.deepcopy(net)
    for tensor in fresh.state_dict().values():
        tensor.zero_()
    assert load_state(fresh, read_network_file(path), 'params_ema') == "spandrel's architectures"
    assert all(torch.equal(v, fresh.state_dict()[k]) for k, v in net.state_dict().items())
    x = torch.rand(1, 3, 18, 20)
    wanted = host.ModelLoader().load_from_file(path)(x.clone())
    with torch.no_grad():
        assert torch.equal(net(x).clamp(0, 1), wanted)
    names = list(net.state_dict())
    with torch.no_grad():
        plain = net(x)
    plan = read_config({'method': 'minmax', 'w_bits': 8, 'a_bits': 8, 'scope': 'all'}).plan(net, trace(net))
    quantize(net, plan)
    method_of(plan).calibrate(net, [x])
    assert [k for k in net.state_dict() if 'quantizer' not in k] == names
    assert len(quant_layers(net)) == len(plan.quantized) > 2
    with torch.no_grad():
        assert net(x).isfinite().all() and not torch.equal(net(x), plain)
        assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))  # noqa: S301
        with floating_point(net):
            assert torch.equal(net(x), plain)


@pytest.mark.slow
def test_calibrate_and_test_under_the_command(
    tmp_path: Path, options: Any, option_file: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from basicsr_quant.cli import main

    monkeypatch.chdir(tmp_path)
    path = saved('SPAN', tmp_path)
    del options['datasets']['train']
    options['network_g'] = {'type': 'Spandrel', 'path': path}
    options['path'] = {'pretrain_network_g': path, 'param_key_g': 'params_ema'}
    shutil.copytree(options['datasets']['val']['dataroot_lq'], tmp_path / 'others')
    lq = {'type': 'SingleImageDataset', 'dataroot_lq': str(tmp_path / 'others'), 'io_backend': {'type': 'disk'}}
    options['quant'] = {'method': 'minmax', 'calibration': {'num_images': 2, 'dataset': lq}}
    figures = []
    for command in ('calibrate', 'test'):
        assert main([command, '-opt', option_file(options)]) == 0
        figures.append(json.loads((tmp_path / 'results/tiny/metrics.json').read_text())['datasets']['Val']['psnr'])
    assert figures[0] == figures[1] > 0
    assert main(['plan', '-opt', option_file(options)]) == 0


@pytest.mark.parametrize(('content', 'words'), [
    ({'params': {'x.weight': torch.ones(2)}}, 'holds a network that spandrel does not know'),
    ('IPT', 'not a plain function from image to image'),
])  # fmt: skip
def test_refused(content: Any, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from basicsr_quant.archs import spandrel_arch
    from basicsr_quant.models.preparation import build_float

    path = str(tmp_path / 'net.pth')
    if content == 'IPT':  # its smallest network is large: any other stands in
        content = {'params': network('SPAN').state_dict()}
        monkeypatch.setattr(spandrel_arch, '_OWN_CALL', ('SPAN',))
    torch.save(content, path)
    with pytest.raises(QuantError, match=words):
        build_float({'type': 'Spandrel', 'path': path})


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from basicsr_quant.models.preparation import build_float

    monkeypatch.setitem(sys.modules, 'spandrel', None)
    torch.save({'params': {'x': torch.ones(1)}}, tmp_path / 'net.pth')
    with pytest.raises(QuantError, match='pip install spandrel'):
        build_float({'type': 'Spandrel', 'path': str(tmp_path / 'net.pth')})
