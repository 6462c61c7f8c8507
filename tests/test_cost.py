"""Costs against closed forms: EDSR's are known, the others are small enough to be summed by hand."""

from __future__ import annotations

import json

import pytest
import torch
from test_trace import MACS, build
from torch import nn

from basicsr_quant.cost import cost, trace_at
from basicsr_quant.methods import quantize, settings_of
from basicsr_quant.network.plan import LayerPlan, Plan

HD = 1280 * 720
BODY_MACS, EDSR_MACS = 32 * 64 * 64 * 9, 1_983_168


def body_plan(w_bits: int, a_bits: int, method: str = 'minmax') -> Plan:
    layers = [LayerPlan(f'body.{i}.conv{j}', 'Conv2d', w_bits, a_bits, 'body') for i in range(16) for j in (1, 2)]
    return Plan(method, tuple(layers), settings_of(method))


@pytest.fixture(scope='module')
def edsr() -> nn.Module:
    return build('EDSR')


# ---------------------------------------------------------------------------------------------------- EDSR baseline x4


def test_edsr_in_floating_point(edsr):
    found = cost(edsr, None, scale=4)
    assert found.macs == EDSR_MACS * HD // 16 == 114_230_476_800
    assert found.bitops == found.float_bitops == found.macs * 1024
    assert found.weight_bytes == found.float_weight_bytes == 1_517_571 * 4
    assert (found.fab, found.fab_mac, found.range_bytes) == (None, None, 0)
    assert (found.input_size, found.output_size, found.notes) == ((320, 180), (1280, 720), ())
    assert found.not_counted == ('add', 'div', 'mul', 'relu', 'sub')
    body = sum(row.macs for row in found.layers if row.layer.startswith('body.'))
    assert round(100 * body / found.macs, 2) == 59.48


@pytest.mark.parametrize(('w_bits', 'a_bits'), [(8, 8), (4, 4), (3, 5), (2, 2), (4, 32), (32, 4)])
def test_edsr_body_in_closed_form(edsr, w_bits, a_bits):
    found = cost(edsr, body_plan(w_bits, a_bits), scale=4)
    per_pixel = BODY_MACS * w_bits * a_bits + (EDSR_MACS - BODY_MACS) * 1024
    assert found.bitops == per_pixel * HD // 16
    assert found.weight_bytes == (1_517_571 - BODY_MACS) * 4 + BODY_MACS * w_bits // 8
    assert found.fab == found.fab_mac == (None if a_bits == 32 else a_bits)


def test_edsr_w8_has_the_published_size(edsr):
    found = cost(edsr, body_plan(8, 8), scale=4)
    assert found.weight_bytes / 4 / 1000 == pytest.approx(632.8, abs=0.05)  # published: 631K
    assert found.bitops / found.float_bitops == pytest.approx(0.442, abs=5e-4)


@pytest.mark.parametrize('method', ['minmax', 'pams', 'lsq', 'odm'])
def test_a_quantized_network_costs_what_its_plan_said(edsr, method):
    planned = body_plan(4, 4, method)
    before = cost(edsr, planned, scale=4)
    after = cost(quantize(build('EDSR'), planned), planned, scale=4)
    for figure in ('macs', 'bitops', 'fab', 'fab_mac', 'not_counted', 'notes', 'float_weight_bytes'):
        assert getattr(after, figure) == getattr(before, figure)
    assert after.weight_bytes == before.weight_bytes + after.range_bytes
    assert 0 < after.range_bytes < 32 * 64  # some numbers for each of 32 layers


def test_measured_bits_stand_in_for_the_plan(edsr):
    measured = {'body.0.conv1': (4, 6.5), 'body.0.conv2': (4, 5.5)}
    found = cost(edsr, body_plan(4, 4), scale=4, bits=measured)
    assert found.fab == found.fab_mac == (30 * 4 + 6.5 + 5.5) / 32
    assert found.bitops == cost(edsr, body_plan(4, 4), scale=4).bitops + 4 * 4 * BODY_MACS // 32 * HD // 16
    with pytest.raises(ValueError, match='does not run: body'):
        cost(edsr, body_plan(4, 4), scale=4, bits={'body': (4, 4)})


# --------------------------------------------------------------------------------------------------------- definitions


def two_layers() -> nn.Sequential:
    """Layers of 27 and 243 multiply-accumulates per pixel; 9 x 9 + 9 and 3 x 27 + 3 numbers."""
    return nn.Sequential(nn.Conv2d(3, 9, 1), nn.Conv2d(9, 3, 3, padding=1))


