"""MMagic's own tools from a shell, checkpoints of both hosts, two processes, and errors."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip('mmagic.utils', reason='MMagic is not installed (make env-mmagic)')

from mmagic.utils import register_all_modules
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from runs import train
from torch import nn

import basicsr_quant.mmagic  # noqa: F401
from basicsr_quant.errors import QuantError
from basicsr_quant.mmagic import messages
from basicsr_quant.mmagic.checkpoints import fit_checkpoint, save_network
from basicsr_quant.mmagic.generator import run_of
from basicsr_quant.mmagic.hooks import _refuse_test_sets
from basicsr_quant.models.checkpoint import read_network_file, save_network_file
from basicsr_quant.models.conventions import _basicsr_names
from basicsr_quant.network.surgery import floating_point

register_all_modules()
DefaultScope.get_instance('tests', scope_name='mmagic')
OPTIONS = Path(__file__).parents[2] / 'options' / 'mmagic'
TOOLS = Path(importlib.util.find_spec('mmagic').origin).parent / '.mim' / 'tools'  # type: ignore[union-attr, arg-type]


def run(*command: str, **environment: str) -> None:
    done = subprocess.run([sys.executable, *command], env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_tools_train_and_test_from_a_shell(config, tmp_path):
    file = tmp_path / 'config.py'
    Config(config(train_cfg={'max_iters': 2, 'val_interval': 2})).dump(str(file))
    run(str(TOOLS / 'train.py'), str(file))
    trained = tmp_path / 'work/net_g_latest.pth'
    assert read_network_file(str(trained)).plan.method == 'odm'  # read with weights_only=True
    run(str(TOOLS / 'test.py'), str(file), str(trained), '--work-dir', str(tmp_path / 'tested'))
    found = json.loads((tmp_path / 'tested/metrics.json').read_text())
    images = found['datasets']['Photos']['images']
    assert set(images) == {'coffee_0', 'coffee_1'} and all(image['psnr'] > 3 for image in images.values())
    assert found['datasets']['Photos']['fab'] == 4 and found['cost']['bitops'] > 0
    assert set(found['datasets']['Photos']['extra']) == {'PSNR'}
    assert found['checkpoint'] == str(trained) and len(found['plan']) == 8


def model_of(options):
    return MODELS.build(Config(options).model)


def randomized(model):
    """Every tensor another value, so that a tensor left out is seen."""
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    run_of(model.generator).calibration = {'feature_scale': 0.25, 'images': 3}
    return model


@pytest.mark.parametrize('skip', ['fp', 'quantized'])
@pytest.mark.parametrize('names', ['MMagic', 'BasicSR'])
def test_a_quantized_file_of_either_host_loads_whole(config, tmp_path, names, skip):
    quant = {'method': 'mse', 'w_bits': 8, 'a_bits': 8, 'scope': 'all', 'skip': skip}
    first, second, path = randomized(model_of(config(quant))), model_of(config(quant)), str(tmp_path / 'net_g.pth')
    run_of(first.generator).calibration['choices'] = {'layer_bits': {'upsample.0.upsample_conv': 1}}
    save_network(first, path)
    if names == 'BasicSR':
        theirs = {own: name for name, own in _basicsr_names(first.generator).items()}
        file = read_network_file(path)
        layers = tuple(dataclasses.replace(p, layer=theirs[f'{p.layer}.weight'][: -len('.weight')]) for p in file.plan)
        assert 'upsample.0' in {layer.layer for layer in layers}
        state = {theirs.get(key, key): tensor for key, tensor in file.states['params'].items()}
        tensors = tuple(
            dataclasses.replace(t, feeds=tuple(theirs[f'{name}.weight'][: -len('.weight')] for name in t.feeds))
            for t in file.plan.tensors
        )
        plan = dataclasses.replace(file.plan, layers=layers, tensors=tensors)
        choices = {'layer_bits': {'upsample.0': 1}}
        save_network_file(path, {'params': state}, plan, {**file.calibration, 'choices': choices})
    content = torch.load(path, weights_only=True)
    fit_checkpoint(second, content, path)
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[key]), key
        assert key not in content['state_dict'] or torch.equal(tensor, content['state_dict'][key])
    assert run_of(second.generator).has_ranges
    assert run_of(second.generator).calibration == run_of(first.generator).calibration


def test_a_file_of_another_plan_or_network_is_refused(config, tmp_path):
    path = str(tmp_path / 'net_g.pth')
    save_network(randomized(model_of(config())), path)
    other = model_of(config({'method': 'odm', 'w_bits': 3, 'a_bits': 4}))
    with pytest.raises(QuantError, match=r"layer 'body.0.conv1' at W4A4, the option file has it W3A4"):
        fit_checkpoint(other, torch.load(path, weights_only=True), path)
    pams = model_of(config({'method': 'pams', 'w_bits': 4, 'a_bits': 4}))
    with pytest.raises(QuantError, match=r"made with quant.method 'odm', the option file says 'pams'"):
        fit_checkpoint(pams, torch.load(path, weights_only=True), path)
    wider = config()
    wider['model']['generator']['generator']['mid_channels'] = 6
    with pytest.raises(QuantError, match='is not of this network'):
        fit_checkpoint(model_of(wider), torch.load(path, weights_only=True), path)


@pytest.mark.parametrize(
    ('quant', 'message'),
    [
        ({'method': 'odmm'}, "quant.method: 'odmm' given (did you mean 'odm'?)"),
        ({'method': 'odm', 'wbits': 4}, "quant.wbits is not an option (did you mean 'w_bits'?)"),
        ({'method': 'odm', 'w_bits': 4, 'layers': {'tail*': 'fp'}}, "quant.layers: 'tail*' matches no layer"),
    ],
)
def test_errors_are_those_of_basicsr(config, quant, message):
    with pytest.raises(QuantError) as raised:
        model_of(config(quant))
    assert message in str(raised.value)
    assert '\n' not in str(raised.value)


def test_a_forgotten_calibration_is_an_error_not_noise(config):
    with pytest.raises(QuantError, match='RangeCalibrationHook'):
        model_of(config()).generator(torch.zeros(1, 3, 8, 8))


@pytest.mark.parametrize('file', sorted(OPTIONS.glob('*.py')), ids=lambda file: file.stem)
def test_the_configs_build(file):
    options = Config.fromfile(str(file))
    if 'method' not in options.model.generator.quant:
        options.model.generator.quant.method = 'minmax'  # the file that the others inherit
    if options.model.generator.generator.type == 'SwinIRNet':
        options.model.generator.generator.update(depths=[1, 1], num_heads=[6, 6], embed_dim=12)
    else:
        options.model.generator.generator.update(num_blocks=1, mid_channels=4)
    net = MODELS.build(options.model).generator
    bits = 8 if 'w8a8' in file.stem else 4
    assert {(p.w_bits, p.a_bits) for p in run_of(net).plan.quantized} == {(bits, bits)}
    assert not any('upsample' in p.layer for p in run_of(net).plan.quantized)


def lmdb_of(folder: Path, target: Path) -> None:
    """A database as `tools/prepare_div2k.py` makes it."""
    lmdb = pytest.importorskip('lmdb')
    files = sorted(folder.glob('*.png'))
    with lmdb.open(str(target), map_size=2**24) as base, base.begin(write=True) as transaction:
        for file in files:
            transaction.put(file.stem.encode('ascii'), file.read_bytes())
    (target / 'meta_info.txt').write_text(''.join(f'{file.name} (24,24,3) 1\n' for file in files))


def test_the_lmdb_config_trains_through_mmengines_file_backend(config, photographs, tmp_path):
    options = Config.fromfile(str(OPTIONS / 'edsr_x4_w4a4_odm_lmdb.py'))
    dataset, calibration = options.train_dataloader.dataset, options.model.generator.quant.calibration.dataset
    assert calibration.data_prefix == dataset.data_prefix
    for kind, folder in (('img', 'lq'), ('gt', 'gt')):
        lmdb_of(photographs / 'train' / folder, tmp_path / dataset.data_prefix[kind])
    for part in (dataset, calibration):
        part.data_root = str(tmp_path)
        for loading in part.pipeline[:2]:
            loading.backend_args.db_path = str(tmp_path / dataset.data_prefix[loading.key])
    for transform in dataset.pipeline:  # the pictures are for x2
        transform.update({'SetValues': {'dictionary': {'scale': 2}}, 'PairedRandomCrop': {'gt_patch_size': 32}}.get(
            transform.type, {}))  # fmt: skip
    tiny = config(train_cfg={'max_iters': 2, 'val_interval': 9})
    tiny['model']['generator']['quant'] = {**options.model.generator.quant, 'calibration': {'dataset': calibration}}
    tiny['train_dataloader']['dataset'] = dataset
    runner = train(tiny)
    assert run_of(runner.model.generator).calibration['images'] == 6
    assert all(bool(p.isfinite().all()) for p in runner.model.parameters())


def test_a_mistake_is_one_sentence_without_a_traceback(capsys, monkeypatch):
    left = []
    monkeypatch.setattr(sys, 'excepthook', lambda *error: left.append(error))
    messages.install()
    hook = sys.excepthook
    messages.install()
    assert sys.excepthook is hook  # not twice
    hook(QuantError, QuantError('so it is'), None)
    assert capsys.readouterr().err == 'basicsr_quant: error: so it is\n' and not left
    hook(KeyError, KeyError('other'), None)
    assert [kind for kind, *_ in left] == [KeyError]


RANK = """
import os, sys, torch, torch.distributed as dist
import mmengine.model.wrappers.seperate_distributed as parts
from mmagic.utils import register_all_modules
from mmengine.config import Config
from mmengine.runner import Runner
register_all_modules()
wrapper = parts.MMDistributedDataParallel  # gets device_ids from the Runner, which torch refuses on the CPU
parts.MMDistributedDataParallel = lambda module, device_ids=None, **rest: wrapper(module=module, **rest)
dist.init_process_group('gloo')
for file in sys.argv[1:]:
    runner = Runner.from_cfg(Config.fromfile(file))
    runner.train()
    torch.save(runner.model.module.state_dict(), f'{file}.{dist.get_rank()}.pth')
