"""Losses of methods under MMEngine: teachers, two stages, and hosts that multiply their loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip('mmagic.utils', reason='MMagic is not installed (make env-mmagic)')

from mmagic.utils import register_all_modules
from mmengine.config import Config
from mmengine.optim import AmpOptimWrapper, OptimWrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from runs import scalars, train

from basicsr_quant.errors import QuantError
from basicsr_quant.methods.extra_loss import scale_extra_losses, with_loss
from basicsr_quant.mmagic.generator import run_of
from basicsr_quant.mmagic.optimizer import loss_factor
from basicsr_quant.network.surgery import quantizers

register_all_modules()

DISTILL = {'teacher': 'start', 'loss': 'attention', 'layers': {'conv_after_body': 1000, 'body.*.conv2': 100}}
SHORT = {'max_iters': 2, 'val_interval': 9}


def fp32_file(options: dict[str, Any], path: Path) -> str:
    from mmengine.registry import MODELS

    torch.manual_seed(1)
    with torch.random.fork_rng():
        net = MODELS.build(Config(options['model']['generator']['generator'])._cfg_dict)
    torch.save({'state_dict': {f'generator.{k}': v for k, v in net.state_dict().items()}}, path)
    return str(path)


@pytest.mark.parametrize('normalize', [False, True])
def test_cadyq_starts_from_pams_and_learns_from_it(config, normalize):
    first = train(config({'method': 'pams', 'w_bits': 8, 'a_bits': 8}, train_cfg=SHORT))
    start = f'{first.work_dir}/net_g_latest.pth'
    quant = {'method': 'cadyq', 'w_bits': 8, 'a_bits': 8, 'distill': DISTILL, 'cadyq': {'normalize': normalize}}
    options = config(quant, train_cfg={'max_iters': 2, 'val_interval': 9}, load_from=start)
    options['work_dir'] += '_2'
    options['default_hooks']['checkpoint']['interval'] = 1
    runner = train(options)
    net, theirs = runner.model.generator, first.model.generator
    assert run_of(net).calibration == run_of(theirs).calibration  # taken over, not calibrated again
    lines = [line for line in scalars(runner) if 'l_distill' in line]
    assert len(lines) == 2 and all(line['l_distill'] >= 0 and 4 <= line['bits'] <= 8 for line in lines)
    assert any(line['l_distill'] > 0 for line in lines) and any(line['l_bits'] != 0 for line in lines)
    assert int(net.quant_measures.progress.steps) == 2
    measured = float((net.body[0].conv1.input_quantizer.feature_std - 1).abs().max()) > 0
    assert measured is normalize

    # Resuming: the teacher is still what the training started from, not the checkpoint that it goes on with.
    options['work_dir'] += '_3'
    again = train({**options, 'load_from': f'{runner.work_dir}/iter_1.pth', 'resume': True})
    assert run_of(again.model.generator).start == start
    for key, value in runner.model.state_dict().items():
        torch.testing.assert_close(again.model.state_dict()[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize(
    ('teacher', 'message'),
    [
        ('start', "quant.distill.teacher: 'start' is load_from, which is not given"),
        ('nowhere.pth', 'quant.distill.teacher: there is no checkpoint nowhere.pth'),
    ],
)
def test_a_teacher_that_is_not_there(config, teacher, message):
    quant = {'method': 'pams', 'w_bits': 4, 'a_bits': 4, 'distill': {'teacher': teacher}}
    with pytest.raises(QuantError) as raised:
        train(config(quant, train_cfg=SHORT))
    assert str(raised.value) == message


def test_an_fp32_teacher(config, tmp_path):
    quant = {'method': 'pams', 'w_bits': 4, 'a_bits': 4, 'distill': {**DISTILL, 'teacher': 'fp32', 'loss': 'feature'}}
    options = config(quant, train_cfg=SHORT)
    runner = train({**options, 'load_from': fp32_file(options, tmp_path / 'fp32.pth')})
    assert all(line['l_distill'] > 0 for line in scalars(runner) if 'l_distill' in line)
    assert not any('teacher' in name for name in runner.model.state_dict())


def step(wrapper_of: Any, passes: int) -> torch.Tensor:
    """The parameter after steps of a loss 3w with an extra loss 2w."""
    w = torch.nn.Parameter(torch.tensor(1.0))
    wrapper = wrapper_of(torch.optim.SGD([w], lr=0.125))
    wrapper.initialize_count_status(torch.nn.Module(), 0, passes)
    for _ in range(passes):
        scale_extra_losses(loss_factor(wrapper))
        output = with_loss(w * 1.0, 2 * w)
        scale_extra_losses(1.0)
        wrapper.update_params(3 * output)
    return w.detach()


@pytest.mark.parametrize(('counts', 'passes'), [(1, 1), (2, 2), (4, 4), (2, 3)])
def test_extra_losses_count_once_however_many_passes_accumulate(counts, passes):
    steps = -(-passes // counts)
    found = step(lambda sgd: OptimWrapper(sgd, accumulative_counts=counts), passes)
    assert float(found) == pytest.approx(1 - steps * 0.125 * 5)


def scaled(sgd: torch.optim.Optimizer, **kwargs: Any) -> AmpOptimWrapper:
    wrapper = AmpOptimWrapper(optimizer=sgd, dtype='bfloat16', **kwargs)
    wrapper.loss_scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)  # MMEngine's own is off without CUDA
    return wrapper


@pytest.fixture
def amp(monkeypatch):
    """MMEngine refuses AmpOptimWrapper without an accelerator, although torch has bfloat16 on the CPU."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)


def test_extra_losses_are_scaled_as_the_hosts_own(amp):
    assert float(step(scaled, 1)) == pytest.approx(1 - 0.125 * 5)


@pytest.mark.parametrize('method', ['odm', 'cadyq'])
def test_mixed_precision_trains_and_keeps_ranges_in_float32(config, amp, method):
    bits = 8 if method == 'cadyq' else 4
    quant = {'method': method, 'w_bits': bits, 'a_bits': bits}
    options = config(quant, train_cfg=SHORT)
    options['optim_wrapper'].update(type='AmpOptimWrapper', dtype='bfloat16')
    runner = train(options)
    net = runner.model.generator
    dtypes = []
    net.body[1].conv1.input_quantizer.register_forward_hook(lambda m, x, y: dtypes.append((x[0].dtype, y.dtype)))
    with runner.optim_wrapper.optim_context(runner.model), torch.no_grad():
        net(torch.rand(1, 3, 16, 16))
    assert dtypes == [(torch.bfloat16, torch.bfloat16)]
    for quantizer in quantizers(net).values():
        for tensor in quantizer.parameters():
            assert tensor.dtype == torch.float32 and bool(tensor.isfinite().all())
    assert all(line['loss'] > 0 for line in scalars(runner) if 'loss' in line)
