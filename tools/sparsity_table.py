"""Train N:M sparsity by each method at the same MACs and tabulate PSNR: the figures of the README's table.

Each run is an option file given to ``basicsr train`` in a process of its own; what is in the results already is not
repeated.

    BASICSR_QUANT_DATA=... python tools/sparsity_table.py --network EDSR --budgets 0.5 0.25 0.125
    BASICSR_QUANT_DATA=... python tools/sparsity_table.py --network EDSR --measure Set14 Urban100-20
    python tools/sparsity_table.py --table

Data, batch, patch and learning rate are those of ``tools/sweep.py``. ``sls`` runs with settings for a short training:
scores learn faster and the cost weighs more than published, so that the budget is met early.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
from pathlib import Path
from typing import Any

import sweep
import yaml

NETWORKS: dict[str, dict[str, Any]] = {
    'EDSR': {
        'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 64, 'num_block': 8, 'upscale': 2,
        'img_range': 2.0,
    },
    'CARN': {'type': 'CARN', 'num_feat': 64, 'upscale': 2},
}  # fmt: skip
WEIGHTS = {'EDSR': 'EDSR-b8f64_x2.pth', 'CARN': 'CARN_x2.pth'}
SETS = ('Set5', 'Set14', 'Urban100-20')


def run_name(run: dict[str, Any]) -> str:
    parts = [run['network'], run['method'], f'M{run["M"]}', f'b{run["budget"]:g}']
    parts += [f'i{run["iters"]}', f's{run["seed"]}']
    parts += [f'{key}{value:g}' for key, value in run['options'].items()]
    return '_'.join([*parts, *([f'W4A4-{run["quant"]}'] if run['quant'] else [])])


def options(run: dict[str, Any], data: Path, pairs: Path) -> dict[str, Any]:
    """The option file of a run: that of the sweep, with ``sparsity:`` and perhaps another network."""
    common = {'variant': run['quant'] or 'mse', 'bits': 4, 'iters': run['iters'], 'seed': run['seed']}
    ranges = {'init': 'mse', 'range_lr': 10} if run['quant'] else {}
    opt = sweep.options({**common, **ranges, 'granularity': 'tensor'}, data, pairs)
    opt['name'] = run_name(run)
    opt['network_g'] = NETWORKS[run['network']]
    opt['path']['pretrain_network_g'] = str(data / 'weights' / WEIGHTS[run['network']])
    if not run['quant']:
        del opt['quant']
    if run['method'] != 'dense':
        opt['sparsity'] = {'method': run['method'], 'M': run['M'], 'budget': run['budget']}
        if run['options']:
            opt['sparsity'][run['method']] = run['options']
    elif not run['quant']:
        opt['quant'] = {'method': 'none'}
    return opt


def train(run: dict[str, Any], args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Train; return the run with PSNR on Set5, MACs that remain, and the iteration in which the budget was met."""
    opt = options(run, data, (args.out / 'pairs').resolve())
    opt['logger']['print_freq'] = 10
    file = args.out / f'{run_name(run)}.yml'
    file.write_text(yaml.safe_dump(opt, sort_keys=False))
    log = sweep.call(['train', '-opt', str(file.resolve())], args)
    shares = [(int(i.replace(',', '')), float(s)) for i, s in re.findall(r'iter:\s*([\d,]+).*?density: (\S+)', log)]
    met = next((i for i, share in shares if share <= run['budget']), None)
    psnr = float(re.findall(r'# psnr: ([0-9.]+)', log)[-1])
    return {**run, 'met': met, 'share': shares[-1][1] if shares else 1.0, 'Set5': psnr}


def measure(run: dict[str, Any], args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Test a trained run on the sets that ``--measure`` names; return the run with their PSNR."""
    opt = options(run, data, (args.out / 'pairs').resolve())
    opt['datasets'] = {
        f'test_{number}': {
            **opt['datasets']['val'], 'name': name, 'dataroot_gt': str(data / 'benchmarks' / name / 'HR'),
            'dataroot_lq': str(data / 'benchmarks' / name / 'LR_bicubic/X2'),
        }
        for number, name in enumerate(args.measure, 1)
    }  # fmt: skip
    file = args.out / f'{run_name(run)}_test.yml'
    file.write_text(yaml.safe_dump(opt, sort_keys=False))
    sweep.call(['test', '-opt', str(file.resolve())], args)
    found = json.loads((args.out / 'results' / run_name(run) / 'metrics.json').read_text())
    return {**run, **{name: round(found['datasets'][name]['psnr'], 4) for name in args.measure}}


def table(runs: list[dict[str, Any]]) -> str:
    """One row a run."""
    from basicsr_quant.report.tables import markdown

    header = ['network', 'budget', 'method', 'quant', 'iterations', 'seed', 'MACs left', 'met at', *SETS]
    runs = sorted(runs, key=lambda r: (r['network'], r['quant'], r['iters'], -r['budget'], r['method'], r['seed']))
    rows = [
        [
            r['network'], r['budget'], ' '.join([r['method'], *(f'{k} {v:g}' for k, v in r['options'].items())]),
            r['quant'] or '-', r['iters'], r['seed'], f'{r["share"]:.4f}', r['met'],
            *(f'{r[name]:.3f}' if name in r else None for name in SETS),
        ]
        for r in runs
    ]  # fmt: skip
    return markdown(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--network', choices=NETWORKS, default='EDSR')
    parser.add_argument('--methods', nargs='+', default=['sls', 'one_shot', 'sr_ste'], help='or dense')
    parser.add_argument('--budgets', nargs='+', type=float, default=[0.5, 0.25, 0.125])
    parser.add_argument('--M', type=int, default=32)
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--iters', type=int, default=200)
    parser.add_argument('--quant', default='', help='a variant of tools/sweep.py that trains at W4A4 too: lsq, odm ...')
    parser.add_argument('--score_lr', type=float, default=60)
    parser.add_argument('--cost_weight', type=float, default=20)
    parser.add_argument('--epoch', type=int, default=10)
    parser.add_argument('--measure', nargs='+', default=[], choices=SETS[1:], help='test on these sets too')
    parser.add_argument('--out', type=Path, default=Path('sparsity'))
    parser.add_argument('--command', default='-m basicsr_quant', help='what python runs')
    parser.add_argument('--table', action='store_true', help='print the table of what is there and stop')
    args = parser.parse_args()
    results = args.out / 'results.jsonl'
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if args.table:
        print(table(done))
        return
    data = Path(os.environ['BASICSR_QUANT_DATA'])
    sweep.make_pairs(data, args.out / 'pairs')
    known = {run_name(run): run for run in done}
    short = {'score_lr': args.score_lr, 'cost_weight': args.cost_weight, 'epoch': args.epoch}
    for seed, budget, method in itertools.product(args.seeds, args.budgets, args.methods):
        wanted = {
            'network': args.network, 'method': method, 'M': args.M, 'budget': 1.0 if method == 'dense' else budget,
            'iters': args.iters, 'seed': seed, 'quant': args.quant, 'options': short if method == 'sls' else {},
        }  # fmt: skip
        name = run_name(wanted)
        run = known.get(name) or train(wanted, args, data)
        if not set(args.measure) <= set(run):
            run = measure(run, args, data)
        known[name] = run
        temporary = results.with_suffix('.tmp')
        temporary.write_text(''.join(json.dumps(r) + '\n' for r in known.values()))
        temporary.replace(results)
        print(name, run, flush=True)


if __name__ == '__main__':
    main()
