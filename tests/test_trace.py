"""What a trace reports, against counts made by hand, and that it leaves no trace itself."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from basicsr_quant import compat
from basicsr_quant.errors import QuantError
from basicsr_quant.network.trace import NetworkTrace, trace
from basicsr_quant.nn import twin_class
from basicsr_quant.quantizers import LearnedRange


class Network(nn.Module):
    """Any function of one image, with modules."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, x)


def conv(channels_in: int = 3, channels_out: int = 4, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(channels_in, channels_out, 3, padding=1, **kwargs)


# ---------------------------------------------------------------------------------------------- multiply-accumulates

LAYERS = {
    'Conv2d': (nn.Conv2d(3, 8, 3, padding=1), (1, 3, 10, 12), 10 * 12 * 3 * 8 * 9),
    'strided': (nn.Conv2d(3, 8, 3, stride=2, padding=1), (1, 3, 10, 12), 5 * 6 * 3 * 8 * 9),
    'grouped': (nn.Conv2d(8, 8, 3, padding=1, groups=4), (1, 8, 10, 12), 10 * 12 * 8 * 2 * 9),
    'depthwise': (nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), (1, 8, 10, 12), 10 * 12 * 8 * 9),
    'Conv1d': (nn.Conv1d(3, 8, 5), (1, 3, 20), 16 * 3 * 8 * 5),
    'Conv3d': (nn.Conv3d(3, 8, 3), (1, 3, 5, 6, 7), 3 * 4 * 5 * 3 * 8 * 27),
    'ConvTranspose2d': (nn.ConvTranspose2d(8, 3, 4, stride=2), (1, 8, 10, 12), 10 * 12 * 8 * 3 * 16),
    'Linear': (nn.Linear(6, 5), (1, 7, 6), 7 * 6 * 5),
}


@pytest.mark.parametrize('name', LAYERS)
def test_macs_of_a_layer_by_hand(name):
    layer, shape, macs = LAYERS[name]
    found = trace(nn.Sequential(layer), shape)
    assert [(x.name, x.type, x.calls, x.macs) for x in found.layers] == [('0', type(layer).__name__, 1, macs)]
    assert found.macs == macs
    assert found.layers[0].input_shape == shape


@pytest.mark.parametrize(
    ('function', 'macs', 'not_counted'),
    [
        pytest.param(lambda x: x @ x.transpose(-1, -2), 2 * 8 * 6 * 8, (), id='matmul'),
        pytest.param(lambda x: torch.einsum('bchw,bcdw->bchd', x, x), 2 * 8 * 6 * 8, (), id='einsum'),
        pytest.param(lambda x: F.conv2d(x, x.new_ones(3, 2, 1, 1)), 8 * 6 * 2 * 3, (), id='functional convolution'),
        pytest.param(lambda x: F.linear(x, x.new_ones(5, 6)), 2 * 8 * 6 * 5, (), id='functional linear'),
        pytest.param(lambda x: F.relu(x) + 2 * x, 0, ('add', 'mul', 'relu'), id='arithmetic is named'),
        pytest.param(lambda x: torch.cat([x.flip(3), F.pixel_unshuffle(x, 2).reshape(x.shape)]), 0, (), id='moves'),
        pytest.param(lambda x: x.clone() > 0, 0, (), id='comparisons'),
        pytest.param(lambda x: x.mean((2, 3)).sigmoid(), 0, ('mean',), id='small tensors are left out'),
        pytest.param(
            lambda x: F.grid_sample(x, x.new_zeros(1, 4, 4, 2), align_corners=False),
            0,
            ('grid_sampler_2d',),
            id='sampling',
        ),
    ],
)
@pytest.mark.parametrize('inference', [False, True])
def test_functional_macs_and_what_is_not_counted(function, macs, not_counted, inference):
    wrapped = torch.inference_mode()(function) if inference else function
    found = trace(Network(lambda net, x: wrapped(x), unused=conv()), (1, 2, 8, 6))
    assert found.macs == macs
    assert [x.macs for x in found.functional] == ([macs] if macs else [])
    assert found.not_counted == not_counted
    assert found.unused == ('unused',)
    assert found.layers == ()


