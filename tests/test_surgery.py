"""Applying a plan: what changes in a network, and everything that must not."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from helpers import BODY, Tiny, assert_close, images, plan_of, quantized, tiny
from torch import nn

from basicsr_quant import compat
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import method_of, quantize
from basicsr_quant.network.plan import LayerPlan, Plan
from basicsr_quant.network.planning import LayerRule, PlanRequest, make_plan
from basicsr_quant.network.surgery import apply_plan, floating_point, quant_layers, quantizers
from basicsr_quant.nn import QuantConv2d
from basicsr_quant.quantizers import LearnedRange, MaxAbsWeight, QuantContext

METHODS = ['minmax', 'percentile', 'mse', 'lsq', 'pams', 'odm', 'odm_v1']


# ----------------------------------------------------------------------------------------------------- what stays as is


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('granularity', ['tensor', 'channel'])
def test_class_names_and_values_stay_and_quantizers_are_all_that_is_new(method, granularity):
    net, original = quantized(method, w_granularity=granularity), tiny()
    assert type(net) is Tiny
    state, before = net.state_dict(), original.state_dict()
    assert [k for k in state if 'quantizer' not in k] == list(before)
    assert all(torch.equal(state[k], v) for k, v in before.items())
    assert all(k.rsplit('.', 2)[0] in BODY for k in state if 'quantizer' in k)
    assert list(quant_layers(net)) == BODY
    assert list(quantizers(net)) == [f'{n}.{q}' for n in BODY for q in ('input_quantizer', 'weight_quantizer')]


@pytest.mark.parametrize('method', METHODS)
def test_in_floating_point_the_output_is_the_originals_to_the_bit(method):
    net, original, x = quantized(method, bits=2), tiny(), images()
    method_of(plan_of(tiny(), method, 2, BODY[1::2])).calibrate(net, [x])
    wanted = original(x)
    assert not torch.equal(net(x), wanted)
    with floating_point(net):
        assert torch.equal(net(x), wanted)
        with floating_point(net):
            pass
        assert torch.equal(net(x), wanted), 'an inner context must not switch the quantizers on'
    assert not torch.equal(net(x), wanted)
    with pytest.raises(KeyError), floating_point(net):
        raise KeyError
    assert all(q.enabled for q in quantizers(net).values())


def test_layers_in_floating_point_stay_the_objects_they_were():
    net = tiny()
    before = dict(net.named_modules())
    weights = {n: m.weight for n, m in before.items() if n in BODY}
    quantize(net, plan_of(net, layers={'body.0.conv1': LayerRule(32, 32), 'body.0.conv2': LayerRule(4, 32)}))
    after = dict(net.named_modules())
    for name, module in before.items():
        replaced = name in BODY and name != 'body.0.conv1'
        assert (after[name] is module) != replaced
    assert all(after[n].weight is weights[n] for n in BODY), 'an optimizer built before must keep its parameters'
    half = after['body.0.conv2']
    assert isinstance(half.input_quantizer, nn.Identity) and len(half.quantizers()) == 1


@pytest.mark.parametrize('training', [True, False])
def test_training_flag_requires_grad_and_hooks_stay(training):
    net, calls = tiny(), []
    layer = net.body[0].conv2
    layer.register_forward_hook(lambda *_: calls.append('forward'))
    layer.register_full_backward_hook(lambda *_: calls.append('backward'))
    layer.weight.requires_grad_(False)
    layer.note = 'mine'
    net.train(training)
    quantize(net, plan_of(net))
    twin = net.body[0].conv2
    assert isinstance(twin, QuantConv2d) and twin.note == 'mine'
    assert not twin.weight.requires_grad and twin.bias.requires_grad
    assert all(m.training == training for m in net.modules() if 'quantizer' not in type(m).__module__)
    net(images()).sum().backward()
    assert calls == ['forward', 'backward']


def test_old_weight_norm_still_reparametrizes():
    net = tiny()
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(net.body[0].conv1)
    before = net(images())
    quantize(net, plan_of(net))
    with floating_point(net):
        assert torch.equal(net(images()), before)
        with torch.no_grad():
            net.body[0].conv1.weight_g.mul_(2.0)
        assert not torch.equal(net(images()), before)


def test_shared_modules_stay_shared():
    net = tiny()
    net.body[1] = net.body[0]
    net.again = net.body[0].conv2
    quantize(net, plan_of(net))
    assert list(quant_layers(net)) == ['body.0.conv1', 'body.0.conv2']
    assert net.body[1] is net.body[0] and net.again is net.body[0].conv2
    assert isinstance(net.again, QuantConv2d)


def test_a_tied_weight_stays_tied():
    net = tiny()
    net.body[1].conv1.weight = net.body[0].conv1.weight
    quantize(net, plan_of(net))
    assert net.body[1].conv1.weight is net.body[0].conv1.weight
    assert net.body[1].conv1.weight_quantizer is not net.body[0].conv1.weight_quantizer


def test_ema_by_name_still_works():
    """BasicSR averages parameters by name between the network and its copy."""
    net, copied = quantized(), quantized(seed=1)
    ours, theirs = dict(net.named_parameters()), dict(copied.named_parameters())
    assert ours.keys() == theirs.keys()
    for key in ours:
        theirs[key].data.mul_(0.9).add_(ours[key].data, alpha=0.1)
    assert copied(images()).isfinite().all()


# --------------------------------------------------------------------------------------------- copies, files, contexts


def same_context(net):
    contexts = {id(q.context) for q in quantizers(net).values()}
    return len(contexts) == 1 and contexts == {id(net._quant_context)}


@pytest.mark.parametrize('how', ['deepcopy', 'torch.save'])
@pytest.mark.parametrize('method', METHODS)
def test_copies_compute_the_same_with_a_context_of_their_own(method, how):
    net, x = quantized(method), images()
    net(x)
    if how == 'deepcopy':
        twin = copy.deepcopy(net)
    else:
        file = io.BytesIO()
        torch.save(net, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
        assert twin._quant_context.input is None, 'an image has no business in a file'
    assert same_context(net) and same_context(twin) and twin._quant_context is not net._quant_context
    assert torch.equal(twin(x), net(x))
    image = images(seed=9)
    twin(image)
    assert twin._quant_context.input is image and net._quant_context.input is x
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
    assert not torch.equal(twin(x), net(x))


@pytest.mark.parametrize('call', [lambda n, x: n(x), lambda n, x: n(x=x)], ids=['by position', 'by name'])
def test_the_context_begins_once_per_pass(call):
    net, begun, measured = quantized(), [], []

    def measure(context):
        context.measure('mean', lambda x: measured.append(x) or x.mean())

    original = net._quant_context.begin
    net._quant_context.begin = lambda x: (begun.append(x), original(x))
    for layer in quant_layers(net).values():
        layer.register_forward_pre_hook(lambda *_: measure(net._quant_context))
    for count in (1, 2):
        x = images(seed=count)
        call(net, x)
        assert len(begun) == len(measured) == count and begun[-1] is measured[-1] is x


def test_an_inner_module_may_run_on_its_own():
    net = quantized()
    assert net.body(torch.randn(1, 4, 8, 8)).shape == (1, 4, 8, 8)
    assert net._quant_context.input is None


# ------------------------------------------------------------------------------------------------ plans that do not fit


@pytest.mark.parametrize(
    ('layer', 'type_', 'message'),
    [
        ('body.7.conv1', 'Conv2d', "'body.7.conv1', which this network does not have"),
        ('body.0.conv1', 'Linear', "'body.0.conv1' as a Linear, in this network it is a Conv2d"),
        ('body.0', 'Conv2d', "'body.0' as a Conv2d, in this network it is a Block"),
        ('', 'Conv2d', 'the network is one layer, a Conv2d'),
    ],
)
def test_a_plan_of_another_network_is_refused_before_anything_changes(layer, type_, message):
    net = tiny()
    plan = Plan('odm', (LayerPlan('body.0.conv2', 'Conv2d', 4, 4), LayerPlan(layer, type_, 4, 4)))
    with pytest.raises(QuantError, match=message):
        apply_plan(net, plan, lambda *_: LearnedRange(4), lambda *_: MaxAbsWeight(4))
    assert not quant_layers(net) and not hasattr(net, '_quant_context') and not net._forward_pre_hooks


def test_a_network_is_not_quantized_twice():
    net = tiny()
    plan = plan_of(net)
    quantize(net, plan)
    with pytest.raises(QuantError, match='in this network it is a QuantConv2d'):
        quantize(net, plan)


@pytest.mark.parametrize('layer', [nn.Conv2d(3, 3, 1), nn.Linear(3, 3)])
def test_a_network_that_is_one_layer_is_refused(layer):
    plan = make_plan(layer, PlanRequest('odm', 4, 4, scope='all'))
    with pytest.raises(QuantError, match='one layer'):
        apply_plan(layer, plan, lambda *_: LearnedRange(4), lambda *_: MaxAbsWeight(4))


# ----------------------------------------------------------------------------------------------------- in other company


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
def test_a_network_of_another_dtype(dtype):
    net = quantized().to(dtype)
    x = images().to(dtype)
    y = net(x)
    assert y.dtype == dtype
    y.sum().backward()
    assert all(p.grad.dtype == dtype for n, p in net.named_parameters())


@pytest.mark.parametrize('method', ['odm', 'lsq', 'pams'])
def test_under_autocast(method):
    net, x = quantized(method), images()
    method_of(plan_of(tiny(), method, 4, BODY[1::2])).calibrate(net, [x])
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = net(x)
    y.float().sum().backward()
    assert_close(y.float(), net(x), rtol=0.1, atol=0.1)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize('method', ['odm', 'lsq', 'pams', 'minmax'])
def test_compiled_equals_eager(method):
    net, x = quantized(method), images()
    method_of(plan_of(tiny(), method, 4, BODY[1::2])).calibrate(net, [x])
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(net), backend='aot_eager')
    for model in (net, compiled):
        model(x).square().sum().backward()
    # A value near the middle of two codes may fall to either side, and its layers' gradients with it.
    assert_close(compiled(x), net(x), rtol=1e-3, atol=1e-3)
    for (name, ours), theirs in zip(net.named_parameters(), compiled.parameters()):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            assert_close(theirs.grad, ours.grad, rtol=1e-2, atol=1e-2 * float(ours.grad.abs().max() + 1e-6))


@pytest.mark.parametrize('kind', ['EDSR', 'MSRResNet', 'RCAN', 'RRDBNet', 'SRVGGNetCompact', 'SwinIR'])
def test_host_networks_keep_class_names_and_output(kind):
    if not compat.has_host():
        pytest.skip('BasicSR is not installed')
    compat.apply()
    from basicsr.archs import build_network

    options = {
        'EDSR': {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_block': 1, 'upscale': 2},
        'MSRResNet': {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_block': 1, 'upscale': 2},
        'RCAN': {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_group': 1, 'num_block': 1, 'squeeze_factor': 2},
        'RRDBNet': {'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 4, 'num_block': 1, 'num_grow_ch': 4},
        'SRVGGNetCompact': {'num_feat': 4, 'num_conv': 2},
        'SwinIR': {'img_size': 16, 'embed_dim': 6, 'depths': [1], 'num_heads': [2], 'window_size': 8, 'mlp_ratio': 2,
                   'upscale': 2, 'upsampler': 'pixelshuffle'},
    }[kind]  # fmt: skip
    net = build_network({'type': kind, **options}).eval()
    original, x = copy.deepcopy(net), images(1, 16)
    plan = plan_of(net, 'odm', 2, scope='all')
    quantize(net, plan)
    method_of(plan).calibrate(net, [x])
    assert type(net) is type(original)
    assert [k for k in net.state_dict() if 'quantizer' not in k] == list(original.state_dict())
    assert len(quant_layers(net)) == len(plan.quantized) > 2
    with torch.no_grad():
        assert not torch.equal(net(x), original(x)) and net(x).isfinite().all()
        with floating_point(net):
            assert torch.equal(net(x), original(x))
    assert isinstance(net._quant_context, QuantContext)
