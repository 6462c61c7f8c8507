"""Training under MMEngine's own Runner: ranges, learning rates, resuming, averaging, accumulation."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip('mmagic.utils', reason='MMagic is not installed (make env-mmagic)')

from mmagic.utils import register_all_modules
from mmengine.runner import Runner
from runs import runner_of, scalars, train

from basicsr_quant.errors import QuantError
from basicsr_quant.methods import METHODS
from basicsr_quant.mmagic import RangeCalibrationHook
from basicsr_quant.mmagic.generator import quantized_networks, run_of
from basicsr_quant.network.masking import masks
from basicsr_quant.network.surgery import quantizers

register_all_modules()


def state(runner: Runner) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in runner.model.state_dict().items()}


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for key in first:
        torch.testing.assert_close(first[key], second[key], rtol=0, atol=0, msg=lambda text, key=key: f'{key}: {text}')


def test_the_inner_network_keeps_its_class_and_names(config):
    options = config()
    runner = runner_of(options)
    net = runner.model.generator
    assert type(net).__name__ == 'EDSRNet'
    fp32 = {k for k in net.state_dict() if not k.startswith(tuple(f'{q}.' for q in quantizers(net)))}
    assert {'conv_first.weight', 'body.1.conv2.bias', 'upsample.0.upsample_conv.weight'} < fp32
    body = [f'body.{i}.conv{j}' for i in (0, 1) for j in (1, 2)]
    assert [layer.layer for layer in run_of(net).plan.quantized] == body


@pytest.mark.parametrize('method', sorted(set(METHODS) - {'none', 'cfqp'}))  # cfqp wants a clip at the end
def test_every_method_trains(config, method):
    bits = 8 if method == 'cadyq' else 4
    quant = {'method': method, 'w_bits': bits, 'a_bits': bits}
    quant.update({'auto': {'auto': {'budget': 1}}, 'adabm': {'adabm': {'epochs': 0}}}.get(method, {}))
    runner = train(config(quant, train_cfg={'max_iters': 2, 'val_interval': 2}))
    net = runner.model.generator
    assert run_of(net).calibration['feature_scale'] > 0
    assert all(bool(p.isfinite().all()) for p in net.parameters())
    assert any(bool(q.calibrated) for q in quantizers(net).values())


def test_ranges_train_ten_times_as_fast_by_the_methods_groups(config):
    runner = runner_of(config())
    wrapper = runner.build_optim_wrapper(runner.cfg.optim_wrapper)
    ranges = {id(p) for q in quantizers(runner.model).values() for p in q.parameters()}
    rates = {id(p): group['lr'] for group in wrapper.optimizer.param_groups for p in group['params']}
    assert len(wrapper.optimizer.param_groups) == 2
    assert rates.keys() == {id(p) for p in runner.model.parameters()}
    for p in runner.model.parameters():
        assert rates[id(p)] == pytest.approx(1e-2 if id(p) in ranges else 1e-3)


def test_paramwise_options_stand_under_the_ranges_factor(config):
    paramwise = {'custom_keys': {'body.1': {'lr_mult': 0.5}}}
    runner = runner_of(config(optim_wrapper={'paramwise_cfg': paramwise}))
    wrapper = runner.build_optim_wrapper(runner.cfg.optim_wrapper)
    rates = sorted({round(group['lr'], 9) for group in wrapper.optimizer.param_groups})
    assert rates == pytest.approx([5e-4, 1e-3, 5e-3, 1e-2])


def test_the_default_constructor_is_refused(config):
    with pytest.raises(QuantError, match='QuantizedOptimWrapperConstructor'):
        train(config(optim_wrapper={'constructor': 'DefaultOptimWrapperConstructor'}))


def test_calibration_fills_the_optimizers_own_parameters_and_leaves_the_random_state(config):
    runner = runner_of(config(crop=True))
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    before = {id(p) for group in runner.optim_wrapper.optimizer.param_groups for p in group['params']}
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    drawn = random.random(), np.random.rand(), float(torch.rand(()))
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    next(h for h in runner.hooks if isinstance(h, RangeCalibrationHook)).before_train(runner)
    assert (random.random(), np.random.rand(), float(torch.rand(()))) == drawn
    assert {id(p) for p in runner.model.parameters()} == before
    assert all(bool(q.calibrated) for q in quantizers(runner.model).values())


def test_the_methods_figures_reach_the_log(config):
    runner = train(config())
    assert any(-1 <= line.get('cosine', 2) <= 1 and line['l_regularizer'] > 0 for line in scalars(runner))


def test_resuming_goes_on_as_if_never_stopped(config):
    # MMEngine goes on at the same place in the data but restores no random states: this pipeline draws nothing.
    options = config(train_cfg={'max_iters': 4, 'val_interval': 9})
    options['custom_hooks'].append({'type': 'QuantizedEMAHook', 'module_keys': ('generator_ema',), 'interval': 1})
    whole = train(options)
    options['work_dir'] += '_2'
    resumed = train({**options, 'load_from': f'{whole.work_dir}/iter_2.pth', 'resume': True})
    assert resumed.iter == 4 and 'generator_ema' in quantized_networks(resumed.model)
    assert_same(state(resumed), state(whole))


def test_a_loaded_quantized_checkpoint_is_not_calibrated_again(config):
    first = train(config())
    options = config(train_cfg={'max_iters': 1, 'val_interval': 9}, load_from=f'{first.work_dir}/iter_4.pth')
    options['optim_wrapper']['optimizer']['lr'] = 0.0
    options['work_dir'] += '_2'
    second = train(options)
    assert_same(state(second), state(first))
    assert run_of(second.model.generator).calibration == run_of(first.model.generator).calibration


def test_the_averaged_copy_gets_the_ranges_and_averages_them(config):
    options = config()
    options['custom_hooks'].append(
        {'type': 'QuantizedEMAHook', 'module_keys': ('generator_ema',), 'interval': 1, 'interp_cfg': {'momentum': 0.25}}
    )
    runner = runner_of(options)
    seen = {}

    def follow(*_: Any) -> None:
        nets = quantized_networks(runner.model)
        for key, value in nets['generator'].state_dict().items():
            old = seen.get(key, value)
            new = old + (value - old) * 0.25 if value.is_floating_point() and key in names else value
            seen[key] = new.clone()

    names = {name for name, _ in runner.model.generator.named_parameters()}
    hook = next(h for h in runner.hooks if type(h).__name__ == 'RangeCalibrationHook')
    inner = hook.before_train
    hook.before_train = lambda r: (inner(r), follow())
    inner_iter = hook.after_train_iter
    hook.after_train_iter = lambda r, **k: (inner_iter(r, **k), follow())
    runner.train()
    averaged = quantized_networks(runner.model)['generator_ema'].state_dict()
    prefixes = tuple(f'{q}.' for q in quantizers(runner.model.generator))
    for key in (k for k in seen if k.startswith(prefixes)):
        torch.testing.assert_close(averaged[key], seen[key])
    file = torch.load(f'{runner.work_dir}/net_g_latest.pth', weights_only=True)
    assert set(file) == {'params', 'params_ema', 'quant'}


def test_accumulated_gradients_step_as_one_large_batch(config):
    def weights(batch: int, counts: int) -> dict[str, torch.Tensor]:
        quant = {'method': 'odm', 'w_bits': 4, 'a_bits': 4, 'odm': {'regularizer': 'none'}}
        schedule = {'max_iters': counts, 'val_interval': 9}
        options = config(quant, train_cfg=schedule, train_dataloader={'batch_size': batch})
        options['optim_wrapper']['accumulative_counts'] = counts
        options['work_dir'] += f'_{batch}'
        return state(train(options))

    one, two = weights(4, 1), weights(2, 2)
    for key in one:
        torch.testing.assert_close(one[key], two[key], rtol=1e-4, atol=1e-5)


def test_the_averaged_copy_gets_rounded_weights_too(config):
    """Where calibration changes weights, ranges alone would not do."""
    quant = {'method': 'auto', 'w_bits': 4, 'a_bits': 4, 'auto': {'budget': 1, 'mixed_bits': False, 'rounds': 1}}
    options = config({**quant, 'bias_correction': 'empirical'}, train_cfg={'max_iters': 1, 'val_interval': 9})
    options['optim_wrapper']['optimizer']['lr'] = 0.0
    options['custom_hooks'].append(
        {'type': 'QuantizedEMAHook', 'module_keys': ('generator_ema',), 'interval': 1, 'interp_cfg': {'momentum': 0.25}}
    )
    runner = train(options)
    nets = quantized_networks(runner.model)
    assert_same(nets['generator_ema'].state_dict(), nets['generator'].state_dict())


def test_checkpoints_hold_plain_data_of_ours(config):
    runner = train(config(train_cfg={'max_iters': 2, 'val_interval': 9}))
    content = torch.load(f'{runner.work_dir}/iter_2.pth', weights_only=False)

    def kinds(value: Any) -> set[type]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        return {type(value)}.union(*map(kinds, inner))

    assert kinds(content['quant']) <= {dict, list, str, int, float, bool, tuple, type(None)}
    # The file for both hosts needs no trust: tensors and plain data.
    file = torch.load(f'{runner.work_dir}/net_g_latest.pth', weights_only=True)
    assert file['quant']['plan'] == content['quant']['plan']
    for key, value in file['params'].items():
        assert torch.equal(value, content['state_dict'][f'generator.{key}']), key


SPARSITY = {'method': 'sls', 'M': 4, 'budget': 0.5}


@pytest.mark.parametrize('quant', [{'method': 'mse', 'w_bits': 4, 'a_bits': 4}, {'method': 'none'}])
def test_masks_are_learned_saved_and_averaged(config, quant):
    options = config(quant, train_cfg={'max_iters': 4, 'val_interval': 4})
    options['model']['generator']['sparsity'] = SPARSITY
    options['custom_hooks'].append({'type': 'QuantizedEMAHook', 'module_keys': ('generator_ema',), 'interval': 1})
    runner = train(options)
    net = runner.model.generator
    assert any(0 < line['density'] <= 1 for line in scalars(runner) if 'density' in line)
    assert {layer.layer for layer in run_of(net).plan.sparsity.layers} == set(masks(net))
    kept = [int(mask.kept) for mask in masks(net).values()]
    file = torch.load(f'{runner.work_dir}/net_g_latest.pth', weights_only=True)
    assert [layer['kept'] for layer in file['quant']['plan']['sparsity']['layers']] == kept
    options['work_dir'] += '_2'
    tested = runner_of({**options, 'load_from': f'{runner.work_dir}/net_g_latest.pth'})
    tested.test()
    assert [int(mask.kept) for mask in masks(tested.model.generator).values()] == kept

    options['work_dir'] += '_3'
    fresh = runner_of(options)
    with pytest.raises(QuantError, match='learns its masks in training'):
        fresh.test()
