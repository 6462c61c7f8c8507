"""Patch-wise inference: where patches lie, how outputs are merged, what is refused."""

from __future__ import annotations

import pytest
import torch
from helpers import images, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from basicsr_quant.errors import QuantError
from basicsr_quant.network.patches import Patchwise, patch_starts, spans


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 300), st.integers(1, 96), st.data())
def test_patches_are_whole_and_their_parts_tile_the_side(length, size, data):
    stride = data.draw(st.integers(1, size))
    found = spans(length, size, stride)
    starts = patch_starts(length, size, stride)
    assert [s for s, _, _ in found] == starts and starts == sorted(set(starts))
    assert all(b - a <= stride for a, b in zip(starts, starts[1:]))
    covered = [pixel for _, first, end in found for pixel in range(first, end)]
    assert covered == list(range(length))
    reach = size if len(found) > 1 else length
    assert all(start <= first < end <= start + reach for start, first, end in found)
    assert starts[-1] + size == length or length <= size


class Enlarge(nn.Module):
    """A pixel's value over a 7x7 neighbourhood, each pixel repeated."""

    def __init__(self, scale: int) -> None:
        super().__init__()
        self.blur = nn.Conv2d(3, 3, 7, padding=3)
        self.scale = scale
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x):
        self.seen.append(tuple(x.shape[-2:]))
        return nn.functional.interpolate(self.blur(x), scale_factor=self.scale)


@pytest.mark.parametrize('scale', [1, 2, 3])
@pytest.mark.parametrize(('height', 'width'), [(40, 61), (16, 50), (33, 16), (100, 20)])
@torch.no_grad()
def test_enough_overlap_is_seamless(height, width, scale):
    net = Enlarge(scale)
    image = torch.rand(1, 3, height, width)
    whole = net(image)
    net.seen.clear()
    torch.testing.assert_close(Patchwise(net, 16, 10)(image), whole)  # half of 6 pixels is the radius 3
    assert set(net.seen) == {(16, 16)}
    off = (Patchwise(net, 16, 16)(image) - whole).abs().amax((0, 1))
    assert off.max() > 0 and off.argmax(1).max() > 0


def test_small_images_run_whole_and_thin_ones_along_their_length():
    net = Enlarge(2)
    for shape, seen in (((12, 12), {(12, 12)}), ((8, 40), {(8, 16)})):
        net.seen.clear()
        out = Patchwise(net, 16, 12)(torch.rand(2, 3, *shape))
        assert set(net.seen) == seen and out.shape == (2, 3, 2 * shape[0], 2 * shape[1])


def test_modes_follow():
    net = tiny()
    patchwise = Patchwise(net, 8, 8)
    patchwise.eval()
    assert not net.training
    patchwise.train()
    assert net.training


@pytest.mark.parametrize('net', [nn.Flatten(), nn.Conv2d(3, 3, 3), nn.AvgPool2d(2)], ids=['vector', 'border', 'small'])
def test_outputs_that_cannot_be_merged_are_refused(net):
    with pytest.raises(QuantError, match=r'quant\.patch: a patch of 8x8 gave an output of shape'):
        Patchwise(net, 8, 8)(images(1, 20))
