"""Every network through the same surgery: BasicSR's own, the papers', and what layers can do inside a network."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from basicsr_quant import compat
from basicsr_quant.config import read_config
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import method_of, quantize
from basicsr_quant.network.plan import Plan
from basicsr_quant.network.sensitivity import OFFSETS, output_errors
from basicsr_quant.network.surgery import floating_point, quant_layers
from basicsr_quant.network.trace import trace

IMAGE = (1, 3, 16, 16)
CLIP = (1, 3, 3, 64, 64)
RGB = {'num_in_ch': 3, 'num_out_ch': 3}
# network -> options, shape of its input, layers in all, layers that the body holds
NETWORKS: dict[str, tuple[dict[str, Any], tuple[int, ...], int, int]] = {
    'EDSR': ({**RGB, 'num_feat': 8, 'num_block': 2, 'upscale': 2}, IMAGE, 8, 4),
    'MSRResNet': ({**RGB, 'num_feat': 8, 'num_block': 2, 'upscale': 4}, IMAGE, 9, 4),
    'RCAN': ({**RGB, 'num_feat': 8, 'num_group': 1, 'num_block': 2, 'squeeze_factor': 2, 'upscale': 2}, IMAGE, 13, 9),
    'RRDBNet': ({**RGB, 'num_feat': 8, 'num_block': 1, 'num_grow_ch': 4}, IMAGE, 21, 15),
    'SRVGGNetCompact': ({'num_feat': 8, 'num_conv': 2, 'upscale': 2}, IMAGE, 4, 2),
    'SwinIR': ({'img_size': 16, 'embed_dim': 8, 'depths': [2], 'num_heads': [2], 'window_size': 8, 'mlp_ratio': 2,
                'upscale': 2, 'upsampler': 'pixelshuffledirect'}, IMAGE, 12, 9),
    'RIDNet': ({'in_channels': 3, 'mid_channels': 16, 'out_channels': 3, 'num_block': 1}, IMAGE, 16, 12),
    'BasicVSR': ({'num_feat': 8, 'num_block': 1}, CLIP, 41, 34),
    'DUF': ({'scale': 4, 'num_layer': 16}, (1, 7, 3, 8, 8), 18, 16),
    'UNetDiscriminatorSN': ({'num_in_ch': 3, 'num_feat': 4}, IMAGE, 10, 8),
    'SRResNetBN': ({'num_feat': 8, 'num_block': 2, 'upscale': 2}, IMAGE, 8, 4),
    'IMDN': ({'num_feat': 16, 'num_block': 2, 'upscale': 2}, IMAGE, 18, 14),
    'RFDN': ({'num_feat': 8, 'num_block': 2, 'upscale': 2}, IMAGE, 34, 30),
    'CARN': ({'num_feat': 8, 'upscale': 2}, IMAGE, 33, 30),
    'CARNM': ({'num_feat': 8, 'upscale': 2}, IMAGE, 24, 21),
    'RDN': ({'num_feat': 8, 'num_block': 2, 'num_layer': 2, 'growth': 4, 'upscale': 2}, IMAGE, 12, 6),
    'IDN': ({'num_feat': 16, 'num_block': 2, 'step': 4, 'upscale': 2}, IMAGE, 17, 14),
}  # fmt: skip


def build(kind: str, options: dict[str, Any]) -> nn.Module:
    if not compat.has_host():
        pytest.skip('BasicSR is not installed')
    compat.apply()
    from basicsr.archs import build_network

    import basicsr_quant.archs  # noqa: F401 (registers)

    torch.manual_seed(0)
    return build_network({'type': kind, **options}).eval()


def planned(net: nn.Module, **block: Any) -> Plan:
    return read_config({'method': 'minmax', 'w_bits': 8, 'a_bits': 8, **block}).plan(net, trace(net))


def calibrated(net: nn.Module, x: Tensor, **block: Any) -> tuple[nn.Module, Plan]:
    plan = planned(net, **block)
    quantize(net, plan)
    method_of(plan).calibrate(net, [x])
    return net, plan


@pytest.fixture(params=[pytest.param(k, marks=[pytest.mark.slow] * (k == 'BasicVSR')) for k in NETWORKS])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor, int, int]:
    options, shape, layers, body = NETWORKS[request.param]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    return build(request.param, options), x, layers, body


@torch.no_grad()
def test_through_the_surgery(case: tuple[nn.Module, Tensor, int, int]) -> None:
    net, x, layers, body = case
    wanted, names = net(x), list(net.state_dict())
    plan = planned(net)
    assert len(plan) == layers and len(plan.quantized) == body
    fp = quantize(copy.deepcopy(net), planned(net, layers={'*': {'w_bits': 32, 'a_bits': 32}}, method='none'))
    assert torch.equal(fp(x), wanted) and list(fp.state_dict()) == names
    original = type(net)
    net, plan = calibrated(net, x, scope='all', w_granularity='channel', fold_bn=False)  # folding rounds
    assert type(net) is original
    assert [k for k in net.state_dict() if 'quantizer' not in k] == names
    assert [p.layer for p in plan.quantized] == list(quant_layers(net))
    assert {p.type for p in plan if not p.is_quantized} <= {'MeanShift'}
    got = net(x)
    assert got.isfinite().all() and not torch.equal(got, wanted)
    assert (got - wanted).std() < 0.1 * wanted.std(), 'eight bits change little'
    with floating_point(net):
        assert torch.equal(net(x), wanted)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301
        assert torch.equal(twin(x), got) and type(twin) is original


@pytest.fixture(scope='module')
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    from torch import distributed

    store = Path(tmp_path_factory.mktemp('group')) / 'store'
    distributed.init_process_group('gloo', init_method=f'file://{store}', rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_training_in_the_distributed_wrapper(case: tuple[nn.Module, Tensor, int, int], group: None) -> None:
    net, x, _, _ = case
    net, _ = calibrated(net, x)
    wrapped = nn.parallel.DistributedDataParallel(net, broadcast_buffers=False)
    assert torch.equal(wrapped(x), net(x))
    wrapped(x).square().mean().backward()
    learned = {n: p for n, p in net.named_parameters() if p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned.values())


@pytest.mark.parametrize(('block', 'linears', 'convolutions', 'products'), [
    ({'scope': 'all', 'attention': True}, 8, 4, 2),
    ({'scope': 'all', 'attention': True, 'layers': {'*conv*': 'fp', 'upsample*': 'fp'}}, 8, 0, 2),
    ({'scope': 'all', 'layers': {'*conv*': 'fp', 'upsample*': 'fp'}}, 8, 0, 0),
], ids=['everything (ODM)', 'linears and attention (2DQuant, CondiQuant)', 'linears'])  # fmt: skip
@torch.no_grad()
def test_conventions_of_the_literature_for_swinir(
    block: dict[str, Any], linears: int, convolutions: int, products: int
) -> None:
    options, shape, _, _ = NETWORKS['SwinIR']
    net, x = build('SwinIR', options), torch.rand(shape)
    wanted, names = net(x), list(net.state_dict())
    net, plan = calibrated(net, x, **block)
    kinds = [layer.type for layer in plan.quantized]
    assert [kinds.count(k) for k in ('Linear', 'Conv2d', 'WindowAttention')] == [linears, convolutions, products]
    assert [k for k in net.state_dict() if 'quantizer' not in k] == names
    assert 0 < (net(x) - wanted).std() < 0.05 * wanted.std()
    with floating_point(net):
        assert torch.equal(net(x), wanted)
    assert torch.equal(pickle.loads(pickle.dumps(net))(x), net(x))  # noqa: S301


@pytest.mark.slow
@torch.no_grad()
def test_compiled(case: tuple[nn.Module, Tensor, int, int]) -> None:
    net, x, _, _ = case
    net, _ = calibrated(net, x)
    torch._dynamo.reset()
    compiled = torch.compile(net, backend='eager')  # tests/test_surgery.py goes further than capturing
    # A value near the middle of two codes may fall to either side.
    assert (compiled(x) - net(x)).std() < 0.02 * net(x).std()


@pytest.mark.parametrize(('kind', 'options', 'words'), [
    ('ECBSR', {'num_in_ch': 3, 'num_out_ch': 3, 'num_block': 1, 'num_channel': 8, 'with_idt': False,
               'act_type': 'prelu', 'scale': 2}, 'never calls it, or only reads its weight'),
])  # fmt: skip
def test_networks_that_stay_in_floating_point_say_why(kind: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(QuantError, match=words):
        planned(build(kind, options), scope='all')


def test_deformable_convolutions_need_torchvisions_operators() -> None:
    net = build('EDVR', {'num_feat': 8, 'num_reconstruct_block': 1, 'deformable_groups': 2, 'num_extract_block': 1})
    from torchvision.extension import _has_ops

    if _has_ops():
        assert any(layer.layer.startswith('pcd_align.') for layer in planned(net).quantized)
    else:
        with pytest.raises(QuantError, match='of EDVR cannot be listed, because it calls operators of torchvision'):
            planned(net)


def test_a_video_network_that_does_not_run_says_why_as_a_video() -> None:
    class Wants5D(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x: Tensor) -> Tensor:
            _, _, _, _, _ = x.shape
            raise RuntimeError('an operator is missing')

    with pytest.raises(QuantError, match=r'expected 5.*as a video of shape 1x5x3x64x64: .*an operator is missing'):
        trace(Wants5D())


# ---------------------------------------------------------------------------------------------- layers of every kind


class Around(nn.Module):
    """First layer, something between, last layer."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.inner = inner
        self.last = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.inner(self.first(x)))


