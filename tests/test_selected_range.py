"""CADyQ's quantizer against the published module, and its gradients against the form that runs every candidate."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_close, images, reference
from torch import Tensor
from torch.nn import functional

from basicsr_quant.quantizers import QuantContext, SelectedRange, complexity, fake_quantize, image_gradients, select
from basicsr_quant.quantizers.selected_range import _products, _products_in_chunks


def quantizer(alphas=(2.0, 3.0, 5.0), candidates=(4, 6, 8), channels: int = 16, slopes: Tensor | None = None):
    q = SelectedRange(candidates, channels, 'layer')
    q.alphas.data.copy_(torch.tensor(alphas))
    q.context = QuantContext()
    q.context.begin(torch.zeros(1 if slopes is None else len(slopes), 3, 8, 8))
    if slopes is not None:
        q.context.measure('image_gradients', lambda image: slopes)
    return q


def every_candidate(q: SelectedRange, x: Tensor) -> tuple[Tensor, Tensor]:
    """The published form: K quantized tensors, mixed with hard weights whose gradient is that of p. Returns p too."""
    p = q.probabilities(x)
    hard = functional.one_hot(p.argmax(dim=1), p.shape[1])
    weights = (hard - p).detach() + p
    alphas = q.bounds(x)[1]
    mixed = torch.zeros_like(x)
    for k, bits in enumerate(q.candidates):
        alpha = alphas[k]
        rounded = fake_quantize(x, -alpha, alpha, bits, zero_point='integer', narrow_range=True)
        mixed = mixed + weights[:, k].reshape(-1, *[1] * (x.dim() - 1)) * rounded
    return mixed, p


def test_selector_bits_and_output_equal_the_published_module():
    data = {k: torch.from_numpy(v) for k, v in reference().items()}
    q = quantizer(slopes=data['cadyq_grad'])
    q.selector.weight.data.copy_(data['cadyq_w'])
    q.selector.bias.data.copy_(data['cadyq_b'])
    assert_close(q(data['x']), data['cadyq_out'], rtol=1e-6, atol=1e-6)
    bits = q.context.bits['layer']
    assert torch.equal(bits, data['cadyq_bits'])
    assert_close(bits / q.context.expected_bits['layer'], data['cadyq_wbits'], rtol=1e-6)


def test_starts_at_the_highest_candidate():
    q = quantizer(channels=4)
    p = q.probabilities(images(1).repeat(1, 2, 1, 1)[:, :4])
    assert_close(p, [[0.2119, 0.2119, 0.5761]], atol=1e-4)
    assert float(q.selector.weight.min()) == float(q.selector.weight.max()) == 1.0


CASES = {
    'small': ((3, 4, 5, 5), (2.0, 3.0, 5.0), (4, 6, 8)),
    'several chunks': ((2, 4, 120, 90), (1.0, 0.7), (2, 8)),
    'five candidates': ((6, 4, 9, 7), (0.5, 0.6, 0.7, 0.8, 2.5), (2, 3, 4, 5, 8)),
    'single candidate': ((2, 4, 3, 3), (0.9,), (5,)),
    'one pixel': ((2, 4, 1, 1), (0.9, 1.0), (5, 6)),
}


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('case', CASES)
def test_gradients_equal_the_form_that_runs_every_candidate(case, dtype):
    shape, alphas, candidates = CASES[case]
    draw = torch.Generator().manual_seed(3)
    slopes = torch.rand(shape[0], 2, generator=draw) * 20
    x = (torch.randn(shape, generator=draw) * 1.5).to(dtype)
    loss = torch.randn(shape, generator=draw).to(dtype)
    weight = torch.randn(len(candidates), shape[1] + 2, generator=draw)
    found = []
    for forward in (lambda q, x: (q(x), None), every_candidate):
        q = quantizer(alphas, candidates, shape[1], slopes)
        q.selector.weight.data.copy_(weight)
        given = x.clone().requires_grad_()
        y = forward(q, given)[0]
        (y * loss).sum().backward()
        found.append([y, given.grad, q.alphas.grad, q.selector.weight.grad, q.selector.bias.grad])
        if len(candidates) == 1:  # nothing to choose, and softmax of one has no gradient
            found[-1] = found[-1][:3]
    for ours, plain in zip(*found):
        assert ours is not None and ours.dtype == plain.dtype
        assert_close(ours, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))
    if case != 'single candidate':
        assert found[0][3].abs().max() > 0


def test_gradient_of_probabilities_is_that_of_each_candidate():
    draw = torch.Generator().manual_seed(0)
    x, grad = torch.randn(4, 3, 6, 6, generator=draw), torch.randn(4, 3, 6, 6, generator=draw)
    alphas, candidates, chosen = torch.tensor([0.5, 1.0, 2.0]), (2, 4, 8), torch.tensor([0, 2, 1, 2])
    p = torch.full((4, 3), 1 / 3, requires_grad=True)
    each = [fake_quantize(x, -a, a, b, zero_point='integer', narrow_range=True) for a, b in zip(alphas, candidates)]
    q = torch.stack([each[k][i] for i, k in enumerate(chosen)])
    select(q, x, p, chosen, alphas, candidates).backward(grad)
    assert_close(p.grad, torch.stack([(grad * e).sum((1, 2, 3)) for e in each], dim=1), rtol=1e-4, atol=1e-4)


def test_both_ways_to_the_products_agree_and_take_any_layout():
    draw = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(3, 8, 70, 70, generator=draw) for _ in range(2))
    alphas, steps, chosen = torch.tensor([0.5, 1.0]), (7, 127), torch.tensor([1, 0, 1])
    rows = [fake_quantize(r, -alphas[k], alphas[k], (4, 8)[k], zero_point='integer', narrow_range=True)
            for r, k in zip(x, chosen)]  # fmt: skip
    q = torch.stack(rows)
    wanted = _products(grad.double(), q.double(), x.double(), chosen, alphas.double(), steps)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = [t.contiguous(memory_format=layout) for t in (grad, q, x)]
        assert_close(_products_in_chunks(*given, chosen, alphas, steps).double(), wanted, rtol=1e-4, atol=1e-3)


def test_only_the_chosen_candidate_runs_without_gradients(monkeypatch):
    calls = []
    original = fake_quantize
    monkeypatch.setattr(
        'basicsr_quant.quantizers.selected_range.fake_quantize',
        lambda *args, **kwargs: calls.append(args[3].flatten().tolist()) or original(*args, **kwargs),
    )
    monkeypatch.setattr('basicsr_quant.quantizers.selected_range.select', None)
    q = quantizer(channels=4)
    with torch.no_grad():
        q(torch.randn(1, 4, 6, 6))
    assert calls == [[8.0]]


def test_several_parts_of_an_image_read_its_gradients():
    q = quantizer(channels=4, slopes=torch.tensor([[1.0, 0.0], [50.0, 0.0]]))
    q.selector.weight.data.zero_()
    q.selector.weight.data[0, 0] = -1.0  # a gradient of 50 speaks against the lowest candidate
    q.selector.bias.data.copy_(torch.tensor([20.0, 0.0, 0.0]))
    q(torch.randn(6, 4, 5, 5))
    assert q.context.bits['layer'].tolist() == [4.0] * 3 + [6.0] * 3


def test_image_gradients_of_ramps():
    ramp = torch.arange(8.0).expand(2, 3, 8, 8) / 8
    ramp = torch.stack([ramp[0], ramp[0].transpose(1, 2)])
    assert_close(image_gradients(ramp), [[109.375, 0.0], [0.0, 109.375]], rtol=1e-5)
    assert_close(complexity(ramp), [54.6875, 54.6875], rtol=1e-5)


def test_a_range_stays_open():
    q = quantizer()
    q.set_range(torch.tensor(-3.0), torch.tensor(2.0))
    assert_close(q.bounds(None)[1], [3.0, 3.0, 3.0])
    q.alphas.data.fill_(-1.0)
    q.clamp_range()
    assert (q.alphas > 0).all()
    assert [p is q.alphas for p in q.range_parameters()] == [True]
