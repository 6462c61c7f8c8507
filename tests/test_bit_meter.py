"""Bits as measured: FAB of an image, of patches, of static methods, and what BitOPs make of them."""

from __future__ import annotations

import pytest
import torch
from helpers import BODY, images, plan_of, quantized, tiny
from torch import nn

from basicsr_quant.cost import BitMeter, cost_of, trace_at
from basicsr_quant.methods import quantize
from basicsr_quant.network.patches import Patchwise
from basicsr_quant.network.planning import LayerRule


class Uneven(nn.Module):
    """Body layers of different cost: 4 -> 4, 4 -> 8 and 8 -> 4 channels."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(3, 4), (4, 4), (4, 8), (8, 4), (4, 3)]
        self.layers = nn.Sequential(*(nn.Conv2d(i, o, 3, padding=1) for i, o in sizes))

    def forward(self, x):
        return self.layers(x)


def metered(net: nn.Module, **settings):
    plan = plan_of(net, settings.pop('method', 'adabm'), **settings)
    sized = trace_at(net, scale=1, output_size=(32, 32))
    quantize(net, plan)
    return net, plan, sized, BitMeter(net, plan, sized)


def factors(net: nn.Module, values) -> None:
    for name, value in values.items():
        net.get_submodule(name).input_quantizer.layer_factor.data.fill_(value)


@torch.no_grad()
def test_fab_is_plain_and_fab_mac_weighted():
    net, plan, sized, meter = metered(Uneven())
    body = ['layers.1', 'layers.2', 'layers.3']
    factors(net, dict(zip(body, (1.0, 0.0, -1.0))))
    net(images(1))
    found = meter.image()
    assert found.layers == {'layers.1': 5.0, 'layers.2': 4.0, 'layers.3': 3.0}
    assert found.fab == 4.0 and found.fab_mac == pytest.approx((5 * 16 + 4 * 32 + 3 * 32) / 80)
    cost = cost_of(sized, plan, meter.mean_bits())
    assert cost.fab == 4.0 and cost.fab_mac == pytest.approx(found.fab_mac)
    macs = {row.layer: row.macs for row in cost.layers}
    ends = sum(macs[f'layers.{i}'] * 32 * 32 for i in (0, 4))
    assert cost.bitops == ends + 4 * sum(macs[n] * b for n, b in zip(body, (5, 4, 3)))


@torch.no_grad()
def test_an_image_in_patches_has_the_mean_of_its_patches():
    net, plan, sized, meter = metered(tiny())
    net.get_submodule('quant_measures.image_bits').set_thresholds(torch.tensor(1.0), torch.tensor(1e4))
    image = images(1, 16)
    image[..., :8] = 0.5  # the left patches are flat
    Patchwise(net, 8, 8)(image)
    assert meter.image().fab == 3.5
    net(images(1, 8))
    assert meter.image().fab == 4.0
    assert {bits for _, bits in meter.mean_bits().values()} == {3.75}
    assert cost_of(sized, plan, meter.mean_bits()).fab == 3.75


@torch.no_grad()
@pytest.mark.parametrize(
    ('settings', 'fab'),
    [({'method': 'minmax'}, 4.0), ({'method': 'minmax', 'scope': 'all'}, 4.0),
     ({'method': 'minmax', 'layers': {'body.0.conv1': LayerRule(4, 8)}}, 5.0),
     ({'method': 'none'}, None), ({'method': 'adabm', 'scope': 'all'}, 4.0)],
    ids=['body', 'all', 'a rule', 'none', 'adabm all'],
)  # fmt: skip
def test_static_methods_have_the_plans_bits(settings, fab):
    net, plan, sized, meter = metered(tiny(), **settings)
    net(images(1))
    found = meter.image()
    assert (found.fab, found.fab_mac) == (fab, fab)
    cost = cost_of(sized, plan, meter.mean_bits())
    assert (cost.fab, cost.fab_mac) == (fab, fab) and cost == cost_of(sized, plan)


@torch.no_grad()
def test_mixed_precision_of_daq_is_measured():
    net, _, _, meter = metered(tiny(), method='daq', options={'mixed_precision': True})
    net(images(1, 16))
    found = meter.image()
    assert set(found.layers) == set(BODY) and 1.0 <= found.fab <= 4.0 and found.fab == pytest.approx(found.fab_mac)


def test_a_closed_meter_sees_nothing():
    net = quantized('adabm')
    meter = BitMeter(net, plan_of(tiny(), 'adabm'), trace_at(tiny(), scale=1, output_size=(8, 8)))
    meter.close()
    net(images(1))
    assert meter.image().layers == {}