@pytest.mark.parametrize(
    ('layers', 'fab', 'fab_mac'),
    [
        pytest.param({'_0': (4, 4, 'body'), '_1': (4, 2, 'body')}, 3, (27 * 4 + 243 * 2) / 270, id='weighted by MACs'),
        pytest.param({'_0': (8, 8, 'first layer'), '_1': (4, 2, 'body')}, 2, 2, id='8-bit ends are left out'),
        pytest.param({'_0': (8, 8, "layers: '0'"), '_1': (4, 2, 'body')}, 2, 2, id='also when the user set them'),
        pytest.param({'_0': (4, 4, "layers: '0'"), '_1': (4, 2, 'body')}, 3, 2.2, id='other ends count'),
        pytest.param({'_0': (4, 32, 'body'), '_1': (4, 2, 'body')}, 2, 2, id='floating point is left out'),
        pytest.param({'_0': (8, 8, 'first layer'), '_1': (8, 8, 'last layer')}, None, None, id='nothing left'),
    ],
)
def test_fab(layers, fab, fab_mac):
    layers = Plan('minmax', tuple(LayerPlan(n[1:], 'Conv2d', w, a, why) for n, (w, a, why) in layers.items()))
    found = cost(two_layers(), layers, scale=1)
    assert (found.fab, found.fab_mac) == (fab, None if fab_mac is None else pytest.approx(fab_mac))


def test_bytes_are_rounded_up_for_each_tensor():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 5, 1).half())
    sized = trace_at(nn.Sequential(net[0]), scale=1)
    assert sized.trace.parameter_bytes == 4 * 12
    odd = Plan('minmax', (LayerPlan('0', 'Conv2d', 3, 4, 'body'),))
    found = cost(nn.Sequential(net[0]), odd, scale=1)
    assert found.weight_bytes == 4 + 12  # 9 weights of 3 bits are 27 bits: 4 bytes; the bias stays
    assert [row.weight_bytes for row in found.layers] == [4]


def test_matrix_products_count_as_floating_point_unless_planned():
    found = cost(build('SwinIR'), None, scale=4)
    attention = [row for row in found.layers if row.type == 'WindowAttention']
    assert len(attention) == 2 and all(row.bitops == row.macs * 1024 for row in attention)
    planned = Plan('minmax', (LayerPlan(attention[0].layer, 'WindowAttention', 8, 4, 'body'),))
    assert cost(build('SwinIR'), planned, scale=4).bitops == found.bitops - attention[0].macs * (1024 - 32)


def test_to_plain_is_the_contract():
    plain = json.loads(json.dumps(cost(two_layers(), None, scale=1, output_size=(64, 32)).to_plain(), allow_nan=False))
    assert {'macs', 'bitops', 'weight_bytes', 'output_size', 'formula', 'not_counted'} <= set(plain)
    assert plain['output_size'] == plain['input_size'] == [64, 32]
    assert plain['macs'] == 64 * 32 * 270
    assert '64x32' in plain['formula']
    assert plain['layers'][1] == {
        'layer': '1', 'type': 'Conv2d', 'macs': 64 * 32 * 243, 'w_bits': 32, 'a_bits': 32,
        'bitops': 64 * 32 * 243 * 1024, 'weight_bytes': 4 * 243, 'density': 1.0, 'masked_weight_bytes': None,
    }  # fmt: skip


# -------------------------------------------------------------------------------------------------------------- sizing


class ReadsValues(nn.Module):
    """Runs on no meta device."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 12, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pixel_shuffle(self.layer(x) * float(x.mean()), 2)


class Upsampled(nn.Module):
    """A network of an image that is enlarged before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


@pytest.mark.parametrize(
    ('make', 'scale', 'output_size', 'input_size', 'pixels', 'notes'),
    [
        pytest.param(lambda: build('EDSR'), 4, (1280, 720), (320, 180), 57600, (), id='720p'),
        pytest.param(
            lambda: build('EDSR'), 4, (101, 50), (26, 13), 338,
            ('101x50 is no multiple of the scale: counted for an input of 26x13',), id='odd size',
        ),
        pytest.param(
            lambda: build('SwinIR'), 4, (1280, 720), (320, 184), 320 * 184,
            ('the input is padded from 320x180 to 320x184',), id='windows',
        ),
        pytest.param(
            ReadsValues, 2, (1280, 720), (640, 360), 640 * 360,
            ('counted on an input of 32x32 and multiplied by the ratio of the areas',), id='no meta device',
        ),
        pytest.param(
            Upsampled, 4, (1280, 720), (1280, 720), HD,
            ("the network enlarges by 1x1, the option file's scale is 4",), id='enlarged before',
        ),
    ],
)  # fmt: skip
def test_size_of_the_input(make, scale, output_size, input_size, pixels, notes):
    net = make()
    found = cost(net, None, scale=scale, output_size=output_size)
    assert (found.input_size, found.output_size, found.notes) == (input_size, output_size, notes)
    per_pixel = {'EDSR': EDSR_MACS, 'SwinIR': MACS['SwinIR'], 'ReadsValues': 324, 'Upsampled': 81}[type(net).__name__]
    assert found.macs == per_pixel * pixels


def test_networks_of_no_images_are_counted_as_they_are():
    found = cost(nn.Linear(6, 5), None, scale=4)
    assert (found.macs, found.input_size) == (30, None)
    assert found.notes == ('counted for one input of shape 1x6: input and output are no images',)


def test_the_network_is_left_alone(edsr):
    state = {name: tensor.clone() for name, tensor in edsr.state_dict().items()}
    cost(edsr.train(), body_plan(4, 4), scale=4)
    assert edsr.training and all(m.training for m in edsr.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in edsr.state_dict().items())
    assert edsr.mean.device.type == 'cpu'