class Twice(nn.Module):
    """One convolution run twice in a pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(torch.tanh(self.conv(x)) * 3)


class Channels(nn.Module):
    """A layer over the last dimension, with channels moved there and back."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.movedim(1, -1)).movedim(-1, 1)


class Lines(nn.Module):
    """A layer of another number of dimensions."""

    def __init__(self, layer: nn.Module, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.layer, self.shape = layer, shape

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(self.shape)).reshape(x.shape)


class Own(nn.Conv2d):
    """A class derived from a convolution."""


@pytest.mark.filterwarnings('ignore::FutureWarning')
@pytest.mark.parametrize(('make', 'count', 'why'), [
    pytest.param(Twice, 3, None, id='run twice'),
    pytest.param(lambda: nn.Sequential(*[nn.Conv2d(4, 4, 3, padding=1)] * 2), 3, None, id='shared'),
    pytest.param(lambda: nn.Conv2d(4, 4, 3, padding=1, groups=2), 3, None, id='grouped'),
    pytest.param(lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4), 3, None, id='depthwise'),
    pytest.param(lambda: nn.Conv2d(4, 4, 3, padding=2, dilation=2), 3, None, id='dilated'),
    pytest.param(lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode='reflect'), 3, None, id='reflected padding'),
    pytest.param(lambda: nn.Conv2d(4, 4, 3, padding='same', bias=False), 3, None, id='same padding'),
    pytest.param(lambda: Channels(nn.Linear(4, 4)), 3, None, id='linear'),
    pytest.param(lambda: nn.utils.weight_norm(nn.Conv2d(4, 4, 1)), 3, None, id='weight norm, old'),
    pytest.param(lambda: nn.utils.spectral_norm(nn.Conv2d(4, 4, 1)).eval(), 3, None, id='spectral norm, old'),
    pytest.param(lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 1)), 3, None, id='weight norm'),
    pytest.param(lambda: parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)).eval(), 3, None, id='spectral norm'),
    pytest.param(lambda: Channels(parametrizations.weight_norm(nn.Linear(4, 4))), 3, None, id='weight norm, linear'),
    pytest.param(lambda: nn.ConvTranspose2d(4, 4, 3, padding=1), 3, None, id='transposed'),
    pytest.param(lambda: nn.ConvTranspose2d(4, 4, 3, padding=1, groups=2), 3, None, id='transposed, grouped'),
    pytest.param(lambda: Lines(nn.Conv1d(4, 4, 1), (1, 4, -1)), 3, None, id='one dimension'),
    pytest.param(lambda: Lines(nn.ConvTranspose1d(4, 4, 1), (1, 4, -1)), 3, None, id='one dimension, transposed'),
    pytest.param(lambda: Lines(nn.Conv3d(4, 4, 1), (1, 4, 4, 4, -1)), 3, None, id='three dimensions'),
    pytest.param(lambda: Lines(nn.ConvTranspose3d(4, 4, 1), (1, 4, 4, 4, -1)), 3, None,
                 id='three dimensions, transposed'),
    pytest.param(lambda: Own(4, 4, 1), 2, 'a Own may have a forward of its own', id='a class of its own'),
])  # fmt: skip
@torch.no_grad()
def test_layers_are_quantized_or_said_not_to_be(make: Any, count: int, why: str | None) -> None:
    torch.manual_seed(0)
    net, x = Around(make()), torch.rand(IMAGE)
    wanted = net(x)
    names = list(net.state_dict())
    net, plan = calibrated(net, x, scope='all', w_granularity='channel')
    assert len(quant_layers(net)) == len(plan.quantized) == count
    assert [k for k in net.state_dict() if 'quantizer' not in k] == names
    assert [why in p.why for p in plan if not p.chosen] == ([True] if why else [])
    assert 0 < (net(x) - wanted).std() < 0.1 * wanted.std()
    with floating_point(net):
        assert torch.equal(net(x), wanted)


