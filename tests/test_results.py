"""The result files: the contract of metrics.json, and what people read."""

from __future__ import annotations

import csv
import json
import math
import os

import numpy as np
import pytest
from torch import nn

from basicsr_quant.cost import Cost, cost
from basicsr_quant.network.plan import LayerPlan, Plan
from basicsr_quant.report import files, results, tables
from basicsr_quant.report.results import ResultWriter

PLAN = Plan(
    'odm',
    (
        LayerPlan('0', 'Conv2d', why='outside the body (scope: body)'),
        LayerPlan('1', 'Conv2d', 4, 4, 'body'),
        LayerPlan('2', 'Conv2d', 4, 2, 'body'),
    ),
)


@pytest.fixture(scope='module')
def some_cost() -> Cost:
    """Layers of 27, 81 and 243 multiply-accumulates per pixel."""
    net = nn.Sequential(nn.Conv2d(3, 9, 1), nn.Conv2d(9, 9, 1), nn.Conv2d(9, 3, 3, padding=1), nn.ReLU())
    return cost(net, PLAN, scale=1)


@pytest.fixture
def writer(some_cost: Cost) -> ResultWriter:
    made = ResultWriter('EDSR_x2', 'odm', 4, 4, 'net_g_latest.pth', PLAN, some_cost)
    made.add_image('Set5', 'baby', psnr=38.0, ssim=0.96, seconds=0.5, extra={'niqe': 4.0})
    made.add_image('Set5', 'bird', psnr=37.0, ssim=0.95, seconds=0.25, extra={'niqe': 5.0})
    made.add_image('Photos', 'one')
    return made


def read(folder: os.PathLike[str]) -> dict:
    def refuse(constant: str) -> None:
        raise AssertionError(f'{constant} is no JSON')

    with open(os.path.join(folder, 'metrics.json'), encoding='utf-8') as file:
        return json.load(file, parse_constant=refuse)


# ---------------------------------------------------------------------------------------------------------------- json


def test_metrics_json_is_the_contract(writer, some_cost, tmp_path):
    writer.write(tmp_path)
    found = read(tmp_path)
    assert list(found) == [
        'name', 'method', 'w_bits', 'a_bits', 'checkpoint', 'datasets', 'calibration', 'cost', 'plan', 'tensors',
        'sparsity', 'versions',
    ]  # fmt: skip
    assert [found[key] for key in list(found)[:5]] == ['EDSR_x2', 'odm', 4, 4, 'net_g_latest.pth']
    fab, fab_mac = 3.0, pytest.approx((81 * 4 + 243 * 2) / (81 + 243))
    baby = {'psnr': 38.0, 'ssim': 0.96, 'fab': fab, 'fab_mac': fab_mac, 'seconds': 0.5, 'extra': {'niqe': 4.0}}
    assert found['datasets']['Set5'] == {
        'psnr': 37.5,
        'ssim': pytest.approx(0.955),
        'fab': fab,
        'fab_mac': fab_mac,
        'seconds': 0.75,
        'images': {'baby': baby, 'bird': {**baby, 'psnr': 37, 'ssim': 0.95, 'seconds': 0.25, 'extra': {'niqe': 5.0}}},
        'extra': {'niqe': 4.5},
    }
    assert found['datasets']['Photos']['psnr'] is None
    assert found['cost'] == some_cost.to_plain()
    assert found['plan'][1] == {
        'layer': '1', 'type': 'Conv2d', 'w_bits': 4, 'a_bits': 4, 'why': 'body', 'rectified': False, 'operands': [],
    }  # fmt: skip
    assert set(found['versions']) >= {'basicsr_quant', 'basicsr', 'torch'}


@pytest.mark.parametrize('value', [math.inf, -math.inf, math.nan, None])
def test_what_is_no_number_is_null(value, tmp_path):
    writer = ResultWriter('a', 'none')
    writer.add_image('Set5', 'baby', psnr=value, ssim=1.0, extra={'niqe': value})
    writer.add_image('Set5', 'bird', psnr=30.0, ssim=0.5, extra={'niqe': 4.0})
    writer.add_extra('Set5', 'lpips', value)
    writer.write(tmp_path)
    found = read(tmp_path)['datasets']['Set5']
    assert found['psnr'] is None and found['images']['baby']['psnr'] is None and found['images']['bird']['psnr'] == 30
    assert found['ssim'] == 0.75
    assert found['extra'] == {'niqe': None, 'lpips': None}
    assert (read(tmp_path)['cost'], read(tmp_path)['w_bits'], read(tmp_path)['plan']) == (None, None, [])


def test_numpy_numbers_and_paths_are_written(tmp_path):
    writer = ResultWriter('a', 'pams', np.int64(4), np.float32(4), tmp_path / 'x.pth')
    writer.add_image('Set5', 'baby', psnr=np.float32(30), ssim=np.float64(0.5))
    writer.write(tmp_path)
    assert read(tmp_path)['datasets']['Set5']['psnr'] == 30
    assert read(tmp_path)['checkpoint'].endswith('x.pth')


def test_measured_bits_are_kept_and_averaged(some_cost):
    writer = ResultWriter('a', 'cadyq', cost=some_cost)
    writer.add_image('Set5', 'baby', fab=5.0, fab_mac=6.0)
    writer.add_image('Set5', 'bird', fab=7.0)
    found = writer.to_plain()['datasets']['Set5']
    assert (found['fab'], found['images']['baby']['fab'], found['images']['baby']['fab_mac']) == (6.0, 5.0, 6.0)
    assert found['fab_mac'] is None  # the bird's is unknown; the plan's would not be the measured one


