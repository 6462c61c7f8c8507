"""Residual additions on integer grids: which tensors are found, and what quantizing them does."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from helpers import Block, Tiny, distilling, images, plan_of, tiny
from torch import nn

from basicsr_quant.config import read_config
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import METHODS, method_of, quantize
from basicsr_quant.network.integer_tensors import tensors_of
from basicsr_quant.network.plan import Plan
from basicsr_quant.network.surgery import floating_point, quantizers
from basicsr_quant.network.trace import trace


class Scaled(Block):
    def forward(self, x):
        return x + self.conv2(self.relu(self.conv1(x))) * 0.5


class InPlace(Block):
    def forward(self, x):
        x += self.conv2(self.relu(self.conv1(x)))
        return x


class Discarding(Block):
    def forward(self, x):
        x = x * 1.0
        x.add_(self.conv2(self.relu(self.conv1(x))))
        return x


class Twice(nn.Module):
    """One activation module behind three layers, and an addition at the output."""

    def __init__(self):
        super().__init__()
        sizes = ((3, 4), (4, 4), (4, 4), (4, 3))
        self.first, self.a, self.b, self.last = (nn.Conv2d(c, d, 3, padding=1) for c, d in sizes)
        self.act = nn.LeakyReLU(inplace=True)

    def forward(self, x):
        y = self.act(self.first(x))
        y = y + self.act(self.a(y))
        return self.last(self.act(self.b(y))) + x


def network(block, blocks=2):
    net = tiny(blocks=blocks)
    if block is not Block:
        parts = [block(4) for _ in range(blocks)]
        for part, old in zip(parts, net.body):
            part.load_state_dict(old.state_dict())
        net.body = nn.Sequential(*parts)
    return net


def tensors(net, **settings):
    plan = plan_of(net, 'minmax', 8, **settings)
    return tensors_of(net, trace(net).input_shape, plan)


def quantized(net, method='minmax', bits=8, scope='all', **options):
    block = {'method': method, 'w_bits': bits, 'a_bits': bits, 'scope': scope, 'skip': 'quantized', **options}
    plan = read_config(block).plan(net, trace(net))
    net = quantize(copy.deepcopy(net), plan)
    method_of(plan).calibrate(net, [images()])
    return net, plan


ALL = [
    ('first', 'skip', ('body.0.conv1',)), ('body.0.conv2', 'branch', ()), ('body.0/add.0', 'sum', ('body.1.conv1',)),
    ('body.1.conv2', 'branch', ()), ('body.1/add.0', 'sum', ('last',)),
]  # fmt: skip


@pytest.mark.parametrize('block, scope, wanted', [
    (Block, 'all', ALL), (Block, 'body', ALL[:3]), (Scaled, 'all', ALL), (InPlace, 'body', ALL[:3]),
    (Discarding, 'all', []),
])  # fmt: skip
def test_tensors_of_residual_blocks(block, scope, wanted):
    found = tensors(network(block), scope=scope)
    assert [(t.tensor, t.kind, t.feeds) for t in found] == wanted
    assert all(t.bits == 8 for t in found)


def test_a_module_that_is_called_again_makes_another_tensor_and_the_output_stays_float():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = [t.tensor for t in tensors(Twice(), scope='all')]
    assert found == ['first', 'act', 'a', 'act#1', '/add.0', 'b']


def test_tensors_around_functions_concatenations_and_products():
    found = [(t.tensor, t.kind, t.feeds) for t in tensors(distilling(), scope='all')]
    assert found == [
        ('first', 'before', ()), ('prelu', 'part', ('a',)), ('a', 'before', ()), ('act', 'part', ('b',)),
        ('/relu.0', 'part', ()), ('/cat.0', 'part', ()), ('up', 'before', ()), ('gate', 'part', ()),
        ('c', 'before', ()),
    ]  # fmt: skip
    net, block = distilling(), {'method': 'minmax', 'scope': 'all', 'skip': 'quantized'}
    plan = read_config({**block, 'layers': {'first': 'fp', 'c': {'w_bits': 32}}}).plan(net, trace(net))
    assert [t.tensor for t in plan.tensors] == ['prelu', 'a', 'act', '/relu.0', '/cat.0', 'up', 'gate']


@pytest.mark.parametrize('engine, wanted', [
    ('onnxruntime', [t for t, _, _ in ALL]), ('tensorrt', [t for t, _, _ in ALL]),
    ('openvino', [t for t, kind, _ in ALL if kind != 'branch']),
])  # fmt: skip
def test_quantizers_stand_where_the_engine_executes_them(engine, wanted):
    net, plan = quantized(network(Block), engine=engine)
    assert [t.tensor for t in plan.tensors] == wanted
    assert len(net.tensor_quantizers) == len(wanted)


def test_a_sum_behind_which_a_relu_stands_is_quantized_once():
    class Rectified(Block):
        def forward(self, x):
            return self.relu(x + self.conv2(self.relu(self.conv1(x))))

    found = tensors(network(Rectified, blocks=1), scope='all')
    assert [(t.tensor, t.kind, t.feeds) for t in found] == [
        ('first', 'skip', ('body.0.conv1',)), ('body.0.conv2', 'branch', ()), ('body.0.relu#1', 'sum', ('last',)),
    ]  # fmt: skip


def test_a_batch_norm_that_is_folded_makes_no_tensor():
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 3)

        def forward(self, x):
            return self.last(torch.tanh(self.norm(self.first(x))))

    net = Normed().eval()
    plan = read_config({'method': 'minmax', 'scope': 'all', 'skip': 'quantized'}).plan(net, trace(net))
    assert [t.tensor for t in plan.tensors] == ['first'] and plan.settings['folded'] == {'norm': 'first'}
    assert isinstance(net.norm, nn.BatchNorm2d)


def test_functions_and_concatenations_on_grids_are_those_of_the_formula():
    net, _ = quantized(distilling())
    x, held = images(), net.tensor_quantizers
    kept, rest = torch.split(held['prelu'](net.prelu(held['first'](net.first(x)))), [2, 6], dim=1)
    more, rest = torch.split(held['act'](nn.functional.leaky_relu(held['a'](net.a(rest)), 0.1)), [2, 6], dim=1)
    wide = held['/cat-0'](torch.cat([kept, more, held['/relu-0'](net.b(rest).relu())[:, :4]], dim=1))
    pooled = wide.mean((2, 3), keepdim=True)
    gate = held['gate'](held['up'](net.up(net.down(pooled + pooled.square()).relu())).sigmoid())
    torch.testing.assert_close(net(x), net.last(nn.functional.gelu(held['c'](net.c(wide * gate)))))


@pytest.mark.parametrize('block', [Block, Scaled, InPlace])
@pytest.mark.parametrize('bits', [4, 8])
def test_quantized_additions_are_those_of_the_formula(block, bits):
    net, _ = quantized(network(block, blocks=1), bits=bits)
    factor = 0.5 if block is Scaled else 1.0
    x, held = images(), net.tensor_quantizers
    part = net.body[0]
    start = held['first'](net.first(x))
    branch = held['body-0-conv2'](part.conv2(part.relu(part.conv1(start)))) * factor
    total = held['body-0/add-0'](start + branch)
    torch.testing.assert_close(net(x), net.last(total))


@pytest.mark.parametrize('bits, shared', [(8, True), (4, False)])
def test_one_quantizer_for_a_tensor_at_the_layers_own_bits(bits, shared):
    net, _ = quantized(tiny(), bits=bits, scope='body')
    assert (net.body[1].conv1.input_quantizer is net.tensor_quantizers['body-0/add-0']) == shared
    assert all(bool(q.calibrated) for q in quantizers(net).values())


def test_state_copies_and_floating_point():
    net, plan = quantized(tiny())
    x = images()
    assert torch.equal(copy.deepcopy(net)(x), net(x))
    again = quantize(tiny(), Plan.from_plain(plan.to_plain()))
    again.load_state_dict(net.state_dict())
    assert torch.equal(again(x), net(x))
    with floating_point(net):
        torch.testing.assert_close(net(x), tiny()(x))


def test_an_error_inside_leaves_no_mode_behind():
    net, _ = quantized(tiny())
    before, x = net(images()), images()
    with pytest.raises(RuntimeError):
        net(torch.zeros(1, 5, 8, 8))
    assert torch.overrides._get_current_function_mode_stack() == []
    assert torch.equal(net(x), before)


@pytest.mark.parametrize('make', [lambda: network(Block), lambda: network(InPlace), distilling])
@pytest.mark.parametrize('method', ['minmax', 'lsq', 'pams', 'odm'])
def test_training_reaches_every_parameter(method, make):
    net, _ = quantized(make(), method)
    net.train()
    net(images()).square().mean().backward()
    wanted = [name for name, p in net.named_parameters() if p.requires_grad and 'quantizer' not in name]
    assert all(net.get_parameter(name).grad is not None for name in wanted)


def test_methods_with_ranges_of_their_own_for_every_image_are_refused():
    moving = [name for name in METHODS if not (METHODS[name].is_static or METHODS[name].takes_skip)]
    assert 'daq' in moving
    for name in moving:
        with pytest.raises(QuantError, match=r'quant\.skip'):
            read_config({'method': name, 'skip': 'quantized'})


def test_a_plan_without_tensors_reads_as_before():
    plain = plan_of(Tiny(), 'minmax', 8).to_plain()
    assert 'tensors' not in plain and Plan.from_plain(plain).tensors == ()
    assert replace(Plan.from_plain(plain), tensors=()) == Plan.from_plain(plain)
