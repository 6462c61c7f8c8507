"""BasicSR imports and runs here, each mend looks before it changes anything, and nothing reads files unsafely."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from basicsr_quant import compat
from basicsr_quant.compat.patch import TorchView, mentions
from basicsr_quant.errors import QuantError

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')


@pytest.fixture(scope='module', autouse=True)
def mended() -> list[str]:
    return compat.apply()


def mends() -> list[Any]:
    if not compat.has_host():
        return []
    modules = [importlib.import_module(f'basicsr_quant.compat.{name}') for name in compat.GROUPS]
    return [pytest.param(mend, id=mend.__name__) for module in modules for mend in module.MENDS]


@pytest.mark.parametrize('mend', mends())
def test_a_mend_finds_its_fault_gone(mend: Callable[[], bool]) -> None:
    assert mend() is False
    assert mend.__doc__


def test_apply_can_be_called_again(mended: list[str]) -> None:
    assert compat.apply() == mended
    assert mended


def python(code: str) -> str:
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_importing_the_core_imports_no_host() -> None:
    assert python('import sys, basicsr_quant, basicsr_quant.cli; print("basicsr" in sys.modules)') == 'False'


def test_a_python_without_distutils() -> None:
    """Python 3.12 has none; the host compares torchvision's version with it."""
    assert python('import sys; sys.modules["distutils"] = None\n'
                  'from basicsr_quant.compat.imports import distutils_version\n'
                  'assert distutils_version() and not distutils_version()\n'
                  'from distutils.version import LooseVersion as V\n'
                  'print(V("0.28.0+cpu") >= V("0.9.0"), V("0.9.0") >= V("0.10"))') == 'True False'


def test_scipy_without_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    from basicsr_quant.compat import imports

    monkeypatch.setattr(imports.importlib.util, 'find_spec', lambda name: None)
    monkeypatch.delitem(sys.modules, 'scipy.ndimage.filters', raising=False)
    assert imports.scipy_filters()
    assert callable(sys.modules['scipy.ndimage.filters'].convolve)
    sys.modules.pop('scipy.ndimage.filters')


def test_without_the_host_two_commands_say_how_to_get_it() -> None:
    message = str(compat.missing_host())
    assert [line.strip() for line in message.split('\n')[1:]] == list(compat.INSTALL)


class Unsafe:
    """What no file may make."""


def test_option_files_are_read_safely() -> None:
    options = importlib.import_module('basicsr.utils.options')
    loader, dumper = options.ordered_yaml()
    text = 'b: 1\na: {d: !!float 1e-5, c: [1, {x: ~}]}\n'
    read = yaml.load(text, Loader=loader)
    assert list(read) == ['b', 'a'] and isinstance(read['a'], OrderedDict)
    assert read['a']['d'] == 1e-5 and read['a']['c'][1] == {'x': None}
    assert yaml.load(yaml.dump(read, Dumper=dumper), Loader=loader) == read
    with pytest.raises(yaml.YAMLError):
        yaml.load('a: !!python/object/apply:os.getcwd []', Loader=loader)
    assert yaml.safe_load('a: 1') == {'a': 1} and type(yaml.safe_load('a: 1')) is dict  # yaml itself is untouched


def test_checkpoints_are_read_safely(tmp_path: Path) -> None:
    from basicsr_quant.compat.files import safe_load

    base = importlib.import_module('basicsr.models.base_model').BaseModel
    file = tmp_path / 'net.pth'
    torch.save({'params': Unsafe()}, file)
    model = SimpleNamespace(get_bare_model=lambda net: net)
    with pytest.raises(pickle.UnpicklingError):
        base.load_network(model, torch.nn.Linear(1, 1), str(file))
    with pytest.raises(pickle.UnpicklingError):
        safe_load(file, weights_only=False)


def test_the_ema_copy_gets_buffers() -> None:
    base = importlib.import_module('basicsr.models.base_model').BaseModel
    net, copy = torch.nn.BatchNorm2d(2), torch.nn.BatchNorm2d(2)
    net(torch.randn(4, 2, 3, 3) + 5)
    with torch.no_grad():
        net.weight.fill_(3)
    base.model_ema(SimpleNamespace(net_g=net, net_g_ema=copy, get_bare_model=lambda n: n), 0.5)
    assert torch.equal(copy.running_mean, net.running_mean) and torch.equal(copy.num_batches_tracked, torch.tensor(1))
    assert torch.equal(copy.weight, torch.full((2, ), 2.0))  # parameters are averaged as before


def test_a_database_is_read_by_two_data_sets(images: Path) -> None:
    client = importlib.import_module('basicsr.utils.file_client').FileClient
    root = str(images / 'lq.lmdb')
    both = [client('lmdb', db_paths=[root], client_keys=['lq']) for _ in range(2)]
    want = (images / 'lq' / '0003.png').read_bytes()
    assert [one.get('0003', 'lq') for one in both] == [want, want]


