"""The commands that only look: ``basicsr plan`` and ``basicsr bench``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from basicsr_quant import compat
from basicsr_quant.cli import main

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')


@pytest.fixture
def file(options: dict[str, Any], option_file: Any) -> str:
    options['network_g'].update(num_block=2)
    options['quant'] = {'method': 'odm', 'w_bits': 4, 'a_bits': 4, 'layers': {'body.1.conv2': 'fp'}}
    return str(option_file(options))


def test_plan_says_what_and_why(file: str, capsys: Any) -> None:
    assert main(['plan', '-opt', file, '--all']) == 0
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert re.search(r' 4 +4 +odm, input >= 0 +body', rows['body.0.conv2'])
    assert re.search(r' fp +fp .*layers: ', rows['body.1.conv2'])
    assert 'outside the body' in rows['conv_first']
    assert 'quantized: 3 of 8 layers' in rows['quantized:']


@pytest.mark.parametrize('change', [{'type': 'EDSRR'}, {'num_feat': 'x'}])
def test_plan_refuses_in_one_sentence(
    change: dict[str, Any], options: dict[str, Any], option_file: Any, capsys: Any
) -> None:
    options['network_g'].update(change)
    assert main(['plan', '-opt', option_file(options)]) == 2
    error = capsys.readouterr().err
    assert error.startswith('basicsr: error: network_g') and error.count('\n') == 1


@pytest.mark.slow
def test_bench_prints_ratios(file: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv('PYTHONPATH', str(Path(compat.__file__).parents[2]))
    flags = ['--methods', 'odm', 'lsq', '--pairs', '1', '--batch', '2', '--patch', '48']
    assert main(['bench', '-opt', file, *flags]) == 0
    out = capsys.readouterr().out
    for method in ('odm', 'lsq'):
        ratio, memory = re.search(rf'\| {method} \| ([0-9.]+)x \| .* \| ([0-9.]+)x \|', out).groups()  # type: ignore[union-attr]
        assert float(ratio) > 0 and float(memory) > 0


@pytest.mark.slow
def test_bench_of_a_calibration(file: str, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setenv('PYTHONPATH', str(Path(compat.__file__).parents[2]))
    flags = ['--methods', 'minmax', 'percentile', '--pairs', '1', '--calibration', '2', '--patch', '32']
    assert main(['bench', '-opt', file, *flags]) == 0
    out = capsys.readouterr().out
    assert 'calibration with 2 images of 1x3x32x32 on cpu' in out
    for method in ('minmax', 'percentile'):
        ratio = re.search(rf'\| {method} \| ([0-9.]+)x \| .* \| \+[0-9]+ MiB \|', out).group(1)  # type: ignore[union-attr]
        assert float(ratio) > 0


@pytest.mark.slow
def test_bench_of_every_engine(file: str, capsys: Any, monkeypatch: Any) -> None:
    for package in ('onnx', 'onnxscript', 'onnxruntime'):
        pytest.importorskip(package)
    from basicsr_quant.deploy import bench

    monkeypatch.setattr(bench, '_compiled', lambda net, image, report: None)  # asks for a C++ compiler
    monkeypatch.setattr(bench, 'has_int8_instructions', lambda: False)
    monkeypatch.setenv('PYTHONPATH', str(Path(compat.__file__).parents[2]))
    assert main(['bench', '-opt', file, '--deploy', '--size', '24', '32', '--rounds', '1', '--threads', '1']) == 0
    out = capsys.readouterr().out
    assert 'WARNING: this processor has no VNNI' in out and 'input 1x3x24x32' in out
    rows = [[cell.strip() for cell in line.split('|')[1:-1]] for line in out.splitlines() if line.startswith('| ')]
    kinds = {(row[0], row[1]) for row in rows}
    assert {('PyTorch eager', 'fp32'), ('ONNX Runtime', 'fp32'), ('ONNX Runtime', 'int8')} <= kinds
    cells = {(row[0], row[1]): row for row in rows}
    plain, own = cells['ONNX Runtime', 'fp32'], cells['ONNX Runtime', 'int8']
    assert all(int(row[7].replace(',', '')) > 0 and int(row[8]) >= 0 for row in (plain, own))
    assert all(1 <= float(own[bound].rstrip('x')) <= 4 and plain[bound] == '-' for bound in (4, 5))


@pytest.mark.parametrize('count', ['0', '-3'])
def test_bench_needs_an_image(count: str, file: str, capsys: Any) -> None:
    assert main(['bench', '-opt', file, '--methods', 'minmax', '--calibration', count]) == 2
    assert f'--calibration {count}: a whole number of at least 1 is needed' in capsys.readouterr().err