@pytest.mark.parametrize('values', [False, True], ids=['meta device', 'in place'])
def test_macs_of_attention(values):
    """With d = 8, n = 16 tokens: 4 n d^2 for the projections, 2 n^2 d for the two products."""

    def forward(net, x):
        if values:
            float(x.sum())
        return net.attention(x, x, x, need_weights=False)[0]

    net = Network(forward, attention=nn.MultiheadAttention(8, 2, batch_first=True))
    assert trace(net, (1, 16, 8)).macs == 4 * 16 * 64 + 2 * 16 * 16 * 8


def test_a_reused_module_is_one_layer_with_two_calls():
    net = Network(lambda net, x: net.b(net.a(net.a(F.relu(x)))), b=conv(3, 3), a=conv(3, 3))
    found = trace(net, (1, 3, 8, 8))
    assert [(x.name, x.calls, x.macs) for x in found.layers] == [('a', 2, 2 * 64 * 81), ('b', 1, 64 * 81)]
    assert not found['a'].rectified  # the first call is, the second is not


def test_batch_is_one():
    assert trace(conv(), (5, 3, 8, 8)).input_shape == (1, 3, 8, 8)


# ------------------------------------------------------------------------------------------------------------ signs

NONNEGATIVE = {
    'relu': F.relu,
    'relu in place': lambda x: F.relu_(x.clone()),
    'relu6': F.relu6,
    'sigmoid': torch.sigmoid,
    'softmax': lambda x: x.softmax(1),
    'abs': torch.abs,
    'square': torch.square,
    'x * x': lambda x: x * x,
    'x ** 4': lambda x: x**4,
    'clamp': lambda x: x.clamp(0, 1),
    'clamp_min': lambda x: x.clamp_min(0.5),
    'hardtanh': lambda x: F.hardtanh(x, 0, 1),
    'threshold': lambda x: F.threshold(x, 0.1, 0),
    'maximum with zeros': lambda x: torch.maximum(x, torch.zeros_like(x)),
    'relu, view, permute': lambda x: F.relu(x).view(1, 3, -1).permute(0, 2, 1).contiguous().view(x.shape),
    'relu, in place through a view': lambda x: F.relu_(x.clone().view(-1)).view(x.shape),
    'relu, pixel shuffle': lambda x: F.pixel_shuffle(F.pixel_unshuffle(F.relu(x), 2), 2),
    'relu, max pool': lambda x: F.max_pool2d(F.relu(x), 2),
    'relu, average pool': lambda x: F.avg_pool2d(F.relu(x), 2),
    'relu, global pool': lambda x: F.adaptive_avg_pool2d(F.relu(x), 1),
    'relu, nearest': lambda x: F.interpolate(F.relu(x), scale_factor=2),
    'relu, bilinear': lambda x: F.interpolate(F.relu(x), scale_factor=2, mode='bilinear'),
    'relu, reflection': lambda x: F.pad(F.relu(x), (1, 1, 1, 1), mode='reflect'),
    'relu, zero padding': lambda x: F.pad(F.relu(x), (1, 1, 1, 1)),
    'relu, dropout': lambda x: F.dropout(F.relu(x), training=False),
    'relu, cat': lambda x: torch.cat([F.relu(x), x.abs()], 2),
    'relu, chunks': lambda x: torch.cat(F.relu(x).chunk(2, 2)[::-1], 2),
    'relu, sum': lambda x: 0.5 * F.relu(x) + x.abs() / 3 + 1,
    'relu, product': lambda x: F.relu(x) * x.sigmoid(),
    'relu, clamp from above': lambda x: F.relu(x).clamp(max=1),
    'written in parts': lambda x: _in_parts(x, F.relu),
}

POSSIBLY_NEGATIVE = {
    'the input': lambda x: x,
    'leaky relu': lambda x: F.leaky_relu(x, 0.1),
    'gelu': F.gelu,
    'tanh': torch.tanh,
    'x ** 3': lambda x: x**3,
    'clamp': lambda x: x.clamp(-1, 1),
    'clamp to below zero': lambda x: x.clamp(0, -1),
    'hardtanh': F.hardtanh,
    'threshold': lambda x: F.threshold(x, 0.1, -20),
    'relu, minus': lambda x: F.relu(x) - 0.5,
    'relu, plus a negative number': lambda x: F.relu(x) + -0.5,
    'relu, minus relu': lambda x: torch.add(F.relu(x), x.abs(), alpha=-1),
    'relu, times -1': lambda x: -1 * F.relu(x),
    'sigmoid, product with the input': lambda x: x.sigmoid() * x,
    'relu, residual': lambda x: F.relu(x) + x,
    'relu, cat with the input': lambda x: torch.cat([F.relu(x), x], 2),
    'relu, bicubic': lambda x: F.interpolate(F.relu(x), scale_factor=2, mode='bicubic'),
    'relu, negative padding': lambda x: F.pad(F.relu(x), (1, 1, 1, 1), value=-1.0),
    'relu, spoilt in place': lambda x: F.relu(x).sub_(0.5),
    'relu, spoilt in part': lambda x: _in_parts(F.relu(x), lambda y: y - 1),
    'written in parts': lambda x: _in_parts(x, lambda y: y),
}


