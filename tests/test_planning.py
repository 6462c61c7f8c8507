"""What is quantized and why: host networks as a table, globs, odd networks."""

from __future__ import annotations

import json
from collections import Counter
from fnmatch import fnmatchcase

import pytest
import torch
from helpers import BODY, tiny
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from basicsr_quant import compat
from basicsr_quant.config import read_config
from basicsr_quant.errors import QuantError
from basicsr_quant.network.plan import FLOAT_BITS, Plan
from basicsr_quant.network.planning import LayerRule, PlanRequest, make_plan
from basicsr_quant.network.scope import body_layers, weight_layers
from basicsr_quant.network.trace import trace

FP, W2 = LayerRule(FLOAT_BITS, FLOAT_BITS), LayerRule(2, 2)


def request(w_bits=4, a_bits=3, method='odm', **kwargs):
    return PlanRequest(method, w_bits, a_bits, **kwargs)


def bits(plan):
    return {layer.layer: (layer.w_bits, layer.a_bits) for layer in plan}


# -------------------------------------------------------------------------------------------------- the host's networks

EDSR = {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 3, 'upscale': 4}
SWIN = {'img_size': 16, 'embed_dim': 12, 'depths': [2, 2], 'num_heads': [2, 2], 'window_size': 8, 'mlp_ratio': 2}

