"""What follows a layer, and what may be done to it without changing the network: folding and equalization."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_close, images, plan_of, quantized, tiny
from torch import nn
from torch.nn import functional

from basicsr_quant import compat
from basicsr_quant.config import read_config
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import calibrate, quantize
from basicsr_quant.network.channels import input_channels, input_range, layout, output_channels, output_range
from basicsr_quant.network.equalization import equalizable, equalize
from basicsr_quant.network.folding import fold_batch_norms, fold_state, foldable, folds_of
from basicsr_quant.network.surgery import floating_point
from basicsr_quant.network.trace import trace

LAYERS = {
    'convolution': lambda: nn.Conv2d(4, 4, 3, padding=1),
    'without a bias': lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False),
    'grouped': lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2),
    'transposed': lambda: nn.ConvTranspose2d(4, 4, 3, padding=1),
    'transposed, grouped': lambda: nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2, bias=False),
}


class Net(nn.Module):
    """First layer, two residual blocks of two layers with BatchNorm, last layer: as SRResNet, small."""

    def __init__(self, make=LAYERS['convolution'], act=nn.PReLU, affine=True):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(*(NormBlock(make, act, affine) for _ in range(2)))
        self.last = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x):
        return self.last(self.body(self.first(x)))


class NormBlock(nn.Module):
    def __init__(self, make, act, affine):
        super().__init__()
        self.conv1, self.bn1, self.act = make(), nn.BatchNorm2d(4, affine=affine), act()
        self.conv2, self.bn2 = make(), nn.BatchNorm2d(4, affine=affine)

    def forward(self, x):
        return x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))


def net_of(*args, seed=0):
    """A :class:`Net` in evaluation mode whose BatchNorms have statistics of their own."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Net(*args)
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.2, 3)
                if module.affine:
                    nn.init.normal_(module.weight)  # of either sign
                    nn.init.normal_(module.bias)
        return net.eval()


NORMS = {f'body.{i}.bn{j}': f'body.{i}.conv{j}' for i in (0, 1) for j in (1, 2)}


class Graph(nn.Module):
    """Two convolutions, and what a case does between them."""

    def __init__(self, forward, **modules):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        for name, module in modules.items():
            setattr(self, name, module)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def twice(s, x):
    y = s.a(x)
    return s.b(s.bn(y)) + y


def in_place(s, x):
    y = s.a(x)
    y += 1
    return s.b(s.bn(y))


def permuted(s, x):
    return s.b(s.bn(s.a(x).transpose(2, 3)))


def output_too(s, x):
    y = s.a(x)
    return s.b(s.bn(y)), y


def norm_twice(s, x):
    return s.bn(s.b(s.bn(s.a(x))))


def weight_read(s, x):
    return s.b(s.bn(s.a(x))) * s.a.weight.mean()


def layer_twice(s, x):
    return s.b(functional.conv2d(s.bn(s.a(x)), s.b.weight))


# ---------------------------------------------------------------------------------------------- who reads what it makes


@pytest.mark.parametrize(('forward', 'found'), [
    (lambda s, x: s.b(s.bn(s.a(x))), True),
    (lambda s, x: s.b(torch.relu_(s.bn(s.a(x)))), True),
    (lambda s, x: s.b(s.bn(s.a(x).detach())), True),  # a view of the whole
    (lambda s, x: s.b(s.bn(s.a(x) + 1)), False),
    (twice, False), (in_place, False), (permuted, False), (output_too, False), (norm_twice, False),
    (weight_read, False), (layer_twice, True),
], ids=lambda v: getattr(v, '__name__', v))  # fmt: skip
def test_a_norm_that_alone_reads_a_layer_is_found(forward, found):
    net = Graph(forward, bn=nn.BatchNorm2d(4))
    assert foldable(net, trace(net)) == ({'bn': 'a'} if found else {})


@pytest.mark.parametrize(('norm', 'found'), [
    (nn.BatchNorm2d(4), True),
    (nn.BatchNorm2d(4, affine=False), True),
    (nn.BatchNorm2d(4, track_running_stats=False), False),  # statistics of the image at hand
    (nn.InstanceNorm2d(4), False),
])  # fmt: skip
def test_which_norms_fold(norm, found):
    net = Graph(lambda s, x: s.b(s.bn(s.a(x))), bn=norm)
    assert bool(foldable(net, trace(net))) == found


