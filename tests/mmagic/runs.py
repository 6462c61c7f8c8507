"""Parts of configs, and runs of them in this process."""

from __future__ import annotations

import glob
import itertools
import json
from pathlib import Path
from typing import Any

EXPERIMENTS = itertools.count()


def dataset(root: Path, part: str, crop: bool = False) -> dict[str, Any]:
    load = {'type': 'LoadImageFromFile', 'color_type': 'color', 'channel_order': 'rgb', 'imdecode_backend': 'cv2'}
    pipeline: list[dict[str, Any]] = [{**load, 'key': 'img'}, {**load, 'key': 'gt'}]
    if crop:
        pipeline.append({'type': 'SetValues', 'dictionary': {'scale': 2}})
        pipeline.append({'type': 'PairedRandomCrop', 'gt_patch_size': 32})
    return {
        'type': 'BasicImageDataset', 'metainfo': {'dataset_type': part, 'task_name': 'sisr'}, 'data_root': str(root),
        'data_prefix': {'img': f'{part}/lq', 'gt': f'{part}/gt'}, 'pipeline': [*pipeline, {'type': 'PackInputs'}],
    }


def merge(options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    for key, value in changes.items():
        options[key] = merge(options[key], value) if isinstance(value, dict) and key in options else value
    return options


def runner_of(options: dict[str, Any]) -> Any:
    """MMEngine's Runner; it names its log writers by experiment and second, so each run gets a name of its own."""
    from mmagic.utils import register_all_modules
    from mmengine.config import Config
    from mmengine.runner import Runner

    import basicsr_quant.mmagic  # noqa: F401 (registers)

    register_all_modules()
    return Runner.from_cfg(Config({**options, 'experiment_name': f'tiny_{next(EXPERIMENTS)}'}))


def train(options: dict[str, Any]) -> Any:
    runner = runner_of(options)
    runner.train()
    return runner


def scalars(runner: Any) -> list[dict[str, float]]:
    """What the runs in a work directory gave the visualizer's local backend."""
    files = sorted(glob.glob(f'{runner.work_dir}/*/vis_data/scalars.json'))
    return [json.loads(line) for file in files for line in Path(file).read_text().splitlines()]
