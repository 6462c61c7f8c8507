"""Bits and ranges of a test: in the result files, and through MMagic's visualizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip('mmagic.utils', reason='MMagic is not installed (make env-mmagic)')

import cv2
from mmagic.utils import register_all_modules
from runs import dataset, runner_of, scalars

from basicsr_quant.errors import QuantError
from basicsr_quant.network.surgery import quantizers

register_all_modules()

HOOKS = [
    {'type': 'RangeCalibrationHook'}, {'type': 'QuantizationReportHook'},
    {'type': 'QuantizationVisualizationHook', 'interval': 2},
]  # fmt: skip


@pytest.fixture
def calibrated(photographs):
    """`quant.calibration` on the training pictures, for tests without training."""
    return {'calibration': {'dataset': dataset(photographs, 'train')}}


def pictures(runner: Any) -> dict[str, Any]:
    found = Path(runner.work_dir).glob('*/vis_data/vis_image/*.png')
    return {path.stem: cv2.imread(str(path)) for path in found}


@pytest.mark.parametrize('patch', [None, {'size': 16, 'stride': 8}])
def test_bits_of_each_image_and_patch(config, calibrated, patch):
    adabm = {'epochs': 0, 'schedule': 'published', 'layer_percentile': 0, 'image_percentile': 50}
    quant = {'method': 'adabm', 'w_bits': 4, 'a_bits': 4, 'adabm': adabm, 'save_bits': True, **calibrated}
    runner = runner_of(config({**quant, **({'patch': patch} if patch else {})}, custom_hooks=HOOKS))
    runner.test()
    found = json.loads((Path(runner.work_dir) / 'metrics.json').read_text())
    images = found['datasets']['Photos']['images']
    assert {name: 3 <= image['fab'] <= 5 for name, image in images.items()} == {'coffee_0': True, 'coffee_1': True}
    assert any(image['fab'] != 4 for image in images.values())  # measured, not the plan's
    assert any('in patches of 16x16' in note for note in found['cost']['notes']) is (patch is not None)
    assert found['calibration']['choices']['schedule'] == 'published' and found['calibration']['seconds']
    shown = pictures(runner)
    assert {'ranges_0', 'Photos_coffee_0_bits_0', 'Photos_coffee_1_bits_0', 'Photos_layers_0'} == set(shown)
    height, width, _ = shown['Photos_coffee_0_bits_0'].shape
    assert width == 48 and height > 48  # the output, and its legend
    rows = (Path(runner.work_dir) / 'bits/Photos.csv').read_text().splitlines()
    assert len(rows) == 1 + 2 * (1 if patch is None else 4)
    assert type(runner.model.generator).__name__ == 'EDSRNet'  # itself again after the test
    body = [line for line in scalars(runner) if 'ranges/body.0.conv1.input_quantizer/upper' in line]
    assert len(body) == 1


def test_ranges_in_training_at_the_first_iteration_and_each_interval(config):
    runner = runner_of(config(custom_hooks=HOOKS))
    runner.train()
    assert set(pictures(runner)) == {'ranges_1', 'ranges_2', 'ranges_4'}
    names = {f'ranges/{name}/{key}' for name in quantizers(runner.model.generator) for key in ('lower', 'upper')}
    for step in (1, 2, 4):
        found = {k: v for line in scalars(runner) if line.get('step') == step for k, v in line.items()}
        assert names <= set(found)
        assert all(found[name] < found[name.replace('lower', 'upper')] for name in names if name.endswith('lower'))


def test_bits_that_nothing_would_draw_are_refused(config, calibrated):
    quant = {'method': 'minmax', 'save_bits': True, **calibrated}
    with pytest.raises(QuantError, match='add dict\\(type=QuantizationVisualizationHook\\)'):
        runner_of(config(quant)).test()
