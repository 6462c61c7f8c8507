"""Filter pruning: importance against sampling, dependencies by running, and the smaller network through the host."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

pytest.importorskip('torch_pruning', reason='torch-pruning is not installed')

from basicsr_quant.errors import QuantError
from basicsr_quant.sparsity.filter_groups import difference, find_groups
from basicsr_quant.sparsity.filter_importance import mean_activation, mean_magnitude, mean_square, slope_of
from basicsr_quant.sparsity.filter_options import FilterPruning, read_filter_pruning
from basicsr_quant.sparsity.filter_pruning import prune
from basicsr_quant.sparsity.widths import set_widths, widths_of

# ------------------------------------------------------------------------------------------------------ importance

POINTS = [(0.7, 1.3), (-1.1, 0.4), (0.2, -2.0), (-3.0, 0.5), (0.5, 0.0), (-0.5, 0.0)]


@pytest.mark.parametrize('slope', [0.0, 0.25, 1.0, -0.5])
@pytest.mark.parametrize(('beta', 'gamma'), POINTS)
def test_expectations_are_those_of_a_normal_distribution(beta, gamma, slope):
    # The quantiles of the distribution, evenly: a sum over them is an integral without chance.
    levels = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    z = beta + abs(gamma) * torch.special.ndtri(levels)
    f = torch.where(z > 0, z, slope * z)
    at = torch.tensor(beta, dtype=torch.float64), torch.tensor(gamma, dtype=torch.float64), slope
    assert float(mean_activation(*at)) == pytest.approx(float(f.mean()), abs=2e-5)
    assert float(mean_magnitude(*at)) == pytest.approx(float(f.abs().mean()), abs=2e-5)
    assert float(mean_square(*at)) == pytest.approx(float(f.square().mean()), rel=2e-4, abs=2e-5)


def test_without_spread_the_expectation_is_the_value():
    beta = torch.tensor([0.5, -0.5], dtype=torch.float64)
    assert mean_activation(beta, torch.zeros(2, dtype=torch.float64), 0.0).tolist() == pytest.approx([0.5, 0.0])


@pytest.mark.parametrize(
    ('activation', 'slope'),
    [(nn.ReLU(), 0.0), ('relu', 0.0), (nn.LeakyReLU(0.1), 0.1), (nn.PReLU(1, 0.3), 0.3), (None, 1.0), ('add', 1.0),
     (nn.GELU(), None), ('sigmoid', None)],
)  # fmt: skip
def test_slopes(activation, slope):
    found = slope_of(activation)
    assert found is None if slope is None else float(found) == pytest.approx(slope)


# ---------------------------------------------------------------------------------------------------- dependencies


class Block(nn.Module):
    def __init__(self, width: int, activation: nn.Module) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.act = activation
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return x + self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))


class Net(nn.Module):
    """A tiny SRResNet; BatchNorms as training leaves them."""

    def __init__(self, width: int = 8, blocks: int = 2, activation: type[nn.Module] = nn.PReLU, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.body = nn.Sequential(*(Block(width, activation(width) if activation is nn.PReLU else activation())
                                    for _ in range(blocks)))  # fmt: skip
        self.up = nn.Sequential(nn.Conv2d(width, 4 * width, 3, padding=1), nn.PixelShuffle(2))
        self.last = nn.Conv2d(width, 3, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
                nn.init.normal_(module.running_mean, std=0.3)
                nn.init.uniform_(module.running_var, 0.3, 2.0)

    def forward(self, x):
        return self.last(self.up(self.body(self.first(x))))


def test_who_goes_alone_and_who_with_others():
    found = find_groups(Net())
    alone = {group.convs[0] for group in found.groups if len(group.convs) == 1}
    assert alone == {'body.0.conv1', 'body.1.conv1'}
    (joint,) = (group for group in found.groups if len(group.convs) > 1)
    assert set(joint.convs) == {'first', 'body.0.conv2', 'body.1.conv2'} and joint.size == 8
    output = 'without these filters the output has another shape'
    assert found.left == {'up.0': 'its channels are shuffled into pixels', 'last': output}


class Shuffled(nn.Module):
    """Channels that are shuffled into pixels behind an activation, which the data flow alone does not show."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, padding=1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        return self.c(nn.functional.pixel_shuffle(torch.relu(self.b(torch.relu(self.a(x)))), 2))


class Split(Shuffled):
    def forward(self, x):
        one, two = torch.split(self.b(torch.relu(self.a(x))), (4, 12), dim=1)
        return self.c(one) + two[:, :3]


@pytest.mark.parametrize('kind', [Shuffled, Split])
def test_what_cannot_go_is_found_out_by_running(kind):
    found = find_groups(kind())
    assert [group.convs for group in found.groups] == [('a',)]
    assert {'b', 'c'} <= set(found.left)


def test_the_difference_shows_a_wrong_removal():
    with pytest.raises(QuantError, match=r'another shape|something else|does not run'):
        difference(Shuffled().eval(), [{'b': [5]}])


