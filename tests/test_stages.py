"""Stages of a calibration, and tensors kept on disk."""

from contextlib import closing
from typing import ClassVar

import pytest
import torch

from basicsr_quant.network.stages import Stages
from basicsr_quant.network.tensor_store import TensorStore

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.uint8, torch.int64, torch.bool)


class Bar:
    made: ClassVar[list] = []

    def __init__(self, desc, total):
        self.desc, self.total, self.steps, self.closed = desc, total, 0, False
        self.made.append(self)

    def update(self):
        self.steps += 1

    def close(self):
        self.closed = True


def test_a_stage_shows_a_bar_counts_its_steps_and_adds_up_its_time():
    Bar.made = []
    stages = Stages(Bar)
    assert list(stages.over('observing', [1, 2, 3])) == [1, 2, 3]
    with stages.stage('choosing') as step:
        step()
    with stages.stage('observing'):
        pass
    assert [(b.desc, b.total, b.steps, b.closed) for b in Bar.made] == [
        ('observing', 3, 3, True), ('choosing', None, 1, True), ('observing', None, 0, True)
    ]  # fmt: skip
    assert list(stages.seconds) == ['observing', 'choosing'] and all(s >= 0 for s in stages.seconds.values())


def test_a_stage_that_fails_closes_its_bar():
    Bar.made = []
    with pytest.raises(KeyError), Stages(Bar).stage('broken'):
        raise KeyError
    assert Bar.made[0].closed


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
def test_a_store_gives_back_what_it_took(dtype):
    given = [(torch.randn(shape) * 50).to(dtype) for shape in [(2, 3, 4), (), (0, 3), (5,)]]
    with closing(TensorStore()) as store:
        for tensor in given:
            store.append(tensor.transpose(0, -1) if tensor.dim() > 1 else tensor)
        assert len(store) == len(given)
        for index in (3, 0, 2, 1, 0):  # in any order, again and again
            want = given[index].transpose(0, -1) if given[index].dim() > 1 else given[index]
            assert torch.equal(store[index], want) and store[index].dtype == dtype
        store[0].zero_()
        store.append(torch.ones(2))  # reading leaves the place to write alone
        assert torch.equal(store[4], torch.ones(2)) and not torch.equal(store[0], torch.zeros_like(store[0]))