@torch.no_grad()
def test_a_layer_that_runs_twice_is_calibrated_on_both_inputs() -> None:
    net, x = Around(Twice()), torch.rand(IMAGE)
    seen: list[Tensor] = []
    net.inner.conv.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    net(x)
    lower, upper = min(float(t.min()) for t in seen), max(float(t.max()) for t in seen)
    net, _ = calibrated(net, x, scope='all')
    found = net.inner.conv.input_quantizer.bounds(x)
    assert float(found[0]) == pytest.approx(min(lower, 0), abs=(upper - lower) / 200)
    assert float(found[1]) == pytest.approx(max(upper, 0), abs=(upper - lower) / 200)


@pytest.mark.parametrize('method', ['mse', 'lsq', 'pams', 'odm', 'odm_v1', 'daq', 'cadyq', 'ddtb', 'auto'])
@pytest.mark.parametrize('make', [
    lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
    lambda: Lines(nn.Conv1d(4, 4, 3, padding=1), (1, 4, -1)),
    lambda: Lines(nn.Conv3d(4, 4, 3, padding=1), (1, 4, 4, 4, -1)),
    lambda: parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1)),
], ids=['transposed', 'one dimension', 'three dimensions', 'weight norm'])  # fmt: skip
def test_every_method_takes_every_layer(make: Any, method: str) -> None:
    torch.manual_seed(0)
    inner, x = make(), torch.rand(IMAGE)
    net = Around(inner)
    if isinstance(inner, nn.ConvTranspose2d):
        net.last = nn.Conv2d(6, 3, 3, padding=1)
    with torch.no_grad():
        wanted = net(x)
    granularity = {} if method == 'daq' else {'w_granularity': 'channel'}
    net, plan = calibrated(net, x, method=method, **granularity)
    assert [p.why for p in plan] == ['outside the body (scope: body)', 'body', 'outside the body (scope: body)']
    got = net(x)
    assert 0 < (got - wanted).std() < 0.1 * wanted.std()
    got.square().mean().backward()
    learned = [p for n, p in net.named_parameters() if 'quantizer' not in n]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)


