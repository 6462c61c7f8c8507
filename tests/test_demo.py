"""The demo's parts: its data, its network and what the card says of it, its table."""

from __future__ import annotations

import hashlib
import re
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from basicsr_quant import compat

pytest.importorskip('skimage')
pytestmark = pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')
TOOLS = Path(__file__).parents[1] / 'tools'
WEIGHTS, CARD = TOOLS / 'demo' / 'EDSR_demo_x2.pth', TOOLS / 'demo' / 'CARD.md'


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the scripts as they import each other: from their own folder."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import demo
    import photographs
    import train_demo_network

    yield {'demo': demo, 'photographs': photographs, 'training': train_demo_network}
    for name in ('demo', 'demo_picture', 'photographs', 'train_demo_network', 'dead_leaves'):
        sys.modules.pop(name, None)


def test_held_out_photographs_are_in_no_training_list(tools):
    lists = tools['photographs']
    learned = {name for names in lists.REDISTRIBUTABLE.values() for name in names} | set(lists.TRAINING)
    assert {'coffee', 'chelsea', 'rocket'} == {Path(name).stem for name in lists.HELD_OUT}
    assert not {Path(n).stem for n in learned} & {Path(n).stem for n in lists.HELD_OUT}


def test_card_describes_the_file():
    card, data = CARD.read_text(), WEIGHTS.read_bytes()
    assert hashlib.sha256(data).hexdigest() in card
    assert f'{len(data):,} bytes' in card and len(data) < 1_000_000


def test_network_stands_two_decibels_above_bicubic_as_the_card_says(tools):
    compat.apply()
    from basicsr.archs.edsr_arch import EDSR

    network = EDSR(**tools['training'].NETWORK)
    network.load_state_dict(torch.load(WEIGHTS, weights_only=True)['params'])
    figures = tools['training'].measure(network)
    bicubic, ours = np.mean(list(figures.values()), axis=0)
    assert ours - bicubic >= 2.0
    mean = re.search(r'\| mean \| ([0-9.]+) \| ([0-9.]+) \|', CARD.read_text())
    assert mean and [float(m) for m in mean.groups()] == pytest.approx([bicubic, ours], abs=0.006)


def test_data_are_built_whole_or_not_at_all(tools, tmp_path, monkeypatch):
    demo = tools['demo']
    compat.apply()
    monkeypatch.setattr(demo, 'DATA', tmp_path / 'demo')
    monkeypatch.setattr(demo, 'TRAINING', ('astronaut.png', 'ihc.png'))
    demo.build_data()
    keys = [
        (tmp_path / 'demo' / f'train_{n}.lmdb' / 'meta_info.txt').read_text() for n in ('HR_sub', 'LR_bicubic_X2_sub')
    ]
    names = [[line.split()[0] for line in text.splitlines()] for text in keys]
    assert names[0] == names[1] and len(names[0]) == 2 * 16
    assert {'astronaut', 'ihc'} == {re.sub(r'^\d+_|_s\d+\.png$', '', name) for name in sorted(names[0])[:8]}
    lr = cv2.imread(str(tmp_path / 'demo/held_out/LR_bicubic/X2/chelseax2.png'))
    assert lr.shape == (150, 225, 3)

    monkeypatch.setattr(demo, 'TRAINING', ('no_such_photograph.png',))
    with pytest.raises(demo.QuantError, match='no_such_photograph'):
        demo.build_data()
    assert (tmp_path / 'demo' / 'held_out').is_dir(), 'the data of before are still whole'


def test_table_lines_up(tools):
    images = {name: {'psnr': 30.0} for name in ('coffee', 'chelsea', 'rocket')}
    row = {'label': 'ODM W4A4', 'psnr': 30.0, 'ssim': 0.9, 'bits': '4/4', 'weight_bytes': 123456, 'images': images}
    lines = tools['demo'].table([row, {**row, 'label': 'bicubic', 'weight_bytes': None}]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert '123,456' in lines[2] and '30.00' in lines[2]
