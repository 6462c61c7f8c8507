"""``basicsr prune`` as a user runs it: the smaller network is tested, trained, quantized and pruned again."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

pytest.importorskip('torch_pruning', reason='torch-pruning is not installed')

from basicsr_quant import compat
from basicsr_quant.cli import main

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')

NETWORK = {'type': 'SRResNetBN', 'num_feat': 8, 'num_block': 2, 'upscale': 2}


@pytest.fixture
def pruned(
    options: dict[str, Any], option_file: Any, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> tuple[Path, dict[str, Any], str]:
    """A tiny network, trained and pruned: its option file, what that holds, and what was printed."""
    monkeypatch.chdir(tmp_path)
    options = {**copy.deepcopy(options), 'network_g': NETWORK}
    options.pop('quant', None)
    assert main(['train', '-opt', option_file({**options, 'name': 'whole'})]) == 0
    options['path'] = {'pretrain_network_g': 'experiments/whole/models/net_g_latest.pth', 'strict_load_g': True}
    options['sparsity'] = {'method': 'bn_filter', 'ratio': 0.5, 'ranking': 'layer'}
    assert main(['prune', '-opt', option_file(options), '--onnx', 'smaller.onnx']) == 0
    file = Path(f'experiments/{options["name"]}/{options["name"]}_pruned.yml')
    return file, yaml.safe_load(file.read_text()), capsys.readouterr().out


def test_pruned_networks_go_through_every_command(pruned: Any, images: Path, option_file: Any) -> None:
    file, options, said = pruned
    assert '8 of 16 prunable filters (50.0%) taken out' in said and str(file) in said
    assert options['network_g'] == {
        'type': 'PrunedNetwork', 'base': NETWORK, 'widths': {'body.0.conv1': 4, 'body.1.conv1': 4},
    }  # fmt: skip
    assert 'sparsity' not in options
    state = torch.load(options['path']['pretrain_network_g'], weights_only=True)['params']
    assert state['body.0.conv1.weight'].shape == (4, 8, 3, 3) and state['body.0.conv2.weight'].shape == (8, 4, 3, 3)

    assert main(['test', '-opt', str(file)]) == 0
    smaller = json.loads(Path(f'results/{options["name"]}/metrics.json').read_text())
    assert main(['train', '-opt', str(file)]) == 0
    calibration = {'num_images': 2, 'dataset': {'dataroot_lq': str(images / 'lq.lmdb'), 'io_backend': {'type': 'lmdb'}}}
    block = {'method': 'mse', 'w_bits': 8, 'a_bits': 8, 'calibration': calibration}
    assert main(['calibrate', '-opt', option_file({**options, 'quant': block, 'name': 'both'})]) == 0
    both = json.loads(Path('results/both/metrics.json').read_text())
    assert both['cost']['weight_bytes'] < smaller['cost']['weight_bytes']

    again = {**options, 'sparsity': {'method': 'magnitude', 'ratio': 0.5, 'ranking': 'layer'}, 'name': 'again'}
    assert main(['prune', '-opt', option_file(again)]) == 0
    network = yaml.safe_load(Path('experiments/again/again_pruned.yml').read_text())['network_g']
    assert network['base'] == NETWORK and network['widths']['body.0.conv1'] == 2


def test_the_onnx_file_needs_no_package_of_ours(pruned: Any) -> None:
    engine = pytest.importorskip('onnxruntime')
    from basicsr_quant.models.checkpoint import load_state, read_network_file
    from basicsr_quant.models.preparation import build_float

    _, options, _ = pruned
    net = build_float(options['network_g']).eval()
    load_state(net, read_network_file(options['path']['pretrain_network_g']), 'params')
    image = torch.rand(1, 3, 20, 17)
    found = engine.InferenceSession('smaller.onnx').run(None, {'input': image.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(found), net(image).detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ('change', 'said'),
    [
        ({'sparsity': {'method': 'sls'}}, "'sls' masks weights while it trains; run `basicsr train`"),
        ({'sparsity': None}, 'sparsity.method is missing'),
        ({'path': {}}, 'path.pretrain_network_g is missing'),
        ({'path': {'pretrain_network_g': 'nothing.pth'}}, 'nothing.pth'),
    ],
)
def test_what_cannot_be_pruned_is_one_sentence(
    change: dict[str, Any], said: str, options: dict[str, Any], option_file: Any, tmp_path: Path, monkeypatch: Any,
    capsys: Any,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    given = {**options, 'network_g': NETWORK, 'sparsity': {'method': 'bn_filter'}, **change}
    assert main(['prune', '-opt', option_file(given)]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count('\n') == 1
    assert not Path('experiments').exists()
