"""Packed N:M weights: an exact round trip for every shape, and bytes as counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from basicsr_quant import compat
from basicsr_quant.config import read_config
from basicsr_quant.cost import cost
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import quantize
from basicsr_quant.models.checkpoint import read_network_file, save_network_file
from basicsr_quant.network.masking import masks, start_masks
from basicsr_quant.network.sparsity_plan import SparseLayer
from basicsr_quant.network.trace import trace
from basicsr_quant.nn import GROUPS
from basicsr_quant.nn.weight_mask import rank_in_groups
from basicsr_quant.sparsity import read_sparsity
from basicsr_quant.sparsity.storage import pack_rows, unpack_rows

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 70), st.integers(1, 3), st.integers(1, 3)),
    spatial=st.integers(0, 2), m=st.sampled_from(GROUPS), n=st.integers(1, 32), dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99), zeros=st.booleans(),
)  # fmt: skip
@settings(deadline=None, max_examples=100)
def test_what_is_packed_comes_back_to_the_bit(shape, spatial, m, n, dtype, seed, zeros):
    shape, n = shape[: 2 + spatial], min(n, m)
    rows = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    if zeros:
        rows[rows < 0] = 0.0  # kept weights may be zeros
    keep = rank_in_groups(rows, m) < n
    layer = SparseLayer('a', shape[1], 1, n)
    values, places = pack_rows(rows, keep, layer, m)
    found, kept = unpack_rows(values, places, shape, layer, m)
    assert torch.equal(kept, keep) and found.dtype == dtype and found.shape == rows.shape
    assert torch.equal(found, torch.where(keep, rows, torch.zeros((), dtype=dtype)))
    stored = values.numel() * values.element_size() + places.numel()
    assert stored == layer.stored_bytes(m, rows.numel(), 8 * rows.element_size())


@pytest.mark.parametrize(
    ('m', 'n', 'bits'),  # of the places of a row of 64
    [(4, 2, 64), (4, 1, 32), (8, 2, 48), (32, 1, 10), (32, 4, 40), (32, 8, 64), (32, 32, 0)],
)
def test_places_take_indices_or_one_bit_a_weight_whichever_is_less(m, n, bits):
    assert SparseLayer('a', 64, 1, n).row_place_bits(m) == bits


class Mixed(nn.Module):
    """Widths that M does not divide, and a transposed convolution with groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 36, 3, padding=1)
        self.wide = nn.Conv2d(36, 20, 3, padding=1)
        self.up = nn.ConvTranspose2d(20, 20, 4, 2, 1, groups=2)
        self.last = nn.Conv2d(20, 3, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.up(self.wide(self.first(x))))


@pytest.mark.parametrize('m', [4, 32])
def test_a_file_is_smaller_reads_like_any_other_and_has_the_bytes_that_cost_counts(m, tmp_path):
    torch.manual_seed(0)
    net = Mixed()
    plan = read_config({'method': 'none'}).plan(
        net, trace(net), sparsity=read_sparsity({'method': 'one_shot', 'M': m, 'budget': 0.4})
    )
    quantize(net, plan)
    start_masks(net)
    assert list(masks(net)) == ['wide', 'up']
    state = net.state_dict()
    whole, packed = str(tmp_path / 'whole.pth'), str(tmp_path / 'packed.pth')
    save_network_file(whole, {'params': state, 'params_ema': state}, plan, {})
    save_network_file(packed, {'params': state, 'params_ema': state}, plan, {}, packed=True)
    raw = torch.load(packed, weights_only=True)['params']
    masked = sum(t.numel() * t.element_size() for k, t in raw.items() if 'mask.kept' not in k)
    assert masked == cost(net, plan, scale=2).masked_weight_bytes
    x = torch.rand(1, 3, 8, 8)
    wanted = net.eval()(x)
    for key in ('params', 'params_ema'):
        found = read_network_file(packed).state(key)[1]
        assert found.keys() == state.keys()
        again = Mixed()
        quantize(again, plan)
        again.load_state_dict(found)
        assert torch.equal(again.eval()(x), wanted)
        for name, layer in (('wide', net.wide), ('up', net.up)):
            assert torch.equal(found[f'{name}.weight'], layer.quantized_weight())
    broken = torch.load(packed, weights_only=True)
    broken['params']['up.weight_mask.values'] = broken['params']['up.weight_mask.values'][1:]
    torch.save(broken, packed)
    with pytest.raises(QuantError, match='packed weights that do not fit'):
        read_network_file(packed)


@pytest.mark.skipif(not compat.has_host(), reason='BasicSR is not installed')
@pytest.mark.parametrize('quant', [False, True], ids=['alone', 'with quant'])
def test_training_leaves_a_packed_file_that_tests_the_same(
    quant: bool, options: dict[str, Any], images: Path, option_file: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    from basicsr_quant.cli import main

    monkeypatch.chdir(tmp_path)
    options['network_g']['num_feat'] = 16
    options['train']['total_iter'] = 2
    options['sparsity'] = {'method': 'sr_ste', 'M': 8, 'budget': 0.25}
    if quant:
        data = {'dataroot_lq': str(images / 'lq.lmdb'), 'io_backend': {'type': 'lmdb'}}
        options['quant'] = {'method': 'lsq', 'w_bits': 4, 'a_bits': 4, 'calibration': {'dataset': data}}
    file = option_file(options)
    assert main(['train', '-opt', file]) == 0
    folder = Path('experiments/tiny/models')
    assert (folder / 'net_g_latest_packed.pth').stat().st_size < (folder / 'net_g_latest.pth').stat().st_size
    found = []
    for name in ('net_g_latest.pth', 'net_g_latest_packed.pth'):
        assert main(['test', '-opt', file, '--checkpoint', str(folder / name)]) == 0
        found.append(json.loads(Path('results/tiny/metrics.json').read_text())['datasets']['Val']['images'])
    assert [x['psnr'] for x in found[0].values()] == [x['psnr'] for x in found[1].values()]