def test_images_of_one_name_are_all_kept():
    writer = ResultWriter('a', 'none')
    for psnr in (30.0, 31.0, 35.0):
        writer.add_image('Set5', 'baby', psnr=psnr)
    found = writer.to_plain()['datasets']['Set5']
    assert list(found['images']) == ['baby', 'baby (2)', 'baby (3)']
    assert found['psnr'] == 32


def test_a_package_that_is_missing_has_no_version(monkeypatch):
    def missing(package: str) -> str:
        raise results.PackageNotFoundError

    monkeypatch.setattr(results, 'version', missing)
    found = results.versions()
    assert found['basicsr'] is None and found['basicsr_quant']


# --------------------------------------------------------------------------------------------------------- csv and page


def test_metrics_csv_has_one_row_an_image(writer, tmp_path):
    writer.write(tmp_path)
    with open(tmp_path / 'metrics.csv', newline='', encoding='utf-8') as file:
        rows = list(csv.DictReader(file))
    assert [(row['dataset'], row['image'], row['psnr'], row['niqe']) for row in rows] == [
        ('Set5', 'baby', '38.0', '4.0'),
        ('Set5', 'bird', '37.0', '5.0'),
        ('Photos', 'one', '', ''),
    ]
    assert list(rows[0]) == ['dataset', 'image', 'psnr', 'ssim', 'fab', 'fab_mac', 'seconds', 'niqe']


def test_metrics_md_shows_data_sets_costs_formulas_and_what_is_not_counted(writer, tmp_path):
    writer.write(tmp_path)
    page = (tmp_path / 'metrics.md').read_text(encoding='utf-8')
    assert [line for line in page.splitlines() if line.startswith('| Set5')] == [
        '| Set5 | 2 | 37.500 | 0.9550 | 3.00 | 2.50 | 0.8 | 4.5000 |'
    ]
    assert '| Photos | 1 | - | - | 3.00 | 2.50 | - | - |' in page
    assert 'Method odm W4 A4' in page
    macs = 1280 * 720 * (27 + 81 + 243)
    bitops = 1280 * 720 * (27 * 1024 + 81 * 16 + 243 * 8)
    assert f'| MACs | {macs:,} | {macs:,} | 1.000 |' in page
    assert f'| BitOPs | {bitops:,} | {macs * 1024:,} | {bitops / macs / 1024:.3f} |' in page
    assert '## Cost of one 1280x720 output (1280x720 input)' in page
    assert '- bitops = sum of macs x w_bits x a_bits' in page
    assert 'Not counted: relu.' in page


def test_an_incomplete_data_set_says_why_it_has_no_mean(writer):
    writer.add_image('Set5', 'cut', ssim=0.9)
    page = results.results_text.page(writer, writer._measured())
    assert "Set5 has no mean: 1 of 3 images have no ground truth of the output's size, cut among them." in page
    assert 'Photos has no mean' not in page


def test_summary(writer):
    lines = writer.summary().splitlines()
    assert lines[2].split() == ['Set5', '2', '37.500', '0.9550', '3.00', '2.50', '0.8', '4.5000']
    assert 'cost of one 1280x720 output: 323.48 M MACs' in lines[-1]
    assert ResultWriter('a', 'none').summary().startswith('data set')


# ---------------------------------------------------------------------------------------------------------------- files


def test_writing_fails_without_leaving_anything(writer, tmp_path, monkeypatch):
    writer.write(tmp_path)
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}

    def broken(*_: object) -> None:
        raise OSError('disk full')

    writer.add_image('Set5', 'more', psnr=1.0)
    monkeypatch.setattr(files.os, 'replace', broken)
    with pytest.raises(OSError, match='disk full'):
        writer.write(tmp_path)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == before
    assert set(before) == {'metrics.json', 'metrics.csv', 'metrics.md'}


def test_folders_are_made_and_text_is_utf8(tmp_path):
    files.write_text(tmp_path / 'a' / 'b' / 'c.txt', 'é\n')
    assert (tmp_path / 'a' / 'b' / 'c.txt').read_bytes() == b'\xc3\xa9\n'


@pytest.mark.parametrize(
    ('value', 'text'),
    [(None, '-'), (1234567, '1,234,567'), (0.5, '0.5'), (2.0, '2'), (1e-9, '0'), (True, 'True'), (math.inf, 'inf')],
)
def test_cells(value, text):
    assert tables.cell(value) == text


def test_tables_without_rows():
    assert tables.plain(['a', 'bc'], []).splitlines() == ['a  bc', '-  --']
    assert tables.markdown(['a|b'], [['c|d']]).splitlines()[2] == '| c\\|d |'


@pytest.mark.parametrize(('calibration', 'lines'), [
    (None, []),
    ({'images': 4, 'choices': None, 'seconds': None}, ['Calibrated on 4 images.']),
    ({'images': 0, 'choices': {}, 'seconds': {'setting ranges': 0.25}},
     ['Calibrated without images in 0.2 s: setting ranges 0.2 s.']),
    ({'images': 9, 'choices': {'table': 'optimal', 'errors': {'a': 1.0}}, 'seconds': {'observing': 1, 'setting': 0.5}},
     ['Calibrated on 9 images in 1.5 s: observing 1.0 s, setting 0.5 s.', '- table: optimal']),
])  # fmt: skip
def test_how_it_was_calibrated(calibration, lines, tmp_path):
    writer = ResultWriter(name='x', method='mse', calibration=calibration)
    writer.add_image('Set5', 'baby', psnr=30.0, ssim=0.9)
    writer.write(tmp_path)
    assert json.loads((tmp_path / 'metrics.json').read_text())['calibration'] == calibration
    page = (tmp_path / 'metrics.md').read_text().splitlines()
    assert [line for line in page if line.startswith(('Calibrated', '- '))] == lines
