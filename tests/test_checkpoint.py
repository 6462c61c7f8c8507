"""Network files as people have them: what loads, what is refused, and in which words."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from basicsr_quant import compat
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import quantize, settings_of
from basicsr_quant.network.plan import LayerPlan, Plan

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')


@pytest.fixture(autouse=True)
def host() -> None:
    compat.apply()


def network() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1))


def plan(bits: int = 4, method: str = 'minmax', layer: str = '1', **settings: Any) -> Plan:
    return Plan(method, (LayerPlan(layer, 'Conv2d', bits, bits, 'body'),), settings_of(method, **settings))


def saved(folder: Path, content: Any) -> Any:
    from basicsr_quant.models.checkpoint import read_network_file

    torch.save(content, folder / 'net.pth')
    return read_network_file(str(folder / 'net.pth'))


STATE = network().state_dict()
PARALLEL = {f'module.{k}': v for k, v in STATE.items()}
LOADS: dict[str, tuple[Any, str | None, str | None]] = {
    'params': ({'params': STATE}, 'params', 'params'),
    'params_ema asked for': ({'params': {}, 'params_ema': STATE}, 'params_ema', 'params_ema'),
    'params stand in': ({'params': STATE}, 'params_ema', 'params'),
    'bare state dict': (STATE, 'params', None),
    'bare, param_key_g: ~': (STATE, None, None),
    'data parallel': ({'params': PARALLEL}, 'params', 'params'),
}


@pytest.mark.parametrize('case', LOADS)
@pytest.mark.parametrize('quantized', [False, True])
def test_fp32_files_load(case: str, quantized: bool, tmp_path: Path) -> None:
    from basicsr_quant.models.checkpoint import load_state

    content, key, found = LOADS[case]
    net = network()
    if quantized:
        quantize(net, plan())
    file = saved(tmp_path, content)
    assert file.plan is None and file.state(key)[0] == found
    load_state(net, file, key)
    own = net.state_dict()
    assert all(torch.equal(own[k], v) for k, v in STATE.items())


MORE = {**STATE, '3.weight': torch.ones(1)}
LESS = {k: v for k, v in STATE.items() if k != '2.bias'}
WIDER = {**STATE, '1.weight': torch.ones(4, 5, 3, 3)}
REFUSED: dict[str, tuple[Any, str, str]] = {
    'a tensor too many': ({'params': MORE}, 'params', "1 tensors are unknown to the network, '3.weight' first"),
    'a tensor missing': ({'params': LESS}, 'params', "1 tensors are missing in the file, '2.bias' first"),
    'another size': ({'params': WIDER}, 'params', "'1.weight' is (4, 5, 3, 3) in the file and (4, 4, 3, 3)"),
    'no such entry': ({'params_ema': STATE}, 'params', "no entry 'params'"),
}


@pytest.mark.parametrize('case', REFUSED)
def test_other_networks_are_refused(case: str, tmp_path: Path) -> None:
    from basicsr_quant.models.checkpoint import load_state

    content, key, words = REFUSED[case]
    net = network()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(QuantError) as error:
        load_state(net, saved(tmp_path, content), key)
    assert words in str(error.value) and 'net.pth' in str(error.value)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_not_strict_takes_what_fits(tmp_path: Path) -> None:
    from basicsr_quant.models.checkpoint import load_state

    net = network()
    load_state(net, saved(tmp_path, {'params': {**WIDER, 'x': torch.ones(1)}}), 'params', strict=False)
    assert torch.equal(net.state_dict()['0.weight'], STATE['0.weight'])


def test_a_quantized_file_loads_whole_or_not_at_all(tmp_path: Path) -> None:
    from basicsr_quant.models.checkpoint import load_state, read_network_file, save_network_file

    net = quantize(network(), plan())
    path = str(tmp_path / 'net.pth')
    save_network_file(path, {'params': net.state_dict()}, plan(), {'feature_scale': 0.5})
    file = read_network_file(path)
    assert file.plan == plan() and file.calibration == {'feature_scale': 0.5}
    load_state(quantize(network(), plan()), file, 'params')
    broken = {k: v for k, v in net.state_dict().items() if not k.endswith('upper')}
    save_network_file(path, {'params': broken}, plan(), {})
    with pytest.raises(QuantError, match='missing in the file'):
        load_state(quantize(network(), plan()), read_network_file(path), 'params')


@pytest.mark.parametrize(('ours', 'words'), [
    (plan(8), "layer '1' at W4A4, the option file has it W8A8"),
    (plan(layer='0'), "layer '1' at W4A4, the option file has it in floating point"),
    (plan(method='mse'), "quant.method 'minmax'"),
    (plan(w_granularity='channel'), 'quant.w_granularity'),
    (plan(zero_point='float'), 'quant.zero_point'),
])  # fmt: skip
def test_plans_are_compared(ours: Plan, words: str, tmp_path: Path) -> None:
    from basicsr_quant.models.checkpoint import compare_plans, read_network_file, save_network_file

    path = str(tmp_path / 'net.pth')
    save_network_file(path, {'params': quantize(network(), plan()).state_dict()}, plan(), {})
    with pytest.raises(QuantError) as error:
        compare_plans(read_network_file(path), ours)
    assert words in str(error.value)


@pytest.mark.parametrize(('write', 'words'), [
    (lambda p: p.write_bytes(b'PK broken'), 'cannot be read as a checkpoint'),
    (lambda p: torch.save([1, 2], p), 'holds a list'),
    (lambda p: torch.save({'epoch': 3}, p), 'holds no network; its entries are: epoch'),
    (lambda p: None, 'there is no checkpoint'),
])  # fmt: skip
def test_files_that_are_none(write: Any, words: str, tmp_path: Path) -> None:
    from basicsr_quant.models.checkpoint import read_network_file

    write(tmp_path / 'net.pth')
    with pytest.raises(QuantError) as error:
        read_network_file(str(tmp_path / 'net.pth'))
    assert words in str(error.value) and '\n' not in str(error.value)