def _in_parts(x: Tensor, function) -> Tensor:
    out = torch.zeros_like(x)
    out[:, :1] = function(x[:, :1])
    out[:, 1:] = F.relu(x[:, 1:])
    return out


def _rectified(function, values: bool) -> bool:
    def forward(net, x):
        if values:
            float(x.sum())  # the meta device has no values: the trace has to run in place
        return net.layer(function(x))

    return trace(Network(forward, layer=conv(3, 4)), (1, 3, 8, 8)).layers[0].rectified


@pytest.mark.parametrize('values', [False, True], ids=['meta device', 'in place'])
@pytest.mark.parametrize('name', NONNEGATIVE)
def test_rectified(name, values):
    function = NONNEGATIVE[name]
    assert (function(torch.randn(1, 3, 8, 8)) >= 0).all()
    assert _rectified(function, values)


@pytest.mark.parametrize('values', [False, True], ids=['meta device', 'in place'])
@pytest.mark.parametrize('name', POSSIBLY_NEGATIVE)
def test_not_rectified(name, values):
    function = POSSIBLY_NEGATIVE[name]
    assert (function(torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))) < 0).any()
    assert not _rectified(function, values)


def test_rectified_does_not_depend_on_values():
    net = nn.Sequential(conv(3, 3), conv(3, 3))
    nn.init.zeros_(net[0].weight)
    nn.init.ones_(net[0].bias)  # the second layer sees ones only, whatever the image
    assert not trace(net)['1'].rectified


# ------------------------------------------------------------------------------------------------- nothing is changed


class Restless(nn.Module):
    """Changes everything that a forward pass can change, and may fail after that."""

    def __init__(self, fails: bool, values: bool) -> None:
        super().__init__()
        self.fails, self.values = fails, values
        self.layer, self.norm = conv(), nn.BatchNorm2d(4)
        self.register_buffer('count', torch.zeros(()))
        self.mean = torch.zeros(1, 3, 1, 1)
        self.cache: dict[str, Tensor] = {}

    def forward(self, x):
        if self.values:
            float(x.sum())
        self.count += 1
        self.mean = self.mean.type_as(x) + torch.rand(1).to(x.device)
        self.cache['x'] = self.last = x
        y = self.norm(self.layer(x - self.mean))
        if self.fails:
            raise RuntimeError('no such size')
        return y


@pytest.mark.parametrize('fails', [False, True])
@pytest.mark.parametrize('values', [False, True], ids=['meta device', 'in place'])
def test_leaves_the_network_as_it_was(fails, values):
    net = Restless(fails, values).train()
    net.norm.eval()
    for parameter in net.parameters():
        parameter.requires_grad_(parameter is not net.norm.weight)
    before, attributes = copy.deepcopy(net), {name: list(vars(module)) for name, module in net.named_modules()}
    versions = [t._version for t in (*net.parameters(), *net.buffers())]
    random = torch.get_rng_state()
    if fails:
        with pytest.raises(QuantError, match=r'Restless cannot be listed.*1x3x32x32.*no such size'):
            trace(net)
    else:
        trace(net)
    assert torch.equal(torch.get_rng_state(), random)
    assert {name: list(vars(module)) for name, module in net.named_modules()} == attributes
    for (name, module), old in zip(net.named_modules(), before.modules()):
        assert module.training == old.training, name
        assert not module._forward_hooks and not module._forward_pre_hooks
    for (name, now), then in zip(net.state_dict().items(), before.state_dict().values()):
        assert torch.equal(now, then), name
    assert torch.equal(net.mean, before.mean) and net.cache == {}
    assert all(p.grad is None and p.grad_fn is None and not p.is_meta for p in net.parameters())
    assert not net.norm.weight.requires_grad and net.layer.weight.requires_grad
    if not values and not fails:
        assert [t._version for t in (*net.parameters(), *net.buffers())] == versions


