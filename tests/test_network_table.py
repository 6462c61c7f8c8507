"""The tool behind the README's table of networks, on made-up images."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from basicsr_quant import compat

pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / 'tools'))
    return __import__('network_table')


def test_random_and_given_weights(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    import torch

    draw = np.random.default_rng(0)
    for folder, side in (('calib/LR_bicubic/X4', 4), ('benchmarks/Set5/LR_bicubic/X4', 4), ('benchmarks/Set5/HR', 16)):
        (tmp_path / folder).mkdir(parents=True)
        for name in 'ab':
            pixels = draw.integers(0, 256, (side, side, 3), dtype=np.uint8)
            cv2.imwrite(str(tmp_path / folder / f'{name}.png'), np.kron(pixels, np.ones((4, 4, 1), np.uint8)))
    monkeypatch.setenv('BASICSR_QUANT_DATA', str(tmp_path))
    out = tmp_path / 'out'

    def run(*more: str) -> list[dict[str, Any]]:
        argv = ['tool', '--networks', 'EDSR-baseline_x4', '--bits', '8,8', '--out', str(out), '--crop', '16', *more]
        monkeypatch.setattr(sys, 'argv', argv)
        tool.main()
        return [json.loads(line) for line in (out / 'results.jsonl').read_text().splitlines()]

    rows = run('--variants', 'minmax')
    assert [(r['weights'], r['fp32'], r['quantized'] + r['left']) for r in rows] == [('random', None, 37)]
    assert 25 < rows[0]['psnr'] < 90
    again = run('--variants', 'minmax', 'percentile')
    assert again[0] == rows[0] and [r['variant'] for r in again] == ['minmax', 'percentile']
    weights = tmp_path / 'weights'
    weights.mkdir()
    torch.save({'params': tool.build('EDSR-baseline_x4', None, out).state_dict()}, weights / 'EDSR-baseline_x4.pth')
    (out / 'results.jsonl').unlink()
    (given,) = run('--variants', 'mse')
    assert given['weights'] == 'file' and abs(given['fp32'] - given['psnr']) < 1
    capsys.readouterr()
    monkeypatch.setattr(sys, 'argv', ['tool', '--table', '--out', str(out)])
    tool.main()
    assert capsys.readouterr().out.splitlines()[2].startswith('| EDSR-baseline_x4 | body | file |')