def test_video_metrics_without_a_gpu() -> None:
    module = importlib.import_module('basicsr.models.video_base_model')
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    assert module.torch.zeros(2, 3, dtype=torch.float32, device='cuda').device.type == 'cpu'
    assert module.torch.mean is torch.mean
    with pytest.raises((AssertionError, RuntimeError)):
        torch.zeros(2, device='cuda')  # everybody else's torch is untouched


def test_a_view_of_torch_stays_in_its_module() -> None:
    view = TorchView(zeros=torch.ones)
    assert view.zeros is torch.ones and view.ones is torch.ones and torch.zeros is not torch.ones


def test_mentions_looks_through_decorators() -> None:
    with_name = torch.no_grad()(lambda: torch.cuda.current_device())
    assert mentions(with_name, 'current_device') and not mentions(with_name, 'device_count')


def test_slurm_needs_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip('there is a GPU')
    with pytest.raises(QuantError, match='--launcher slurm needs a GPU'):
        importlib.import_module('basicsr.utils.dist_util')._init_dist_slurm('nccl')


def realesr(options: dict[str, Any], images: Path, tmp_path: Path) -> None:
    """Turn stock options into those of RealESRNet, with few and small images."""
    lines = [f'{file.name}\n' for file in sorted((images / 'gt').iterdir())[:4]]
    (tmp_path / 'meta.txt').write_text(''.join(lines))
    kernels = {'blur_kernel_size': 21, 'kernel_list': ['iso', 'aniso', 'plateau_iso'], 'kernel_prob': [0.5, 0.3, 0.2],
               'sinc_prob': 0.1, 'blur_sigma': [0.2, 3], 'betag_range': [0.5, 4], 'betap_range': [1, 2]}
    options['datasets']['train'] = {
        'name': 'Real', 'type': 'RealESRGANDataset', 'dataroot_gt': str(images / 'gt'),
        'meta_info': str(tmp_path / 'meta.txt'), 'io_backend': {'type': 'disk'}, **kernels,
        **{f'{key}2': value for key, value in kernels.items()}, 'final_sinc_prob': 0.8, 'gt_size': 400,
        'use_hflip': True, 'use_rot': False, 'num_worker_per_gpu': 0, 'batch_size_per_gpu': 1, 'prefetch_mode': None}
    degrade = {'resize_prob': [0.2, 0.7, 0.1], 'resize_range': [0.15, 1.5], 'gaussian_noise_prob': 0.5,
               'noise_range': [1, 30], 'poisson_scale_range': [0.05, 3], 'gray_noise_prob': 0.4, 'jpeg_range': [30, 95]}
    options.update({**degrade, **{f'{key}2': value for key, value in degrade.items()}}, model_type='RealESRNetModel',
                   second_blur_prob=0.8, gt_usm=False, l1_gt_usm=True, percep_gt_usm=True, gan_gt_usm=False,
                   queue_size=2, gt_size=32)


@pytest.mark.slow
@pytest.mark.parametrize('model', ['RealESRNetModel', 'RealESRGANModel'])
def test_realesr_trains_and_resumes_on_the_cpu(model: str, options: dict[str, Any], option_file: Any, images: Path,
                                               tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its degradations draw from every random state, and its pool of pairs must survive a resume."""
    realesr(options, images, tmp_path)
    options['model_type'] = model
    if model == 'RealESRGANModel':
        options['network_d'] = {'type': 'UNetDiscriminatorSN', 'num_in_ch': 3, 'num_feat': 4}
        options['train'].update(optim_d=dict(options['train']['optim_g']), net_d_iters=1, net_d_init_iters=0,
                                gan_opt={'type': 'GANLoss', 'gan_type': 'vanilla', 'loss_weight': 0.1})
    pipeline = importlib.import_module('basicsr.train').train_pipeline

    def train(name: str, total: int, *flags: str) -> dict[str, torch.Tensor]:
        options['train']['total_iter'] = options['logger']['save_checkpoint_freq'] = total
        argv = ['train.py', '-opt', option_file({**options, 'name': name}), *flags]
        monkeypatch.setattr(sys, 'argv', argv)
        monkeypatch.chdir(tmp_path)
        pipeline(str(tmp_path))
        file = tmp_path / 'experiments' / name / 'models' / f'net_g_{total}.pth'
        return torch.load(file, weights_only=True)['params_ema']

    whole = train('whole', 4)
    train('parts', 2)
    resumed = train('parts', 4, '--auto_resume')
    assert not [name for name in whole if not torch.equal(whole[name], resumed[name])]