def test_training_mode_does_not_matter():
    net = nn.Sequential(conv(), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), conv(4, 3))
    assert trace(net.train()) == trace(net.eval())
    assert trace(net)['4'].rectified


def test_a_network_with_history_in_its_attributes():
    net = nn.Sequential(nn.utils.weight_norm(conv()), nn.utils.parametrizations.weight_norm(conv(4, 3)))
    found = trace(net)
    assert [x.macs for x in found.layers] == [1024 * 108, 1024 * 108]
    assert found.not_counted == ()


# --------------------------------------------------------------------------------------------------------- dummy input


@pytest.mark.parametrize(
    ('net', 'shape'),
    [
        (conv(), (1, 3, 32, 32)),
        (conv(1), (1, 1, 32, 32)),
        (nn.Sequential(nn.PixelUnshuffle(2), conv(12)), (1, 3, 32, 32)),
        (nn.Linear(7, 3), (1, 7)),
        (nn.Conv1d(2, 3, 3), (1, 2, 32)),
        (nn.Conv3d(2, 3, 3), (1, 2, 8, 32, 32)),
        (Network(lambda net, x: net.layer(x).reshape(1, 4, -1, 56, 56), layer=conv()), (1, 3, 56, 56)),
        (Network(lambda net, x: net.layer(x[:, 4]), layer=conv()), (1, 5, 3, 64, 64)),
        (conv().half(), (1, 3, 32, 32)),
    ],
)
def test_default_input(net, shape):
    assert trace(net).input_shape == shape


@pytest.mark.parametrize(
    ('net', 'shape', 'message'),
    [
        (nn.ReLU(), None, 'ReLU has neither a convolution nor a linear layer'),
        (Network(lambda net, x, y: x, layer=conv()), None, 'missing 1 required positional argument'),
        (conv(), (1, 4, 8, 8), r'does not run on an input of shape 1x4x8x8: RuntimeError: .*channels'),
    ],
)
def test_a_network_that_does_not_run_is_refused(net, shape, message):
    with pytest.raises(QuantError, match=message) as caught:
        trace(net, shape)
    assert '\n' not in str(caught.value)


def test_without_compute_a_network_that_reads_values_is_refused():
    with pytest.raises(QuantError, match='meta'):
        trace(Restless(fails=False, values=True), compute=False)


# ------------------------------------------------------------------------------------------------- quantized networks


def _counts(found: NetworkTrace) -> list[tuple[str, int, int, bool]]:
    return [(layer.name, layer.calls, layer.macs, layer.rectified) for layer in found.layers]


class Gated(LearnedRange):
    """A quantizer with layers of its own, as DDTB's."""

    def __init__(self):
        super().__init__(4)
        self.gate = nn.Linear(1, 1)

    def forward(self, x):
        return super().forward(x) * self.gate(x.mean().view(1, 1)).squeeze()


@pytest.mark.parametrize('quantizer', [lambda: LearnedRange(4), Gated], ids=['range', 'gate'])
def test_quantized_layers_count_like_their_originals(quantizer):
    net = nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 4), nn.Flatten(2), nn.Linear(64, 8))
    before = trace(net, (1, 3, 8, 8))
    for index in (2, 4):
        net[index] = twin_class(net[index]).from_float(net[index])
        net[index].input_quantizer, net[index].weight_quantizer = quantizer(), LearnedRange(4)
    after = trace(net, (1, 3, 8, 8))
    assert _counts(after) == _counts(before)
    assert [layer.type for layer in after.layers] == ['Conv2d', 'QuantConv2d', 'QuantLinear']
    assert after.not_counted == before.not_counted == ('relu',)
    assert after.parameter_bytes == before.parameter_bytes
    assert before.range_bytes == 0 < after.range_bytes


def test_sizes():
    net = nn.Sequential(conv(3, 4), nn.PReLU(), conv(4, 3).double())
    found = trace(nn.Sequential(net[0], net[1]), (1, 3, 8, 8))
    assert (found['0'].weight_numel, found['0'].weight_bytes) == (108, 432)
    assert found.parameter_bytes == 4 * (108 + 4 + 1)
    tied = nn.Sequential(conv(3, 3), conv(3, 3))
    tied[1].weight = tied[0].weight
    assert [layer.weight_numel for layer in trace(tied).layers] == [81, 0]
    assert trace(tied).parameter_bytes == 4 * (81 + 3 + 3)