@torch.no_grad()
def test_the_same_weight_norm_in_a_copy() -> None:
    x = torch.rand(IMAGE)
    net, _ = calibrated(Around(parametrizations.weight_norm(nn.Conv2d(4, 4, 3, padding=1))), x, scope='all')
    twin = copy.deepcopy(net)
    assert torch.equal(twin(x), net(x))
    twin.inner.parametrizations.weight.original0.mul_(2.0)
    assert not torch.equal(twin(x), net(x)), 'the weight still follows from its parts'


class Recurrent(nn.Module):
    """A whole network that runs twice in one forward, as recurrent and video networks do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Around(nn.Conv2d(4, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.net(x) - x)


@torch.no_grad()
def test_a_network_that_is_reused_in_one_forward() -> None:
    net, x = Recurrent(), torch.rand(IMAGE)
    wanted = net(x)
    once = trace(net.net)
    assert trace(net).macs == 2 * once.macs
    net, plan = calibrated(net, x, scope='all')
    assert len(plan.quantized) == 3
    assert 0 < (net(x) - wanted).std() < 0.1 * wanted.std()


@pytest.mark.parametrize('make', [
    lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2),
    lambda: nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2),
], ids=['convolution', 'transposed'])  # fmt: skip
def test_macs_where_bits_are_chosen_are_those_of_the_trace(make: Any) -> None:
    x = torch.rand(IMAGE)
    net = Around(make())
    net.last = nn.Conv2d(6, 3, 3, padding=1)
    wanted = {layer.name: layer.macs for layer in trace(net, IMAGE).layers}
    net, _ = calibrated(net, x, scope='all')
    inputs: Any = {name: layer.input_quantizer for name, layer in quant_layers(net).items()}
    ranges = {(name, offset): q.bounds(x) for name, q in inputs.items() for offset in OFFSETS}
    assert output_errors(net, [x], inputs, ranges)[1] == wanted
