"""The ``sparsity:`` block and its methods on small networks: plan, masks, training, copies, files, processes."""

from __future__ import annotations

import copy
import os
import tempfile
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from helpers import BODY, images, tiny
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from basicsr_quant.config import read_config
from basicsr_quant.cost import SizedTrace, cost_of
from basicsr_quant.errors import QuantError
from basicsr_quant.methods import METHODS, calibrate, method_of, quantize
from basicsr_quant.network.masking import masked_layers, masks, masks_in_force, start_masks
from basicsr_quant.network.plan import Plan
from basicsr_quant.network.surgery import quant_layers, quant_state
from basicsr_quant.network.trace import trace
from basicsr_quant.nn import GROUPS, PriorityMask, SparsityModule, group_sizes
from basicsr_quant.report.plan_card import plan_card
from basicsr_quant.report.results import ResultWriter
from basicsr_quant.sparsity import SPARSITY, read_sparsity, sparsity_of
from basicsr_quant.sparsity.sls import unit_costs

FAST = {'score_lr': 100, 'cost_weight': 100, 'epoch': 3}


class Mixed(nn.Module):
    """Widths that M does not divide, a grouped convolution, a 1x1, linear layers, and one layer never called."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 36, 3, padding=1)
        self.wide = nn.Conv2d(36, 10, 3, padding=1, bias=False)
        self.grouped = nn.Conv2d(10, 20, 3, padding=1, groups=2)
        self.point = nn.Conv2d(20, 12, 1)
        self.linear = nn.Linear(12, 12)
        self.idle = nn.Conv2d(8, 8, 3)
        self.last = nn.Conv2d(12, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.point(torch.relu(self.grouped(torch.relu(self.wide(self.first(x))))))
        return self.last(x + self.linear(x.movedim(1, -1)).movedim(-1, 1))


def network(name: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mixed() if name == 'mixed' else tiny(channels=40)


def sparse(
    net: nn.Module, method: str = 'sls', m: int = 8, budget: float = 0.5, quant: Any = None, **options: Any
) -> tuple[nn.Module, Plan]:
    """The network with masks (and quantizers), and its plan."""
    block: dict[str, Any] = {'method': method, 'M': m, 'budget': budget}
    if options:
        block[method] = options
    plan = read_config(quant or {'method': 'none'}).plan(
        net, trace(net), training=True, sparsity=read_sparsity(block)
    )
    quantize(net, plan)
    start_masks(net)
    if plan.quantized:
        calibrate(net, plan, [images()])
    return net, plan


class Run:
    """A training by hand, as a host would do it."""

    def __init__(self, net: nn.Module, plan: Plan, lr: float = 1e-3, wrapped: nn.Module | None = None) -> None:
        assert plan.sparsity is not None
        self.net, self.runs = net, wrapped or net
        method, sparsity = method_of(plan), sparsity_of(plan.sparsity)
        groups = sparsity.parameter_groups(net, method.parameter_groups(net, net.parameters(), lr), lr)
        self.optimizer = torch.optim.Adam(groups, lr=lr, betas=(0.9, 0.99))
        self.training, self.sparse = method.attach(net, self.optimizer, 1.0), sparsity.attach(net, self.optimizer)
        net.train()

    def steps(self, count: int, first: int = 0) -> Run:
        for number in range(first, first + count):
            x = images(seed=number)
            self.optimizer.zero_grad()
            (self.runs(x) - x).abs().mean().backward()
            self.optimizer.step()
        return self


# ------------------------------------------------------------------------------------------------------------ the block


REFUSED = [
    ({'method': 'sls', 'M': 6}, 'sparsity.M: 6 given, allowed: 4 | 8 | 16 | 32; the nearest is 4'),
    ({'method': 'sls', 'M': 64}, 'the nearest is 32'),
    ({'method': 'sls', 'M': 8.5}, 'sparsity.M: 8.5 given, a whole number needed'),
    ({'method': 'sls', 'budget': 0}, 'sparsity.budget: 0 given, a share of the MACs above 0'),
    ({'method': 'sls', 'budget': 25}, 'sparsity.budget: 25 given'),
    ({'method': 'slss'}, "sparsity.method: 'slss' given (did you mean 'sls'?), allowed: one_shot | sls | sr_ste"),
    ({'M': 8}, 'sparsity.method is missing'),
    ({'method': 'sls', 'budgt': 0.1}, "sparsity.budgt is not an option (did you mean 'budget'?)"),
    ({'method': 'sls', 'one_shot': {}}, "sparsity.one_shot is given, but sparsity.method is 'sls'"),
    ({'method': 'sls', 'sls': {'growth': 0.5}}, 'sparsity.sls.growth: 0.5 given'),
    ({'method': 'one_shot', 'one_shot': {'N': 2}}, 'sparsity.one_shot.N is not an option'),
    ({'method': 'sls', 'layers': {'a': 4}}, "sparsity.layers must hold 'name glob': dense pairs"),
    ('sls', 'sparsity must hold `key: value` pairs'),
]


@pytest.mark.parametrize(('block', 'said'), REFUSED, ids=[str(r[0])[:50] for r in REFUSED])
def test_a_mistake_is_one_sentence(block, said):
    with pytest.raises(QuantError) as raised:
        read_sparsity(block)
    assert said in str(raised.value) and '\n' not in str(raised.value)


@pytest.mark.parametrize('m', GROUPS)
@pytest.mark.parametrize('method', ['sls', 'one_shot'])
def test_a_budget_below_the_least_density_is_refused_and_the_least_that_is_printed_works(method, m):
    net = network('mixed')
    traced = trace(net)
    with pytest.raises(QuantError, match='at least 0') as raised:
        read_sparsity({'method': method, 'M': m, 'budget': 0.001}).plan(net, traced)
    least = float(str(raised.value).split('give ')[1].split(' or more')[0])
    assert ('a larger M' in str(raised.value)) == (m < 32)
    plan = read_sparsity({'method': method, 'M': m, 'budget': least}).plan(net, traced)
    assert plan.share(1) <= least < plan.share(1) + 1e-4


@pytest.mark.parametrize(
    ('layers', 'said'),
    [({'boddy*': 'dense'}, "sparsity.layers: 'boddy*' matches no layer"), ({'*': 'dense'}, 'no layer is left')],
)
def test_globs(layers, said):
    net = tiny()
    with pytest.raises(QuantError, match=said.replace('*', r'\*')):
        read_sparsity({'method': 'sls', 'layers': layers}).plan(net, trace(net))


def test_what_stays_dense_and_why():
    net = network('mixed')
    plan = read_sparsity({'method': 'sls', 'M': 8, 'layers': {'po*': 'dense'}}).plan(net, trace(net))
    assert [layer.layer for layer in plan] == ['wide', 'grouped', 'linear']
    assert plan.dense == {
        'first': 'first or last layer', 'point': "layers: 'po*'", 'idle': 'the network never calls it',
        'last': 'first or last layer',
    }  # fmt: skip


def test_a_method_that_moves_all_weights_is_refused():
    net = tiny()
    with pytest.raises(QuantError, match=r"quant\.method: 'auto' given.*use mse"):
        read_config({'method': 'auto'}).plan(net, trace(net), sparsity=read_sparsity({'method': 'one_shot'}))


# --------------------------------------------------------------------------------- methods x M x networks x quantizers


LSQ = {'method': 'lsq', 'w_bits': 4, 'a_bits': 4}
TABLE = [(method, m, name, None) for method in SPARSITY for m in GROUPS for name in ('tiny', 'mixed')]
TABLE += [(method, 8, 'mixed', LSQ) for method in SPARSITY]


@pytest.mark.parametrize(
    ('method', 'm', 'name', 'quant'), TABLE,
    ids=[f'{method} M{m} {name}{" W4A4" * bool(quant)}' for method, m, name, quant in TABLE],
)  # fmt: skip
def test_after_training_every_group_keeps_n_of_m_and_the_budget_is_met(method, m, name, quant):
    net, plan = sparse(network(name), method, m, 0.6, quant, **(FAST if method == 'sls' else {}))
    Run(net, plan).steps(12)
    found = masks_in_force(net.eval(), plan).sparsity
    assert found.share() <= 0.6
    for planned in found.layers:
        layer = net.get_submodule(planned.layer)
        weight = layer.quantized_weight().detach()
        for start, size in enumerate(group_sizes(planned.channels, m)):
            group = weight[:, start * m : start * m + size]
            assert int((group != 0).sum(1).max()) <= min(planned.kept, size)
        kept = float(layer.weight_mask.keep().float().mean())
        assert kept == pytest.approx(planned.density(m))
    assert len({layer.kept for layer in found.layers}) == 1 or method == 'sls'


@pytest.mark.parametrize('method', METHODS)
def test_masks_stand_before_every_method_s_weight_quantizer(method):
    if METHODS[method].changes_weights or method in ('none', 'cfqp'):
        pytest.skip('has no quantizer of a masked weight')
    block = {'method': method, 'w_bits': 8, 'a_bits': 8}
    net = tiny(channels=8)
    plan = read_config(block).plan(net, trace(net), sparsity=read_sparsity({'method': 'one_shot', 'M': 4}))
    quantize(net, plan)
    start_masks(net)
    if method not in ('adabm', 'cadyq'):  # their calibration is a training of its own
        calibrate(net, plan, [images()])
    for layer in quant_layers(net).values():
        assert float((layer.quantized_weight() != 0).float().mean()) <= 0.25


def test_masked_layers_without_quantizers_are_no_quantized_layers():
    net, _ = sparse(tiny(), m=4)
    assert list(masked_layers(net)) == BODY and not quant_layers(net)
    assert any(name.endswith('weight_mask') for name in quant_state(net)), 'an FP32 file may lack masks'


# --------------------------------------------------------------------------------------------------------- SLS's course


def test_the_cost_is_that_of_the_plan_and_its_gradient_is_the_closed_form():
    net, plan = sparse(network('mixed'), m=8, budget=0.2, cost_weight=255.0)
    run = Run(net, plan)
    costs = unit_costs(plan.sparsity)
    assert float(costs.sum()) == pytest.approx(1.0)
    with torch.no_grad():
        for mask, value in zip(run.sparse.masks, (0.95, 0.9, 0.99, 0.8)):
            mask.scores.fill_(value)
            mask.follow_scores(1.03)
    output = run.sparse._add_cost(net, None, torch.zeros(1, requires_grad=True))
    assert float(run.sparse._figures['l_cost']) == pytest.approx(run.sparse.share(), rel=1e-5)
    output.sum().backward()
    for row, mask in zip(costs, run.sparse.masks):
        s = float(mask.scores.detach()[0])
        wanted = [sum(float(row[i]) * s ** (i - 1) for i in range(j, 8)) for j in range(1, 8)]
        torch.testing.assert_close(mask.scores.grad, torch.tensor(wanted))


def test_costs_are_exact_with_short_groups():
    _, plan = sparse(network('mixed'), m=8)
    for kept in range(1, 9):
        macs = Fraction(0)
        for layer in plan.sparsity.layers:
            sizes = group_sizes(layer.channels, 8)
            macs += Fraction(layer.macs * sum(min(kept, size) for size in sizes), layer.channels)
        assert plan.sparsity.share(kept) == pytest.approx(float(macs / sum(x.macs for x in plan.sparsity.layers)))


def test_scores_and_masks_stay_once_the_budget_is_met_while_weights_train_on():
    net, plan = sparse(tiny(channels=16), budget=0.4, **FAST)
    run = Run(net, plan)
    met = next(number for number in range(100) if not run.steps(1, number).sparse.learning)
    assert met > 1
    scores = {name: mask.scores.detach().clone() for name, mask in masks(net).items()}
    kept = {name: int(mask.kept) for name, mask in masks(net).items()}
    weight = net.body[0].conv1.weight.detach().clone()
    run.steps(8, met)
    for name, mask in masks(net).items():
        assert torch.equal(mask.scores, scores[name]) and mask.scores.grad is None and int(mask.kept) == kept[name]
    assert not torch.equal(net.body[0].conv1.weight, weight)
    assert set(run.sparse.log()) == {'density'} and run.sparse.log()['density'] <= 0.4


@pytest.mark.parametrize('m', [4, 32])
@pytest.mark.parametrize('budget', [0.7, 0.5, 0.3])
def test_a_step_that_goes_below_the_budget_gives_back_what_has_room(budget, m):
    net, plan = sparse(tiny(channels=20), m=m, budget=budget, **FAST)
    run = Run(net, plan)
    with torch.no_grad():
        for mask in run.sparse.masks:
            mask.scores.fill_(0.4)
        best = run.sparse.masks[1]
        best.scores[0] = 0.49
    run.sparse._after_step()
    assert not run.sparse.learning and run.sparse.share() <= budget + 1e-9
    costs = unit_costs(plan.sparsity)
    kept = [int(mask.kept) for mask in run.sparse.masks]
    rest = [float(cost[n]) for cost, n in zip(costs, kept) if n < m and cost[n] > 0]
    assert all(run.sparse.share() + cost > budget for cost in rest)
    assert int(best.kept) >= max(kept)


def test_a_budget_that_is_met_from_the_start_freezes_at_once():
    net, plan = sparse(tiny(channels=16), budget=1.0)
    assert not Run(net, plan).sparse.learning


@pytest.mark.parametrize(
    ('gain', 'after'),  # epochs of 2 iterations: looked at after 4, 8 and 12
    [(100.0, 1.2**3), (0.0, 1.0)],
)
def test_annealing_each_second_epoch_without_gain(gain, after):
    net, plan = sparse(tiny(channels=16), budget=0.2, epoch=2, gain=gain, cost_weight=0.0)
    run = Run(net, plan, lr=1e-6).steps(13)
    assert float(run.sparse.progress.factor) == pytest.approx(after) and run.sparse.learning
    assert int(run.sparse.progress.steps) == 13 and run.sparse.log()['annealing'] == pytest.approx(after)


def test_ranks_are_taken_anew_each_epoch_and_not_between():
    net, plan = sparse(tiny(channels=16), budget=0.2, epoch=4)
    mask = masks(net)['body.0.conv1']
    before = mask.ranks.clone()
    run = Run(net, plan, lr=0.1).steps(3)
    assert torch.equal(mask.ranks, before)
    run.steps(1, 3)
    assert not torch.equal(mask.ranks, before)


# ------------------------------------------------------------------------------------------------- copies and processes


def state_of(run: Run) -> dict[str, Any]:
    return copy.deepcopy({'net': run.net.state_dict(), 'optimizer': run.optimizer.state_dict()})


@pytest.mark.parametrize(
    ('method', 'quant', 'first'),
    [('one_shot', None, 3), ('sr_ste', LSQ, 3), *(('sls', q, first) for q in (None, LSQ) for first in (2, 3, 9))],
    ids=str,
)
def test_resume_is_exact_to_the_bit(method, quant, first):
    options = FAST if method == 'sls' else {}
    make = lambda: sparse(network('tiny'), method, 8, 0.4, quant, **options)  # noqa: E731
    whole = Run(*make()).steps(12)
    saved = state_of(Run(*make()).steps(first))
    net, plan = sparse(tiny(seed=5, channels=40), method, 8, 0.4, quant, **options)
    net.load_state_dict(saved['net'])
    resumed = Run(net, plan)
    if method == 'sls' and first in (2, 9):
        assert resumed.sparse.learning == (first == 2)
    resumed.optimizer.load_state_dict(saved['optimizer'])
    resumed.steps(12 - first, first)
    for name, value in whole.net.state_dict().items():
        assert torch.equal(resumed.net.state_dict()[name], value), name


def test_copies_and_averages_have_the_mask_of_the_network():
    net, plan = sparse(tiny(channels=16), budget=0.4, **FAST)
    run = Run(net, plan).steps(5)
    average = copy.deepcopy(net).eval()
    run.steps(5, 5)
    with torch.no_grad():
        for mine, other in zip(average.parameters(), net.parameters()):
            mine.mul_(0.9).add_(other, alpha=0.1)
        for mine, other in zip(average.buffers(), net.buffers()):
            mine.copy_(other)
    for name, mask in masks(net).items():
        found = masks(average)[name]
        assert torch.equal(found.keep(), mask.keep())
        assert torch.equal(average.get_submodule(name).quantized_weight() != 0, mask.keep())


def work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group('gloo', init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    net, plan = sparse(tiny(channels=16), budget=0.4, **FAST)
    wrapped = DistributedDataParallel(net, broadcast_buffers=False, find_unused_parameters=True)
    run = Run(net, plan, wrapped=wrapped)
    for number in range(10):
        run.steps(1, 10 * number + rank)  # other images on each rank
    torch.save({'state': net.state_dict(), 'learning': run.sparse.learning}, f'{folder}/{rank}.pth')
    dist.destroy_process_group()


@pytest.mark.slow
def test_all_processes_have_the_same_masks():
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(folder,), nprocs=2)
        one, two = (torch.load(os.path.join(folder, f'{rank}.pth'), weights_only=True) for rank in (0, 1))
    assert not one['learning'], 'frozen scores have no gradient, which the wrapper bears'
    assert all(torch.equal(value, two['state'][name]) for name, value in one['state'].items())


# ------------------------------------------------------------------------------------------------------ plan and report


def test_the_plan_survives_as_plain_data():
    _, plan = sparse(network('mixed'), 'one_shot', 8, 0.5)
    again = Plan.from_plain(plan.to_plain())
    assert again == plan and again.sparsity.share() == plan.sparsity.share()


def test_cost_counts_what_is_kept_and_the_dense_network_beside_it():
    dense = network('mixed')
    traced = trace(dense)
    net, plan = sparse(network('mixed'), 'one_shot', 8, 0.5)
    sized = SizedTrace(trace(net), Fraction(1), None, (0, 0))
    found, before = cost_of(sized, plan), cost_of(SizedTrace(traced, Fraction(1), None, (0, 0)), None)
    assert (found.macs, found.bitops, found.weight_bytes) == (before.macs, before.bitops, before.weight_bytes)
    assert found.not_counted == before.not_counted and before.masked_macs is None
    counted = 0
    for name, module in dense.named_modules():
        if name in ('first', 'last', 'wide', 'grouped', 'point', 'linear'):
            mask = masks(net).get(name)
            kept = module.weight.numel() if mask is None else int(mask.keep().sum())
            counted += traced[name].macs * kept // module.weight.numel()
    assert found.masked_macs == counted
    row = next(row for row in found.layers if row.layer == 'wide')  # groups of 8 8 8 8 4
    kept = plan.sparsity.layers[0].kept
    in_row = 4 * kept + min(kept, 4)
    rows = 10 * 9
    assert row.density == in_row / 36
    assert row.masked_weight_bytes == rows * in_row * 4 + -(-rows * min(36, 3 * in_row) // 8)


def test_card_and_results_say_density_budget_and_what_engines_do_with_it(tmp_path):
    net, plan = sparse(network('mixed'), 'one_shot', 4, 0.6)
    card = plan_card(trace(net), plan)
    assert '% of their MACs remain (budget 60 %)' in card and 'wide, point, linear: 2:4, density 0.5000' in card
    assert '4 of 4 masked layers fit the 2:4 that GPUs' in card and 'no CPU engine runs N:M' in card
    writer = ResultWriter(name='x', method='none', plan=plan)
    writer.cost = cost_of(SizedTrace(trace(net), Fraction(1), None, (0, 0)), plan)
    writer.write(tmp_path)
    assert '| masked MACs |' in (tmp_path / 'metrics.md').read_text()
    assert '2:4' in (tmp_path / 'metrics.md').read_text()
    found = writer.to_plain()
    assert found['sparsity']['share'] == plan.sparsity.share()
    assert [layer['density'] for layer in found['sparsity']['layers']] == [
        layer.density(4) for layer in plan.sparsity.layers
    ]
    learned = sparse(network('mixed'), 'sls', 32, 0.6)
    card = plan_card(trace(learned[0]), learned[1])
    assert 'N of each is learned until at most 60 %' in card and 'none has kernels for these masks' in card


def test_state_of_masks_is_small():
    net, _ = sparse(tiny(channels=32), m=32)
    weights = sum(layer.weight.numel() for layer in masked_layers(net).values())
    added = sum(t.numel() * t.element_size() for m in net.modules() if isinstance(m, SparsityModule)
                for t in m.state_dict().values())  # fmt: skip
    assert added < weights * 1.1, 'about a byte a weight'
    assert all(isinstance(mask, PriorityMask) for mask in masks(net).values())


@pytest.mark.parametrize('method', ['mse', 'odm'], ids=['zero on the grid', 'no zero on the grid'])
def test_export_stores_zeros_where_masks_are(method):
    pytest.importorskip('onnx')
    from basicsr_quant.deploy.capture import integer_plan

    block = {'method': method, 'w_bits': 4, 'a_bits': 4, 'zero_point': 'integer' if method == 'mse' else 'float'}
    net, _ = sparse(tiny(channels=16), 'one_shot', 4, 0.5, block)
    net.eval()
    found = integer_plan(net, (1, 3, 8, 8), dynamic=False)
    for name, codes in found.weights.items():
        layer = net.get_submodule(name)
        step = codes.scale.reshape(-1, *[1] * 3).double()
        torch.testing.assert_close(codes.codes.double() * step, layer.quantized_weight().double(), rtol=1e-5, atol=1e-6)
        assert float((codes.codes == 0).float().mean()) >= 0.5
    assert len(masks(net)) == 4, 'the network itself keeps its masks'
