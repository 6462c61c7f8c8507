"""The card of a plan, read as people read it."""

from __future__ import annotations

import pytest
from test_trace import build
from torch import nn

from basicsr_quant.network.plan import LayerPlan, Plan
from basicsr_quant.network.planning import LayerRule, PlanRequest, make_plan
from basicsr_quant.network.trace import trace
from basicsr_quant.report.plan_card import plan_card
from basicsr_quant.report.spans import by_pattern, span


def card(net: nn.Module, *, show_all: bool = False, **request: object) -> list[str]:
    found = trace(net)
    rectified = frozenset(layer.name for layer in found.layers if layer.rectified)
    plan = make_plan(net, PlanRequest(**{'method': 'odm', 'w_bits': 4, 'a_bits': 4, **request}), rectified)
    return [' '.join(line.split()) for line in plan_card(found, plan, show_all=show_all).splitlines()]


def test_edsr():
    lines = card(build('EDSR'), layers={'conv_last': LayerRule(8, 8)}, settings={'zero_point': 'integer'})
    assert lines == [
        'method odm, zero_point integer; MACs for an input of 3x32x32',
        '',
        'layer type input MACs W A quantizer why',
        lines[3],
        'conv_first Conv2d 3x32x32 0.09 % fp fp - outside the body (scope: body)',
        'body.0-15.conv1 Conv2d 64x32x32 29.74 % 4 4 odm body',
        'body.0-15.conv2 Conv2d 64x32x32 29.74 % 4 4 odm, input >= 0 body',
        'conv_after_body Conv2d 64x32x32 1.86 % fp fp - outside the body (scope: body)',
        'upsample.0 Conv2d 64x32x32 7.44 % fp fp - outside the body (scope: body)',
        'upsample.2 Conv2d 64x64x64 29.74 % fp fp - outside the body (scope: body)',
        "conv_last Conv2d 64x128x128 1.39 % 8 8 odm layers: 'conv_last'",
        '',
        'quantized: 33 of 37 layers, 60.88 % of the MACs',
        'weights: 6,070,284 -> 1,936,332 bytes (0.319), ranges left out',
        'BitOPs: 0.401 of floating point',
        'FAB: 4.00, by MACs 4.00',
        'not counted: add, div, mul, relu, sub',
        'in floating point:',
        'outside the body (scope: body): conv_first, conv_after_body, upsample.0,2',
    ]


def test_show_all_has_a_row_for_each_layer():
    rows = [line for line in card(build('EDSR'), show_all=True) if ' Conv2d ' in line]
    assert len(rows) == 37
    assert rows[1] == 'body.0.conv1 Conv2d 64x32x32 1.86 % 4 4 odm body'


def test_attention_stands_outside_layers():
    lines = card(build('SwinIR'), scope='all')
    name = 'layers.0.residual_group.blocks.0-1.attn'
    assert f'{name} WindowAttention 64x60 9.29 % fp fp - matrix products outside layers' in lines
    assert lines[-2:] == ['in floating point:', f'matrix products outside layers: {name}']


def test_weights_only_and_layers_that_never_run():
    class Net(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
            self.idle = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self[1](self[0](self[0](x)))

    layers = [LayerPlan(name, 'Conv2d', 8, 32, 'body') for name in '01']
    plan = Plan('minmax', (*layers, LayerPlan('idle', 'Conv2d', why='?')))
    lines = [' '.join(line.split()) for line in plan_card(trace(Net()), plan).splitlines()]
    assert '0 Conv2d 3x32x32, 2 times 66.67 % 8 fp minmax body' in lines
    assert '1 Conv2d 3x32x32 33.33 % 8 fp minmax body' in lines
    assert 'idle Conv2d never runs - fp fp - ?' in lines
    assert 'quantized: 2 of 3 layers, 100.00 % of the MACs' in lines
    assert 'inputs (body): 0-1' in lines
    assert not [line for line in lines if line.startswith('FAB')]


def test_nothing_quantized():
    lines = card(build('EDSR'), method='none')
    assert 'quantized: 0 of 37 layers, 0.00 % of the MACs' in lines
    assert 'weights: 6,070,284 -> 6,070,284 bytes (1.000), ranges left out' in lines
    assert lines[-1].startswith('method: none: conv_first, body.0-15.conv1')


@pytest.mark.parametrize(
    ('names', 'spans'),
    [
        (['a'], ['a']),
        (['a.0', 'a.1', 'a.2'], ['a.0-2']),
        (['a.8', 'a.9', 'a.10', 'a.12'], ['a.8-10,12']),
        (['a.0.b', 'a.0.c', 'a.1.b', 'a.1.c'], ['a.0-1.b', 'a.0-1.c']),
        (['a.0.0', 'a.0.1', 'a.1.0', 'a.1.1'], ['a.0-1.0-1']),
        (['a.0.0', 'a.0.1', 'a.1.0'], ['a.0.0-1', 'a.1.0']),
        (['a.0.0', 'a.1.1'], ['a.0.0', 'a.1.1']),
        (['0', '1'], ['0-1']),
        (['a.0', 'b.0'], ['a.0', 'b.0']),
        (['B1.0.w', 'B1.1.w', 'B2.0.w', 'B2.1.w'], ['B1-2.0-1.w']),
        (['a.conv1', 'a.conv2'], ['a.conv1', 'a.conv2']),
        (['a1.c', 'b2.c'], ['a1.c', 'b2.c']),
        (['1.c', 'b2.c'], ['1.c', 'b2.c']),
    ],
)
def test_spans_say_neither_more_nor_less(names, spans):
    groups = by_pattern(names)
    assert [span(group) for group in groups] == spans
    assert sorted(name for group in groups for name in group) == sorted(names)