# Type, options, layers, of them in the body, some in, all out (or the first), last layer.
NETWORKS = [
    pytest.param(
        'EDSR', EDSR, 11, 6,
        ['body.0.conv1', 'body.2.conv2'],
        ['conv_first', 'conv_after_body', 'upsample.0', 'upsample.2', 'conv_last'],
        'conv_last', id='EDSR',
    ),
    pytest.param(
        'EDSR', {**EDSR, 'num_block': 1}, 7, 2,
        ['body.0.conv1', 'body.0.conv2'],
        ['conv_first', 'conv_after_body', 'upsample.0', 'upsample.2', 'conv_last'],
        'conv_last', id='EDSR of one block',
    ),
    pytest.param(
        'MSRResNet', EDSR, 11, 6,
        ['body.0.conv1', 'body.2.conv2'],
        ['conv_first', 'upconv1', 'upconv2', 'conv_hr', 'conv_last'],
        'conv_last', id='MSRResNet',
    ),
    pytest.param(
        'RCAN',
        {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_group': 2, 'num_block': 3, 'squeeze_factor': 2}, 31, 26,
        ['body.0.residual_group.0.rcab.0', 'body.0.residual_group.2.rcab.3.attention.1', 'body.1.conv'],
        ['conv_first', 'conv_after_body', 'upsample.0', 'upsample.2', 'conv_last'],
        'conv_last', id='RCAN',
    ),
    pytest.param(
        'RRDBNet', {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_block': 2, 'num_grow_ch': 4}, 36, 30,
        ['body.0.rdb1.conv1', 'body.1.rdb3.conv5'],
        ['conv_first', 'conv_body', 'conv_up1', 'conv_up2', 'conv_hr', 'conv_last'],
        'conv_last', id='RRDBNet',
    ),
    pytest.param(
        'SRVGGNetCompact', {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 8, 'num_conv': 4, 'upscale': 4}, 6, 4,
        ['body.2', 'body.8'], ['body.0', 'body.10'],
        'body.10', id='SRVGGNetCompact',
    ),
    pytest.param(
        'SwinIR', {**SWIN, 'upscale': 2, 'upsampler': 'pixelshuffledirect'}, 21, 18,
        ['layers.0.residual_group.blocks.0.attn.qkv', 'layers.1.residual_group.blocks.1.mlp.fc2', 'layers.1.conv'],
        ['conv_first', 'conv_after_body', 'upsample.0'],
        'upsample.0', id='SwinIR, light',
    ),
    pytest.param(
        'SwinIR', {**SWIN, 'upscale': 4, 'upsampler': 'nearest+conv', 'resi_connection': '3conv'}, 31, 22,
        ['layers.0.residual_group.blocks.0.attn.proj', 'layers.1.conv.4'],
        ['conv_first', 'conv_after_body.0', 'conv_after_body.2', 'conv_after_body.4', 'conv_before_upsample.0',
         'conv_up1', 'conv_up2', 'conv_hr', 'conv_last'],
        'conv_last', id='SwinIR, real-world',
    ),
]  # fmt: skip


@pytest.fixture
def build():
    if not compat.has_host():
        pytest.skip('BasicSR is not installed')
    compat.apply()
    from basicsr.archs import build_network

    return lambda kind, options: build_network({'type': kind, **options})


@pytest.mark.parametrize(('kind', 'options', 'layers', 'body', 'inside', 'outside', 'last'), NETWORKS)
def test_body_of_host_networks(build, kind, options, layers, body, inside, outside, last):
    net = build(kind, options)
    names = list(weight_layers(net))
    plan = make_plan(net, request())
    assert [layer.layer for layer in plan] == names and names[-1] == last
    assert len(names) == layers
    assert len(plan.quantized) == body == len(body_layers(net))
    assert [n for n, b in bits(plan).items() if b == (32, 32)] == outside
    assert all(bits(plan)[name] == (4, 3) for name in inside)
    assert {layer.why for layer in plan} == {'body', 'outside the body (scope: body)'}


@pytest.mark.parametrize(('kind', 'options', 'layers', 'body', 'inside', 'outside', 'last'), NETWORKS)
def test_scope_all_ends_at_eight_bits(build, kind, options, layers, body, inside, outside, last):
    plan = make_plan(build(kind, options), request(scope='all'))
    counted = Counter(bits(plan).values())
    assert counted == {(8, 8): 2, (4, 3): len(plan) - 2}
    first, *_, final = plan
    assert (first.w_bits, first.why, final.layer, final.why) == (8, 'first layer', last, 'last layer')


@pytest.mark.parametrize(
    ('kind', 'options', 'rectified'),
    [
        ('EDSR', EDSR, [f'body.{i}.conv2' for i in range(3)]),
        ('SRVGGNetCompact', {'num_feat': 8, 'num_conv': 3, 'act_type': 'relu'}, ['body.2', 'body.4', 'body.6']),
        ('SRVGGNetCompact', {'num_feat': 8, 'num_conv': 3, 'act_type': 'prelu'}, []),
    ],
)
def test_rectified_inputs_reach_the_plan(build, kind, options, rectified):
    net = build(kind, options)
    plan = read_config({'method': 'lsq', 'w_bits': 4, 'a_bits': 4}).plan(net, trace(net))
    assert [layer.layer for layer in plan.quantized if layer.rectified] == rectified


def test_a_layer_whose_forward_is_never_called_stays_in_floating_point(build):
    """ECBSR merges the weights of its branches and convolves with the result: a replaced layer would do nothing."""
    net = build('ECBSR', {'num_in_ch': 1, 'num_out_ch': 1, 'num_block': 2, 'num_channel': 8, 'with_idt': False,
                          'act_type': 'prelu', 'scale': 2})  # fmt: skip
    plan = make_plan(net, request(scope='all'), unused=frozenset(trace(net).unused))
    assert not plan.quantized and {layer.why for layer in plan} == {
        'cannot be quantized: the network never calls it, or only reads its weight'
    }
    with pytest.raises(QuantError, match='nothing is left to quantize'):
        read_config({'method': 'odm'}).plan(net, trace(net))


# ---------------------------------------------------------------------------------------------------------------- globs

BOTH = [(4, 3)] * 4


@pytest.mark.parametrize(
    ('scope', 'layers', 'first', 'body', 'last'),
    [
        ('body', {}, (32, 32), BOTH, (32, 32)),
        ('all', {}, (8, 8), BOTH, (8, 8)),
        ('body', {'first': LayerRule(8, 8)}, (8, 8), BOTH, (32, 32)),
        ('all', {'first': FP}, (32, 32), BOTH, (8, 8)),
        ('all', {'last': LayerRule()}, (8, 8), BOTH, (4, 3)),
        ('body', {'*conv2': FP}, (32, 32), [(4, 3), (32, 32)] * 2, (32, 32)),
        ('body', {'*conv2': LayerRule(w_bits=8)}, (32, 32), [(4, 3), (8, 3)] * 2, (32, 32)),
        ('body', {'*conv2': LayerRule(a_bits=8)}, (32, 32), [(4, 3), (4, 8)] * 2, (32, 32)),
        ('body', {'body.0.*': W2, 'body.*': LayerRule(8, 8)}, (32, 32), [(2, 2)] * 2 + [(8, 8)] * 2, (32, 32)),
        ('body', {'body.*': LayerRule(8, 8), 'body.0.*': W2}, (32, 32), [(8, 8)] * 4, (32, 32)),
        ('body', {'body.[1].conv?': W2}, (32, 32), [(4, 3)] * 2 + [(2, 2)] * 2, (32, 32)),
        ('all', {'*': W2}, (2, 2), [(2, 2)] * 4, (2, 2)),
    ],
)
def test_first_matching_glob_wins_over_scope(scope, layers, first, body, last):
    plan = make_plan(tiny(), request(scope=scope, layers=layers))
    assert list(bits(plan).values()) == [first, *body, last]
    for layer in plan:
        match = next((glob for glob in layers if fnmatchcase(layer.layer, glob)), None)
        assert (layer.why == f"layers: '{match}'") == (match is not None)


@pytest.mark.parametrize('scope', ['body', 'all'])
@pytest.mark.parametrize(('w_bits', 'a_bits'), [(2, 2), (8, 8), (32, 4), (4, 32), (32, 32)])
def test_base_bits(scope, w_bits, a_bits):
    plan = make_plan(tiny(), request(w_bits, a_bits, scope=scope))
    found = bits(plan)
    assert all(found[name] == (w_bits, a_bits) for name in BODY)
    ends = tuple(8 if b < 32 else 32 for b in (w_bits, a_bits)) if scope == 'all' else (32, 32)
    assert found['first'] == found['last'] == ends


@pytest.mark.parametrize('order', [['bodi.*'], ['body.*', 'nothing'], ['conv1'], ['BODY.*'], ['body']])
def test_a_glob_that_matches_nothing_is_refused(order):
    with pytest.raises(QuantError) as raised:
        make_plan(tiny(), request(layers=dict.fromkeys(order, FP)))
    message = str(raised.value)
    assert f"quant.layers: '{order[-1]}' matches no layer" in message
    assert '6 layers: first, body.0.conv1, body.0.conv2, body.1.conv1, ..., last' in message
    assert '\n' not in message


def test_a_glob_on_a_network_without_layers_is_refused():
    with pytest.raises(QuantError, match=r"'x' matches no layer.*0 layers"):
        make_plan(nn.Sequential(nn.ReLU()), request(layers={'x': FP}))


def test_method_none_leaves_everything():
    plan = make_plan(tiny(), request(method='none', layers={'body.*': LayerRule(2, 2)}, scope='all'))
    assert not plan.quantized and {layer.why for layer in plan} == {'method: none'}


# --------------------------------------------------------------------------------------------------------- odd networks


class MyConv(nn.Conv2d):
    """A subclass, whose forward may be its own."""


class Odd(nn.Module):
    def __init__(self, middle: nn.Module):
        super().__init__()
        self.first, self.middle, self.last = nn.Conv2d(3, 4, 1), middle, nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.last(self.middle(self.first(x)))


@pytest.mark.parametrize(
    ('middle', 'wanted'),
    [
        pytest.param(nn.Conv2d(4, 4, 3, groups=2), 'body', id='grouped'),
        pytest.param(nn.Conv2d(4, 4, 3, groups=4), 'body', id='depthwise'),
        pytest.param(MyConv(4, 4, 3), 'a MyConv may have a forward of its own', id='subclass'),
        pytest.param(weight_norm(MyConv(4, 4, 3)), 'a ParametrizedMyConv may have', id='parametrized subclass'),
        pytest.param(weight_norm(nn.Conv2d(4, 4, 3)), 'body', id='parametrized'),
        pytest.param(nn.ConvTranspose2d(4, 4, 3), 'body', id='transposed'),
        pytest.param(nn.Conv1d(4, 4, 3), 'body', id='one dimension'),
    ],
)
@pytest.mark.parametrize('rule', [None, LayerRule(2, 2)], ids=['scope', 'asked for by a glob'])
def test_types_that_have_no_quantized_twin_stay_and_say_so(middle, wanted, rule):
    plan = make_plan(Odd(middle), request(layers={'middle': rule} if rule else {}))
    _, layer, _ = plan
    assert layer.is_quantized == (wanted == 'body')
    assert wanted in layer.why or (rule and layer.is_quantized)
    if not layer.is_quantized:
        assert "quantized are torch's own layers" in layer.why and (layer.w_bits, layer.a_bits) == (32, 32)
        assert make_plan(Odd(middle), request(layers={'middle': FP})).layers[1].why == "layers: 'middle'"


def test_a_shared_layer_is_planned_once_by_its_first_name():
    shared = nn.Conv2d(4, 4, 3)
    plan = make_plan(Odd(nn.Sequential(shared, nn.ReLU(), shared)), request())
    assert list(bits(plan)) == ['first', 'middle.0', 'last']


@pytest.mark.parametrize(
    ('net', 'body'),
    [
        pytest.param(nn.Sequential(), set(), id='empty'),
        pytest.param(nn.Sequential(nn.Linear(3, 3)), set(), id='one layer'),
        pytest.param(nn.Conv2d(3, 3, 1), set(), id='a layer itself'),
        pytest.param(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)), set(), id='two layers: both ends'),
        pytest.param(nn.Sequential(*(nn.Linear(3, 3) for _ in range(4))), {'1', '2'}, id='a plain chain'),
        pytest.param(Odd(nn.Sequential(nn.Sequential(nn.Conv2d(4, 4, 1)))), {'middle.0.0'}, id='nested containers'),
        pytest.param(Odd(nn.ModuleList([Odd(nn.ReLU()), Odd(nn.ReLU())])),
                     {f'middle.{i}.{n}' for i in (0, 1) for n in ('first', 'last')}, id='a list of blocks'),
        pytest.param(Odd(nn.Sequential(Odd(nn.ReLU()), nn.BatchNorm2d(4))), {'middle.0.first', 'middle.0.last'},
                     id='mixed children are no container: all but the ends'),
        pytest.param(nn.Sequential(Odd(nn.ReLU()), Odd(nn.ReLU())), {'0.last', '1.first'},
                     id='nothing but blocks: all but the ends'),
    ],
)  # fmt: skip
def test_body_of_odd_networks(net, body):
    assert body_layers(net) == body


def test_an_end_inside_the_body_has_eight_bits_under_scope_all_only():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(Odd(nn.ReLU()), Odd(nn.ReLU())))
    assert make_plan(net, request(scope='all')).layers[-1].w_bits == 8
    assert make_plan(net, request(scope='body')).layers[-1].w_bits == 4


def test_planning_changes_nothing():
    net = tiny()
    before, modules = {k: v.clone() for k, v in net.state_dict().items()}, list(net.modules())
    make_plan(net, request())
    assert list(net.modules()) == modules and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_a_plan_survives_as_plain_data():
    settings = {'zero_point': 'float', 'options': {'gate': 'sign'}}
    plan = make_plan(tiny(), request(settings=settings), frozenset(BODY[1:2]))
    plain = json.loads(json.dumps(plan.to_plain()))
    assert Plan.from_plain(plain) == plan
    for layer in plain['layers']:
        layer['added by a newer version'] = 1
    assert Plan.from_plain(plain) == plan