# ------------------------------------------------------------------------------------------------------- the whole


@pytest.mark.parametrize('joint', [False, True])
@pytest.mark.parametrize('ranking', ['global', 'layer'])
@pytest.mark.parametrize('method', ['bn_filter', 'magnitude', 'random'])
def test_pruned_networks_compute_what_masked_ones_do(method, ranking, joint):
    net = Net().eval()
    options = FilterPruning(method, 0.5, ranking, joint, compensate=False)
    report = prune(net, options)
    whole = 16 + 24 * joint
    assert report.prunable == whole and 0 < report.removed <= whole / 2 + 3
    assert report.difference < 1e-9
    assert net(torch.rand(1, 3, 9, 7)).shape == (1, 3, 18, 14)
    assert report.traced_after.macs < report.traced_before.macs
    again = set_widths(Net(seed=5), report.widths)
    again.load_state_dict(net.state_dict(), strict=True)
    image = torch.rand(1, 3, 12, 12)
    torch.testing.assert_close(again.eval()(image), net(image), rtol=0, atol=0)


@pytest.mark.parametrize('multiple', [1, 2, 4])
@pytest.mark.parametrize('ratio', [0.0, 0.25, 0.9])
def test_widths_keep_to_the_multiple(ratio, multiple):
    net = Net()
    report = prune(net, FilterPruning(ratio=ratio, multiple_of=multiple))
    for name, width in report.widths.items():
        assert width % multiple == 0 and width >= multiple, name
    assert widths_of(net) == report.after
    assert report.removed <= math.ceil(ratio * report.prunable)


def test_the_least_important_go():
    net = Net(activation=nn.ReLU)
    norm = net.body[0].bn1
    with torch.no_grad():
        norm.weight.fill_(0.1)
        norm.bias.copy_(torch.tensor([3.0, -3.0, 2.0, -2.0, 1.0, -1.0, 0.5, -0.5]))  # negative ones never fire
    expected = net.body[0].conv1.weight[[0, 2, 4, 6]].clone()
    prune(net, FilterPruning(ratio=0.5, ranking='layer'))
    assert torch.equal(net.body[0].conv1.weight, expected)


def test_compensation_keeps_the_mean_of_what_follows():
    net = Net(activation=nn.ReLU, blocks=1).eval()
    block = net.body[0]
    with torch.no_grad():
        block.bn1.weight.zero_()  # constant channels: what is removed is exactly its mean
    image = torch.rand(1, 3, 16, 16)
    expected = net(image)
    plain, made_up = copy.deepcopy(net), copy.deepcopy(net)
    prune(plain, FilterPruning(ratio=0.5, compensate=False))
    report = prune(made_up, FilterPruning(ratio=0.5, compensate=True))
    assert report.compensated == ['body.0.conv1']
    inner = (..., slice(6, -6), slice(6, -6))  # zeros are padded at the border, where the constant was
    torch.testing.assert_close(made_up(image)[inner], expected[inner], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(plain(image)[inner], expected[inner], rtol=1e-4, atol=1e-5)


def test_a_network_without_batch_norm_is_told_what_works():
    with pytest.raises(QuantError, match="by BatchNorm, and Shuffled has none; use magnitude"):
        prune(Shuffled(), FilterPruning())
    assert prune(Shuffled(), FilterPruning('magnitude', 0.5)).widths == {'a': 4}


@pytest.mark.parametrize(
    ('block', 'said'),
    [
        ({'method': 'bn_filer'}, "sparsity.method: 'bn_filer' given (did you mean 'bn_filter'?)"),
        ({}, 'sparsity.method is missing'),
        ({'method': 'magnitude', 'ratio': 1}, 'sparsity.ratio: 1.0 given, a number from 0 to 0.99 needed'),
        ({'method': 'magnitude', 'magnitude': {'moment': 2}}, 'sparsity.magnitude.moment is not an option'),
        ({'method': 'magnitude', 'bn_filter': {}}, "sparsity.bn_filter is given, but sparsity.method is 'magnitude'"),
        ({'method': 'bn_filter', 'bn_filter': {'moment': 3}}, 'sparsity.bn_filter.moment: 3 given, allowed: 1 | 2'),
        ({'method': 'bn_filter', 'layers': {'a': 'fp'}}, 'sparsity.layers must hold'),
    ],
)
def test_bad_options_are_one_sentence(block, said):
    with pytest.raises(QuantError) as error:
        read_filter_pruning(block)
    assert said in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('widths', 'said'),
    [({'nothing': 4}, "'nothing' is no convolution of Net"), ({'first': 9}, '1 to 8 needed'),
     ({'first': 4}, 'do not fit together'), ({'body.0.conv1': 0}, '1 to 8 needed')],
)  # fmt: skip
def test_widths_that_cannot_be(widths, said):
    with pytest.raises(QuantError, match=said):
        set_widths(Net(), widths)
