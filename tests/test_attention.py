"""Matrix products inside a module's own forward: what is quantized, what stays, and that nothing else changes."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from basicsr_quant import compat
from basicsr_quant.config import read_config
from basicsr_quant.cost import cost
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import method_of, quantize
from basicsr_quant.network.plan import Plan
from basicsr_quant.network.surgery import floating_point, quant_layers
from basicsr_quant.network.trace import trace


class Attention(nn.Module):
    """softmax(q k^T) v over pixels."""

    def __init__(self, form: str = 'plain') -> None:
        super().__init__()
        self.qkv, self.proj, self.form = nn.Linear(4, 12), nn.Linear(4, 4), form

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        return torch.matmul(q, k.transpose(-2, -1)) if self.form == 'helper' else q @ k.transpose(-2, -1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        if self.form == 'fused':
            mixed = functional.scaled_dot_product_attention(q, k, v)
        elif self.form == 'bmm':
            mixed = torch.bmm(torch.bmm(q, k.transpose(-2, -1)).softmax(-1), v)
        else:
            mixed = self.scores(q, k).softmax(-1) @ v
        return self.proj(mixed).transpose(1, 2).reshape(x.shape)


class Block(nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.attn = Attention(form)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(x)


class Net(nn.Module):
    def __init__(self, form: str = 'plain') -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.body = nn.Sequential(Block(form), Block(form))
        self.last = nn.Conv2d(4, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.body(self.first(x)))


def network(form: str = 'plain') -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    return Net(form).eval(), torch.rand(1, 3, 6, 6)


def quantized(net: nn.Module, x: Tensor, **block: Any) -> Plan:
    plan = read_config({'method': 'minmax', 'attention': True, **block}).plan(net, trace(net))
    quantize(net, plan)
    method_of(plan).calibrate(net, [x])
    return plan


OPERANDS = [f'body.0.attn.quant_products.{i}.{side}' for i in (0, 1) for side in ('left', 'right')]


@pytest.mark.parametrize('form', ['plain', 'helper', 'bmm'])
@torch.no_grad()
def test_the_operands_of_each_product_are_quantized(form: str) -> None:
    net, x = network(form)
    wanted, names, original = net(x), list(net.state_dict()), copy.deepcopy(net)
    plan = quantized(net, x)
    layers = ['body.0.attn.qkv', 'body.0.attn.proj']
    assert [n for n in quant_layers(net) if n.startswith('body.0')] == [*layers, *OPERANDS]
    assert isinstance(net.body[0].attn, Attention)
    assert [k for k in net.state_dict() if 'quantizer' not in k] == names
    got = net(x)
    assert 0 < (got - wanted).std() < 0.05 * wanted.std()
    with floating_point(net):
        assert torch.equal(net(x), wanted)
    assert torch.equal(original(x), wanted) and not quant_layers(original)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # noqa: S301
        assert torch.equal(twin(x), got)
        assert twin.body[0].attn.quant_products[0] is not net.body[0].attn.quant_products[0]
    assert Plan.from_plain(plan.to_plain()) == plan


@torch.no_grad()
def test_closed_form() -> None:
    """softmax(Q(q) Q(k)^T), Q of it, times Q(v), with the quantizers called by hand."""
    net, x = network()
    quantized(net, x, w_bits=3, a_bits=3)
    attn = net.body[0].attn
    features = torch.rand(1, 4, 6, 6)
    q, k, v = attn.qkv(features.flatten(2).transpose(1, 2)).chunk(3, dim=-1)
    ((ql, qr), (pl, pr)) = [(p.left.input_quantizer, p.right.input_quantizer) for p in attn.quant_products]
    mixed = pl((ql(q) @ qr(k.transpose(-2, -1))).softmax(-1)) @ pr(v)
    assert torch.equal(attn(features), attn.proj(mixed).transpose(1, 2).reshape(features.shape))


def test_plan_says_which_operand_cannot_be_negative_and_cost_counts_products() -> None:
    net, x = network()
    plan = quantized(net, x, w_bits=4, a_bits=4)
    rows = {row.layer: row for row in plan}
    assert rows['body.0.attn'].operands == (False, False, True, False), 'the third is the softmax output'
    assert rows['body.0.attn'].why == 'attention: true'
    found = {row.layer: row for row in cost(net, plan, scale=1).layers}
    assert found['body.0.attn'].bitops == found['body.0.attn'].macs * 16
    before = {layer.name: layer.macs for layer in trace(network()[0]).functional}
    assert {layer.name: layer.macs for layer in trace(net).functional} == before


@pytest.mark.parametrize(('block', 'layers'), [
    ({}, ['body.0.attn', 'body.1.attn']),
    ({'attention': False}, []),
    ({'layers': {'*attn.*': 'fp'}, 'scope': 'all'}, []),
    ({'layers': {'body.0.attn': 'fp'}}, ['body.1.attn']),
    ({'layers': {'first': 'fp', 'last': 'fp'}, 'scope': 'all'}, ['body.0.attn', 'body.1.attn']),
])  # fmt: skip
def test_switches(block: dict[str, Any], layers: list[str]) -> None:
    net, x = network()
    plan = quantized(net, x, **block)
    assert [row.layer for row in plan.quantized if row.operands] == layers


@pytest.mark.parametrize('method', ['minmax', 'percentile', 'mse', 'lsq', 'pams', 'odm'])
def test_methods_train_through_products(method: str) -> None:
    net, x = network()
    quantized(net, x, method=method, w_bits=4, a_bits=4)
    net.train()
    net(x).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters() if p.requires_grad)


def test_refusals() -> None:
    net, x = network('fused')
    plan = quantized(net, x)
    assert all('cannot be quantized: it does more than' in row.why for row in plan if row.type == 'Attention')
    assert not any('quant_products' in name for name in quant_layers(net))
    net, x = network()
    with pytest.raises(QuantError, match=r"quant\.attention: true given, but method 'daq'.*'body\.0\.attn'"):
        quantized(net, x, method='daq', layers={'*attn.*': 'fp', '*attn': {'a_bits': 4}}, scope='all')


@pytest.mark.slow
@torch.no_grad()
def test_compiled() -> None:
    net, x = network()
    quantized(net, x)
    torch._dynamo.reset()
    assert (torch.compile(net, backend='aot_eager')(x) - net(x)).abs().max() < 0.02


@pytest.mark.slow
def test_swinir_under_the_command(
    tmp_path: Path, options: Any, option_file: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not compat.has_host():
        pytest.skip('BasicSR is not installed')
    compat.apply()
    from basicsr.archs import build_network

    from basicsr_quant.cli import main

    monkeypatch.chdir(tmp_path)
    del options['datasets']['train']
    options['model_type'] = 'SwinIRModel'
    options['network_g'] = {
        'type': 'SwinIR', 'img_size': 16, 'embed_dim': 8, 'depths': [2], 'num_heads': [2], 'window_size': 8,
        'mlp_ratio': 2, 'upscale': 2, 'upsampler': 'pixelshuffledirect',
    }  # fmt: skip
    torch.save({'params': build_network(copy.deepcopy(options['network_g'])).state_dict()}, tmp_path / 'net.pth')
    options['path'] = {'pretrain_network_g': str(tmp_path / 'net.pth')}
    shutil.copytree(options['datasets']['val']['dataroot_lq'], tmp_path / 'others')
    lq = {'type': 'SingleImageDataset', 'dataroot_lq': str(tmp_path / 'others'), 'io_backend': {'type': 'disk'}}
    options['quant'] = {'method': 'minmax', 'attention': True, 'calibration': {'num_images': 2, 'dataset': lq}}
    figures = []
    for command in ('calibrate', 'test'):
        assert main([command, '-opt', option_file(options)]) == 0
        figures.append(json.loads((tmp_path / 'results/tiny/metrics.json').read_text())['datasets']['Val']['psnr'])
    assert figures[0] == figures[1] > 0
    capsys.readouterr()
    assert main(['plan', '-opt', option_file(options)]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if 'WindowAttention' in line)
    assert row.split()[-2:] == ['attention:', 'true']
    options['quant']['attention'] = False
    assert main(['test', '-opt', option_file(options)]) == 2
    assert 'WindowAttention' not in capsys.readouterr().out