@pytest.mark.parametrize(('forward', 'found'), [
    (lambda s, x: s.b(s.a(x)), True),
    (lambda s, x: s.b(functional.relu(s.a(x), inplace=True)), True),
    (lambda s, x: s.b(functional.leaky_relu(s.a(x), 0.2)), True),
    (lambda s, x: s.b(s.act(s.a(x))), True),
    (lambda s, x: s.b(functional.prelu(s.a(x), s.act.weight)), True),
    (lambda s, x: s.b(functional.interpolate(s.act(s.a(x)), scale_factor=2)), True),
    (lambda s, x: s.b(torch.sigmoid(s.a(x))), False),
    (lambda s, x: s.b(functional.gelu(s.a(x))), False),
    (lambda s, x: s.b(s.a(x).clamp(0, 6)), False),
    (lambda s, x: s.b(s.a(x)) + s.a(x), False),
    (lambda s, x: s.b(s.b(s.a(x))), False),
    (lambda s, x: s.b(functional.pixel_shuffle(s.a(x), 2).repeat(1, 4, 1, 1)), False),
    (twice, False),
])  # fmt: skip
def test_which_layers_are_equalized(forward, found):
    net = Graph(forward, act=nn.PReLU(4), bn=nn.Identity())
    pairs = equalizable(net, trace(net), {}, {'a', 'b'})
    assert pairs == ({'a': 'b'} if found else {})
    if found:
        assert equalizable(net, trace(net), {}, {'a'}) == {}
        x = images()
        before = net(x).detach()
        equalize(net, pairs)
        assert_close(net(x).detach(), before, rtol=1e-4, atol=1e-6)


# -------------------------------------------------------------------------------------------------------------- folding


@pytest.mark.parametrize('affine', [True, False])
@pytest.mark.parametrize('kind', LAYERS)
def test_folding_keeps_the_function(kind, affine):
    net, x = net_of(LAYERS[kind], nn.PReLU, affine), images()
    folded = foldable(net, trace(net))
    assert folded == NORMS
    before, names = net(x).detach(), set(net.state_dict())
    state = copy.deepcopy(net.state_dict())
    shape = fold_batch_norms(net_of(LAYERS[kind], nn.PReLU, affine, seed=1), folded)
    fold_batch_norms(net, folded)
    assert_close(net(x).detach(), before, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    assert {k for k in names if '.bn' not in k} <= set(net.state_dict())
    shape.load_state_dict(fold_state(state, folds_of(shape)))  # strictly
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in shape.state_dict().items())
    assert torch.equal(copy.deepcopy(net)(x), net(x)) and folds_of(copy.deepcopy(net)) == folds_of(net)


def test_a_plan_that_folds_what_is_not_there_is_refused():
    with pytest.raises(QuantError, match=r"folds 'body\.0\.norm' into 'body\.0\.conv1'"):
        fold_batch_norms(net_of(), {'body.0.norm': 'body.0.conv1'})


@pytest.mark.parametrize(('block', 'training', 'count'), [
    ({}, False, 4), ({}, True, 0), ({'fold_bn': True}, True, 4), ({'fold_bn': False}, False, 0),
    ({'method': 'daq', 'reference_compat': True}, False, 0),
    ({'method': 'daq', 'reference_compat': True, 'fold_bn': True}, False, 4),
    ({'method': 'none'}, False, 0),
])  # fmt: skip
def test_when_a_plan_folds(block, training, count):
    net = net_of()
    plan = read_config({'method': 'minmax', **block}).plan(net, trace(net), training=training)
    assert len(plan.settings.get('folded', {})) == count
    quantize(net, plan)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 4 - count


# --------------------------------------------------------------------------------------------------------- equalization


@pytest.mark.parametrize('kind', LAYERS)
def test_channels_of_a_weight(kind):
    """Scaling a channel's weights scales that channel of the output, or undoes a scaled channel of the input."""
    layer, x = LAYERS[kind](), torch.rand(2, 4, 5, 5)
    layer.bias = None
    y, scale = layer(x).detach(), torch.tensor([1.0, 2.0, 3.0, 5.0])
    weight = layer.weight.detach().clone()
    layer.weight.data = weight * output_channels(scale, weight, *layout(layer))
    assert_close(layer(x).detach(), y * scale[:, None, None], atol=1e-6)
    layer.weight.data = weight * input_channels(scale, weight, *layout(layer))
    assert_close(layer(x / scale[:, None, None]).detach(), y, atol=1e-6)
    layer.weight.data = output_channels(scale, weight, *layout(layer)).expand_as(weight)
    assert torch.equal(output_range(layer.weight, *layout(layer)), scale)
    layer.weight.data = input_channels(-scale, weight, *layout(layer)).expand_as(weight)
    assert torch.equal(input_range(layer.weight, *layout(layer)), scale)