dist.destroy_process_group()
"""


def test_two_processes_end_with_equal_ranges_and_weights(config, tmp_path):
    """Under the wrapper of the whole model, and under that of each part, which the configs of options/mmagic name."""
    small = {'crop': True, 'train_cfg': {'max_iters': 2, 'val_interval': 9}, 'train_dataloader': {'batch_size': 1}}
    whole = {'type': 'MMDistributedDataParallel', 'broadcast_buffers': False, 'device_ids': None}
    parts = Config.fromfile(str(OPTIONS / 'edsr_x4_quantized.py')).model_wrapper_cfg
    cadyq = {'method': 'cadyq', 'w_bits': 8, 'a_bits': 8}
    files = []
    for number, (wrapper, quant) in enumerate(((whole, None), (parts, cadyq))):
        options = {**config(quant, **small), 'model_wrapper_cfg': wrapper, 'launcher': 'pytorch'}
        files.append(str(tmp_path / f'config{number}.py'))
        Config({**options, 'experiment_name': f'ranks{number}'}).dump(files[-1])
    common = {**os.environ, 'WORLD_SIZE': '2', 'MASTER_ADDR': '127.0.0.1', 'MASTER_PORT': '29533'}
    ranks = [
        subprocess.Popen(
            [sys.executable, '-c', RANK, *files],
            env={**common, 'RANK': str(rank), 'LOCAL_RANK': str(rank)}, stderr=subprocess.PIPE, text=True,
        )
        for rank in (0, 1)
    ]  # fmt: skip
    for process in ranks:
        _, errors = process.communicate(timeout=480)
        assert process.returncode == 0, errors[-3000:]
    for file in files:
        first, second = (torch.load(f'{file}.{rank}.pth', weights_only=True) for rank in (0, 1))
        assert any(key.endswith('.unit') for key in first)
        for key in first:
            assert torch.equal(first[key], second[key]), key


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.body = nn.Sequential(*(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4)) for _ in range(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.body(self.first(x)))  # type: ignore[no-any-return]


def test_batch_norms_of_the_averaged_copy_are_folded_as_it_is_loaded(tmp_path):
    """Each network's own statistics go into its own convolutions."""
    MODELS.register_module(module=Normalized, force=True)
    quant = {'method': 'minmax', 'w_bits': 8, 'a_bits': 8, 'fold_bn': True, 'layers': {'body*': {'w_bits': 8}}}
    model = nn.Module()
    fp32, state = {}, {}
    for name in ('generator', 'generator_ema'):
        fp32[name] = randomize(Normalized())
        state.update({f'{name}.{key}': value for key, value in fp32[name].state_dict().items()})
        setattr(model, name, MODELS.build(
            {'type': 'QuantizedNetwork', 'generator': {'type': 'Normalized'}, 'quant': quant}))  # fmt: skip
    fit_checkpoint(model, {'state_dict': state}, 'file.pth')
    image = torch.rand(1, 3, 8, 8)
    for name, net in fp32.items():
        ours = getattr(model, name)
        assert not any('running_mean' in key for key in ours.state_dict())
        with torch.no_grad(), floating_point(ours):
            torch.testing.assert_close(ours.eval()(image), net.eval()(image), rtol=1e-4, atol=1e-4)


def randomize(net: nn.Module) -> nn.Module:
    for tensor in net.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.5, 1.5)
    return net


@pytest.mark.parametrize(
    ('mine', 'theirs', 'refused'),
    [('', '', True), ('a.txt', 'a.txt', True), ('', 'b.txt', True), ('a.txt', '', True), ('a.txt', 'b.txt', False)],
)
def test_calibration_on_a_test_set_is_refused(mine, theirs, refused):
    def dataset(files):
        return {'data_root': 'data/DIV2K', 'data_prefix': {'img': 'LR', 'gt': 'HR'}, 'ann_file': files}

    runner = SimpleNamespace(cfg={'test_dataloader': [{'dataset': dataset(theirs)}]})
    expected = pytest.raises(QuantError, match=r'data/DIV2K/LR.* which is a data set of test_dataloader')
    with expected if refused else contextlib.nullcontext():
        _refuse_test_sets(runner, dataset(mine))
    _refuse_test_sets(runner, {**dataset(mine), 'data_root': 'elsewhere'})
