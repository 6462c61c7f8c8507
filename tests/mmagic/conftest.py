"""A tiny EDSR x2 of MMagic on crops of real photographs, in configs as users write them."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from runs import dataset, merge

os.environ.setdefault('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')  # MMEngine's own checkpoints hold its log as objects


@pytest.fixture(scope='session')
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders `train` (6 pairs) and `test` (2 pairs), each with `gt` (48x48) and `lq` (24x24)."""
    cv2, data = pytest.importorskip('cv2'), pytest.importorskip('skimage')
    pictures = Path(data.__file__).parent / 'data'
    root = tmp_path_factory.mktemp('photographs')
    for part, names in {'train': ('astronaut.png', 'ihc.png', 'motorcycle_left.png'), 'test': ('coffee.png',)}.items():
        for folder in ('gt', 'lq'):
            (root / part / folder).mkdir(parents=True)
        for name in names:
            image = cv2.imread(str(pictures / name))
            for number, (y, x) in enumerate(((60, 90), (150, 200))):
                crop = image[y : y + 48, x : x + 48]
                half = cv2.resize(crop, (24, 24), interpolation=cv2.INTER_AREA)
                file = f'{Path(name).stem}_{number}.png'
                cv2.imwrite(str(root / part / 'gt' / file), crop)
                cv2.imwrite(str(root / part / 'lq' / file), half)
    return root


@pytest.fixture
def config(photographs: Path, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Build a config: 4 iterations of two images each, in the order of the files, then one validation and a test."""

    def build(quant: dict[str, Any] | None = None, *, crop: bool = False, **changes: Any) -> dict[str, Any]:
        loader = {'num_workers': 0, 'persistent_workers': False}
        test_loader = {
            **loader, 'sampler': {'type': 'DefaultSampler', 'shuffle': False}, 'dataset': dataset(photographs, 'test'),
        }  # fmt: skip
        evaluator = {'type': 'Evaluator', 'metrics': [{'type': 'PSNR', 'crop_border': 2, 'prefix': 'Photos'}]}
        options: dict[str, Any] = {
            'default_scope': 'mmagic',
            'custom_imports': {'imports': ['basicsr_quant.mmagic'], 'allow_failed_imports': False},
            'experiment_name': 'tiny', 'work_dir': str(tmp_path / 'work'), 'log_level': 'WARNING',
            'model': {
                'type': 'BaseEditModel',
                'generator': {
                    'type': 'QuantizedNetwork',
                    'generator': {
                        'type': 'EDSRNet', 'in_channels': 3, 'out_channels': 3, 'mid_channels': 4, 'num_blocks': 2,
                        'upscale_factor': 2,
                    },
                    'quant': quant or {'method': 'odm', 'w_bits': 4, 'a_bits': 4},
                },
                'pixel_loss': {'type': 'L1Loss'},
                'data_preprocessor': {'type': 'DataPreprocessor', 'mean': [0.0] * 3, 'std': [255.0] * 3},
            },
            'train_dataloader': {
                **loader, 'batch_size': 2, 'sampler': {'type': 'InfiniteSampler', 'shuffle': False},
                'dataset': dataset(photographs, 'train', crop),
            },
            'val_dataloader': test_loader, 'val_evaluator': evaluator, 'val_cfg': {'type': 'MultiValLoop'},
            'test_dataloader': [test_loader], 'test_evaluator': [evaluator], 'test_cfg': {'type': 'MultiTestLoop'},
            'train_cfg': {'type': 'IterBasedTrainLoop', 'max_iters': 4, 'val_interval': 4},
            'optim_wrapper': {
                'constructor': 'QuantizedOptimWrapperConstructor', 'type': 'OptimWrapper',
                'optimizer': {'type': 'Adam', 'lr': 1e-3},
            },
            'param_scheduler': {'type': 'MultiStepLR', 'by_epoch': False, 'milestones': [3], 'gamma': 0.5},
            'default_hooks': {
                'logger': {'type': 'LoggerHook', 'interval': 1},
                'checkpoint': {'type': 'CheckpointHook', 'interval': 2, 'by_epoch': False},
            },
            'custom_hooks': [{'type': 'RangeCalibrationHook', 'log_interval': 1}, {'type': 'QuantizationReportHook'}],
            'vis_backends': [{'type': 'LocalVisBackend'}],
            'visualizer': {'type': 'ConcatImageVisualizer', 'vis_backends': [{'type': 'LocalVisBackend'}],
                           'fn_key': 'gt_path', 'img_keys': ['gt_img', 'input', 'pred_img'], 'bgr2rgb': True},
            'randomness': {'seed': 3}, 'load_from': None, 'resume': False,
            'env_cfg': {'cudnn_benchmark': False, 'mp_cfg': {'mp_start_method': 'fork', 'opencv_num_threads': 1},
                        'dist_cfg': {'backend': 'gloo'}},
        }  # fmt: skip
        return merge(copy.deepcopy(options), changes)

    return build
