"""Every generator of MMagic that this package names, through planning, calibration and a training step."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip('mmagic.utils', reason='MMagic is not installed (make env-mmagic)')

from mmagic.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn

import basicsr_quant.mmagic  # noqa: F401
from basicsr_quant.methods import calibrate
from basicsr_quant.mmagic import QuantizedOptimWrapperConstructor
from basicsr_quant.mmagic.generator import run_of
from basicsr_quant.network.surgery import floating_point, quant_state, quantizers

register_all_modules()
DefaultScope.get_instance('generators', scope_name='mmagic')

RGB = {'in_channels': 3, 'out_channels': 3}
LEVELS = {'mid_channels': 4, 'enc_blk_nums': [1, 1], 'middle_blk_num': 1, 'dec_blk_nums': [1, 1]}
# generator -> options, what it enlarges by, layers in all, layers that the body holds
GENERATORS: dict[str, tuple[dict[str, Any], int, int, int]] = {
    'EDSRNet': ({**RGB, 'mid_channels': 4, 'num_blocks': 2, 'upscale_factor': 2}, 2, 8, 4),
    'MSRResNet': ({**RGB, 'mid_channels': 4, 'num_blocks': 2, 'upscale_factor': 4}, 4, 9, 4),
    'RDNNet': ({**RGB, 'mid_channels': 4, 'num_blocks': 2, 'num_layers': 2, 'channel_growth': 4, 'upscale_factor': 2},
               2, 12, 6),
    'SwinIRNet': ({'upscale': 2, 'in_chans': 3, 'img_size': 16, 'window_size': 8, 'depths': [2], 'embed_dim': 12,
                   'num_heads': [2], 'mlp_ratio': 2, 'upsampler': 'pixelshuffle'}, 2, 14, 9),
    'RRDBNet': ({**RGB, 'mid_channels': 4, 'num_blocks': 1, 'growth_channels': 4, 'upscale_factor': 2}, 2, 21, 15),
    'SRCNNNet': ({'channels': (3, 8, 4, 3), 'upscale_factor': 2}, 2, 3, 1),
    'NAFNet': ({'img_channels': 3, **LEVELS}, 1, 36, 30),
    'NAFBaseline': ({'img_channel': 3, **LEVELS}, 1, 41, 35),
    'Restormer': ({'dim': 8, 'num_blocks': [1, 1, 1, 2], 'num_refinement_blocks': 1, 'heads': [1, 1, 2, 2]}, 1, 64, 54),
}  # fmt: skip


@pytest.mark.parametrize('kind', GENERATORS)
def test_plan_calibration_and_a_training_step(kind):
    options, scale, layers, body = GENERATORS[kind]
    torch.manual_seed(0)
    fp32 = MODELS.build({'type': kind, **options})
    with torch.no_grad():
        for parameter in fp32.parameters():  # some begin at zero, and what stands before them gets no gradient
            parameter.add_(0.1 * torch.randn_like(parameter))
    quant = {'method': 'odm', 'w_bits': 4, 'a_bits': 4}
    net: nn.Module = MODELS.build(
        {'type': 'QuantizedNetwork', 'generator': {'type': kind, **options}, 'quant': quant}
    )
    run = run_of(net)
    assert type(net) is type(fp32) and run.scale == scale
    assert (len(run.plan), len(run.plan.quantized)) == (layers, body)
    ours = tuple(f'{name}.' for name in quant_state(net))
    assert {name for name in net.state_dict() if not name.startswith(ours)} == set(fp32.state_dict())

    net.load_state_dict(fp32.state_dict(), strict=False)
    image = torch.rand(1, 3, 16, 16)
    with torch.no_grad(), floating_point(net):
        torch.testing.assert_close(net.eval()(image), fp32.eval()(image))
    run.has_ranges = True
    calibrate(net, run.plan, [image])
    assert all(bool(q.calibrated) for q in quantizers(net).values())

    wrapper = QuantizedOptimWrapperConstructor(
        {'type': 'OptimWrapper', 'optimizer': Config({'type': 'Adam', 'lr': 1e-3})._cfg_dict}
    )(net)
    training = run.method.attach(net, wrapper.optimizer, 1.0)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    output = net.train()(image)
    assert output.shape == (1, 3, 16 * scale, 16 * scale)
    wrapper.update_params((output - 0.5).abs().mean())
    moved = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert any(name.startswith(ours) for name in moved) and any(not name.startswith(ours) for name in moved)
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    assert -1 <= training.log()['cosine'] <= 1