@pytest.mark.parametrize('act', [nn.ReLU, nn.Identity, lambda: nn.PReLU(4), lambda: nn.LeakyReLU(0.3)])
@pytest.mark.parametrize('kind', LAYERS)
def test_equalization_keeps_the_function_and_makes_ranges_equal(kind, act):
    net, x = net_of(LAYERS[kind], act), images()
    folded = foldable(net, trace(net))
    layers = set(NORMS.values())
    assert equalizable(net, trace(net), {}, layers) == {}
    pairs = equalizable(net, trace(net), folded, layers)
    assert pairs == {f'body.{i}.conv1': f'body.{i}.conv2' for i in (0, 1)}  # never across the addition
    before = net(x).detach()
    equalize(fold_batch_norms(net, folded), pairs)
    assert_close(net(x).detach(), before, rtol=1e-4, atol=1e-5)
    first, second = net.body[0].conv1, net.body[0].conv2
    one, two = output_range(first.weight, *layout(first)), input_range(second.weight, *layout(second))
    assert_close(one, two.detach(), rtol=1e-3)


def test_chains_settle_and_dead_channels_stay():
    net, x = nn.Sequential(*(m for i in range(4) for m in (nn.Conv2d(3, 3, 3), nn.ReLU()))), images(size=12)
    with torch.no_grad():
        for index, factor in ((0, 10.0), (4, 0.01)):
            net[index].weight *= factor
        net[2].weight[1] = 0
    before = net(x).detach()
    pairs = equalizable(net, trace(net), {}, {'0', '2', '4', '6'})
    assert pairs == {'0': '2', '2': '4', '4': '6'}
    equalize(net, pairs)
    assert_close(net(x).detach(), before, rtol=1e-4, atol=1e-7)
    assert not net[2].weight[1].any()
    for a, b in ((0, 2), (2, 4), (4, 6)):
        one, two = output_range(net[a].weight), input_range(net[b].weight)
        live = (one > 0) & (two > 0)
        assert_close(one[live], two[live].detach(), rtol=5e-3)


def test_equalized_ranges_cost_less_at_few_bits():
    """A network with channels of very unequal ranges, quantized per tensor."""
    net, x = net_of(LAYERS['convolution'], nn.ReLU), images(8)
    with torch.no_grad():
        for block in net.body:
            scale = torch.tensor([1.0, 30.0, 0.03, 5.0])
            block.conv1.weight *= scale[:, None, None, None]
            block.conv1.bias *= scale
            block.bn1.running_mean *= scale
            block.bn1.running_var *= scale**2
            block.bn1.weight *= scale
            block.conv2.weight /= scale[:, None, None]
    wanted, errors = net(x).detach(), {}
    for wish in (False, True):
        plan = read_config({'method': 'mse', 'w_bits': 4, 'a_bits': 8, 'equalize': wish}).plan(net, trace(net))
        twin = quantize(copy.deepcopy(net), plan)
        calibrate(twin, plan, [x])
        errors[wish] = float((twin(x) - wanted).detach().square().mean())
    assert errors[True] < 0.5 * errors[False]


# ------------------------------------------------------------------------------------------------------ the whole of it


def test_a_network_without_norms_is_left_as_it_is():
    net = tiny()
    plan = read_config({'method': 'minmax'}).plan(net, trace(net))
    assert 'folded' not in plan.settings and 'equalized' not in plan.settings
    assert set(quantized('minmax').state_dict()) == set(quantize(net, plan_of(net, 'minmax')).state_dict())


@pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')
def test_a_real_file_is_folded_as_it_is_read(assets):
    """SRResNet with 17 BatchNorms, under the names of the tutorial that it comes from."""
    compat.apply()
    from basicsr_quant.archs import SRResNetBN
    from basicsr_quant.models.checkpoint import load_state, read_network_file

    file = read_network_file(str(assets / 'weights/SRResNet-BN-b8f64_x4.pth'))
    plain, net = SRResNetBN(num_block=8).eval(), SRResNetBN(num_block=8).eval()
    plan = read_config({'method': 'minmax', 'equalize': True}).plan(net, trace(net))
    assert len(plan.settings['folded']) == 17 and len(plan.settings['equalized']) == 8
    quantize(net, plan)
    for member in (plain, net):
        assert load_state(member, file, 'params') is not None
    equalize(net, plan.settings['equalized'])
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad(), floating_point(net):
        assert_close(net(x), plain(x), rtol=0, atol=1e-5)