# ------------------------------------------------------------------------------------------------------- host networks

FEATURES = {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 64}
NETWORKS = {
    'EDSR': {**FEATURES, 'num_block': 16, 'upscale': 4},
    'MSRResNet': {**FEATURES, 'num_block': 16, 'upscale': 4},
    'RCAN': {**FEATURES, 'num_group': 2, 'num_block': 2, 'squeeze_factor': 16, 'upscale': 4},
    'RRDBNet': {**FEATURES, 'num_block': 1, 'num_grow_ch': 32, 'scale': 4},
    'SRVGGNetCompact': {**FEATURES, 'num_conv': 4, 'upscale': 4, 'act_type': 'relu'},
    'SwinIR': {
        'upscale': 4, 'img_size': 32, 'window_size': 8, 'depths': [2], 'embed_dim': 60, 'num_heads': [6],
        'mlp_ratio': 2, 'upsampler': 'pixelshuffledirect',
    },
}  # fmt: skip
# Multiply-accumulates per pixel of the input, summed by hand. A body convolution of 64 features takes 36864.
BODY, WIDE = 64 * 64 * 9, 64 * 256 * 9
MACS = {
    'EDSR': 1728 + 33 * BODY + WIDE + 4 * WIDE + 16 * 1728,
    'MSRResNet': 1728 + 32 * BODY + WIDE + 4 * WIDE + 16 * BODY + 16 * 1728,
    # two groups of two blocks; attention is 2 x 64 x 4 for each image of 1024 pixels
    'RCAN': 1728 + 2 * (2 * (2 * BODY + 512 / 1024) + BODY) + BODY + WIDE + 4 * WIDE + 16 * 1728,
    'RRDBNet': (
        1728 + 3 * 9 * (32 * (64 + 96 + 128 + 160) + 64 * 192) + BODY + 4 * BODY + 16 * BODY + 16 * BODY + 16 * 1728
    ),
    'SRVGGNetCompact': 1728 + 4 * BODY + 64 * 48 * 9,
    # two blocks: qkv and projection 4 d^2, two products with 64 tokens 2 x 64 d, MLP 4 d^2
    'SwinIR': 60 * 27 + 2 * (4 * 3600 + 2 * 64 * 60 + 4 * 3600) + 2 * 60 * 60 * 9 + 60 * 48 * 9,
}


def build(name: str) -> nn.Module:
    if not compat.has_host():
        pytest.skip('BasicSR is not installed')
    compat.apply()
    from basicsr.utils.registry import ARCH_REGISTRY

    return ARCH_REGISTRY.get(name)(**NETWORKS[name])


@pytest.mark.parametrize('name', NETWORKS)
def test_host_networks(name):
    net = build(name)
    found = trace(net, compute=False)
    assert found.output_shape == (1, 3, 128, 128)
    assert found.macs == MACS[name] * 32 * 32
    assert found.unused == ()


def test_edsr_x4_is_known():
    assert MACS['EDSR'] == 1_983_168
    found = trace(build('EDSR'))
    assert {layer.name for layer in found.layers if layer.rectified} == {f'body.{i}.conv2' for i in range(16)}
    assert found.parameter_bytes == 4 * 1_517_571
    assert found.not_counted == ('add', 'div', 'mul', 'relu', 'sub')
    assert [found.layers[0].name, found.layers[-1].name] == ['conv_first', 'conv_last']


def test_rcan_attention_is_rectified():
    rectified = [layer.name for layer in trace(build('RCAN')).layers if layer.rectified]
    assert rectified[:2] == ['body.0.residual_group.0.rcab.2', 'body.0.residual_group.0.rcab.3.attention.3']
    assert len(rectified) == 8


def test_swinir_attention_is_functional():
    found = trace(build('SwinIR'))
    assert [(layer.name, layer.macs) for layer in found.functional] == [
        (f'layers.0.residual_group.blocks.{i}.attn', 2 * 64 * 60 * 1024) for i in range(2)
    ]
    assert 'layer_norm' in found.not_counted and 'softmax' in found.not_counted
