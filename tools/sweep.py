"""Train every method the same way and tabulate Set5: the figures of the README's comparison.

Each run is an option file given to ``basicsr train`` in a process of its own. Runs that are in the results already are
not repeated, so an interrupted sweep goes on where it was.

    BASICSR_QUANT_DATA=... python tools/sweep.py --suite sweep --bits 2 4 --iters 100 --jobs 2
    python tools/sweep.py --table

Data: ``train/div2k_x4down100`` of BASICSR_QUANT_DATA as HR (LR made here, MATLAB-compatible bicubic x2), calibration on
``calib/``, the network EDSR-b8f64_x2. Batch 4, LR patch 24, Adam 1e-4 halved at each quarter.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from threading import Lock
from typing import Any

import yaml

PLAIN = {'regularizer': 'none', 'weight_clipping': False}
VARIANTS: dict[str, dict[str, Any]] = {
    'minmax': {'method': 'minmax'},
    'percentile': {'method': 'percentile'},
    'mse': {'method': 'mse', 'zero_point': 'float'},
    'lsq': {'method': 'lsq'},
    'pams': {'method': 'pams'},
    'pams unsigned': {'method': 'pams', 'options': {'unsigned': True}},
    'ddtb': {'method': 'ddtb', 'shares': {'warm_up': 4 / 59}},  # as published: 4 of 59 epochs
    'ddtb bounds': {'method': 'ddtb', 'options': {'dynamic_ratio': 0}},
    'plain': {'method': 'odm', 'options': PLAIN},
    'plain+coop': {'method': 'odm', 'options': {'weight_clipping': False}},
    'plain+wcc': {'method': 'odm', 'options': {'regularizer': 'none'}},
    'odm': {'method': 'odm', 'options': {}},
    'odm naive': {'method': 'odm', 'options': {'gate': 'none'}},
    'odm element': {'method': 'odm', 'options': {'granularity': 'element'}},
    'odm global': {'method': 'odm', 'options': {'granularity': 'global'}},
    'odm naive x10': {'method': 'odm', 'options': {'gate': 'none', 'mismatch_weight': 1e-4}},
    'odm x10': {'method': 'odm', 'options': {'mismatch_weight': 1e-4}},
    'odm_v1': {'method': 'odm_v1', 'options': {}},
    'variance+wcc': {'method': 'odm', 'options': {'regularizer': 'variance', 'gate': 'sign'}},
}
STATIC = ('minmax', 'percentile', 'mse')
LEARNED = ('lsq', 'pams', 'pams unsigned', 'plain', 'odm', 'ddtb', 'ddtb bounds')
LADDER = ('plain', 'plain+coop', 'plain+wcc', 'odm', 'odm naive')


def suite(name: str, args: argparse.Namespace, done: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield runs as dictionaries: variant, bits, iters, seed, init, range_lr.

    ``sweep``: every method with both starts and three learning rates of ranges. ``best``: the best setting of each
    variant among the runs that are ``done``, for more seeds. ``variants``: what the command line names.
    """
    if name == 'best':
        for (bits, iters, variant), found in grouped(done).items():
            if bits in args.bits and iters == args.iters and (args.variants is None or variant in args.variants):
                chosen = {k: v for k, v in best(found)[0].items() if k not in ('psnr', 'benchmarks')}
                yield from ({**chosen, 'seed': seed} for seed in args.seeds)
        return
    for bits in args.bits:
        for seed in args.seeds:
            common = {'bits': bits, 'iters': args.iters, 'seed': seed, 'granularity': args.w_granularity}
            if name == 'sweep':
                wanted = args.variants or (*STATIC, *LEARNED)
                for variant in (v for v in STATIC if v in wanted):
                    yield {**common, 'variant': variant}
                for variant in (v for v in LEARNED if v in wanted):
                    for init in ('percentile', 'mse'):
                        for range_lr in (1, 10, 100):
                            yield {**common, 'variant': variant, 'init': init, 'range_lr': range_lr}
            else:
                for variant in args.variants or LADDER:
                    settings = {} if variant in STATIC else {'init': args.init, 'range_lr': args.range_lr}
                    yield {**common, 'variant': variant, **settings}


def run_name(run: dict[str, Any]) -> str:
    parts = [f'W{run["bits"]}A{run["bits"]}', run['variant'], f'i{run["iters"]}', f's{run["seed"]}']
    parts += [str(run[k]) for k in ('init', 'range_lr') if k in run]
    parts += ['channel'] if run['granularity'] == 'channel' else []
    return '_'.join(parts).replace(' ', '-').replace('+', '-')


def options(run: dict[str, Any], data: Path, pairs: Path) -> dict[str, Any]:
    """The option file of a run."""
    variant = VARIANTS[run['variant']]
    method, total = variant['method'], run['iters']
    shares = {k: round(share * total) for k, share in variant.get('shares', {}).items()}  # of the iterations
    own = {**variant.get('options', {}), **shares, **{k: run[k] for k in ('init', 'range_lr') if k in run}}
    disk = {'io_backend': {'type': 'disk'}, 'filename_tmpl': '{}x2', 'type': 'PairedImageDataset'}
    calib = {
        'type': 'SingleImageDataset',
        'dataroot_lq': str(data / 'calib/LR_bicubic/X2'),
        'io_backend': {'type': 'disk'},
    }
    quant: dict[str, Any] = {
        'method': method,
        'w_bits': run['bits'],
        'a_bits': run['bits'],
        'w_granularity': run['granularity'],
        'calibration': {'num_images': 32, 'dataset': calib},
    }
    quant.update({k: variant[k] for k in ('zero_point',) if k in variant})
    if own:
        quant[method] = own
    benchmark = data / 'benchmarks/Set5'
    return {
        'name': run_name(run),
        'model_type': 'SRModel',
        'scale': 2,
        'num_gpu': 0,
        'manual_seed': run['seed'],
        'datasets': {
            'train': {
                'name': 'div2k_x4down100', **disk, 'dataroot_gt': str(pairs / 'HR'),
                'dataroot_lq': str(pairs / 'LR'), 'gt_size': 48, 'use_hflip': True, 'use_rot': True,
                'num_worker_per_gpu': 0, 'batch_size_per_gpu': 4, 'dataset_enlarge_ratio': 100,
            },
            'val': {
                'name': 'Set5', **disk, 'dataroot_gt': str(benchmark / 'HR'),
                'dataroot_lq': str(benchmark / 'LR_bicubic/X2'),
            },
        },
        'network_g': {
            'type': 'EDSR', 'num_in_ch': 3, 'num_out_ch': 3, 'num_feat': 64, 'num_block': 8, 'upscale': 2,
            'img_range': 2.0,
        },
        'path': {'pretrain_network_g': str(data / 'weights/EDSR-b8f64_x2.pth')},
        'train': {
            'optim_g': {'type': 'Adam', 'lr': 1e-4, 'betas': [0.9, 0.99]},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [total // 4, total // 2, 3 * total // 4], 'gamma': 0.5},
            'total_iter': total,
            'pixel_opt': {'type': 'L1Loss', 'loss_weight': 1.0, 'reduction': 'mean'},
        },
        'val': {
            'val_freq': 10**9, 'save_img': False,
            'metrics': {'psnr': {'type': 'calculate_psnr', 'crop_border': 2, 'test_y_channel': True}},
        },
        'logger': {'print_freq': max(1, total // 10), 'save_checkpoint_freq': 10**9, 'use_tb_logger': False},
        'quant': quant,
    }  # fmt: skip


def make_pairs(data: Path, folder: Path, scale: int = 2) -> None:
    """HR images of fitting size and their LR images from the training photographs, once."""
    import cv2

    from basicsr_quant.data.bicubic import crop_to_multiple, low_resolution

    for source in sorted((data / 'train/div2k_x4down100').glob('*.png')):
        hr = crop_to_multiple(cv2.imread(str(source)), scale)
        for kind, image in (('HR', hr), ('LR', low_resolution(hr, scale))):
            target = folder / kind / f'{source.stem}{f"x{scale}" if kind == "LR" else ""}.png'
            if not target.exists():
                target.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(target), image)


def train(run: dict[str, Any], args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Run one training; return the run with its PSNR on Set5."""
    file = args.out / f'{run_name(run)}.yml'
    file.write_text(yaml.safe_dump(options(run, data, (args.out / 'pairs').resolve()), sort_keys=False))
    found = re.findall(r'# psnr: ([0-9.]+)', call(['train', '-opt', str(file.resolve())], args))
    return {**run, 'psnr': float(found[-1])}


def measure(run: dict[str, Any], args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Test a trained run on the benchmarks that ``--measure`` names; return the run with their PSNR."""
    file = args.out / f'{run_name(run)}_test.yml'
    opt = options(run, data, (args.out / 'pairs').resolve())
    opt['datasets'] = {
        f'test_{number}': {
            **opt['datasets']['val'],
            'name': name,
            'dataroot_gt': str(data / 'benchmarks' / name / 'HR'),
            'dataroot_lq': str(data / 'benchmarks' / name / 'LR_bicubic/X2'),
        }
        for number, name in enumerate(args.measure, 1)
    }
    file.write_text(yaml.safe_dump(opt, sort_keys=False))
    call(['test', '-opt', str(file.resolve())], args)
    found = json.loads((args.out / 'results' / run_name(run) / 'metrics.json').read_text())
    measured = {name: found['datasets'][name]['psnr'] for name in args.measure}
    return {**run, 'benchmarks': {**run.get('benchmarks', {}), **measured}}


def call(arguments: list[str], args: argparse.Namespace) -> str:
    """Run a command of basicsr on one thread and return what it printed."""
    done = subprocess.run(
        [sys.executable, *args.command.split(), *arguments],
        cwd=args.out, capture_output=True, text=True, env={**os.environ, 'OMP_NUM_THREADS': '1'},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f'{arguments} failed:\n' + '\n'.join((done.stdout + done.stderr).splitlines()[-5:]))
    return done.stdout + done.stderr


Settings = tuple[Any, ...]


def grouped(runs: list[dict[str, Any]]) -> dict[tuple[int, int, str], dict[Settings, list[dict[str, Any]]]]:
    """Runs by (bits, iterations, variant), then by what was swept; each list is over seeds."""
    groups: dict[tuple[int, int, str], dict[Settings, list[dict[str, Any]]]] = {}
    for r in runs:
        settings = (r.get('init', '-'), r.get('range_lr', '-'), r['granularity'])
        groups.setdefault((r['bits'], r['iters'], r['variant']), {}).setdefault(settings, []).append(r)
    return groups


def best(found: dict[Settings, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The setting with the highest mean PSNR among those with the most seeds."""
    most = max(len(v) for v in found.values())
    return max((v for v in found.values() if len(v) == most), key=lambda v: mean(r['psnr'] for r in v))


def table(runs: list[dict[str, Any]]) -> str:
    """Best setting of each variant by the mean over seeds, with the spread and what the other settings gave."""
    from basicsr_quant.report.tables import markdown

    rows = []
    for (bits, iters, variant), found in sorted(grouped(runs).items()):
        chosen = best(found)
        values = [r['psnr'] for r in chosen]
        setting = ', '.join(str(chosen[0][k]) for k in ('init', 'range_lr') if k in chosen[0]) or '-'
        spread = f'{stdev(values):.3f}' if len(values) > 1 else None
        settings = [mean(r['psnr'] for r in v) for v in found.values()]
        more = next((r['benchmarks'] for r in chosen if 'benchmarks' in r), {})
        rows.append([
            f'W{bits}A{bits}', iters, variant, setting, f'{mean(values):.3f}', spread, len(values),
            f'{min(settings):.2f}-{max(settings):.2f} ({len(settings)})',
            *(f'{more[k]:.3f}' if k in more else None for k in ('Set14', 'Urban100-20')),
        ])  # fmt: skip
    header = ['bits', 'iterations', 'variant', 'init, range lr', 'Set5', 'std', 'seeds', 'all settings']
    return markdown([*header, 'Set14', 'Urban100-20'], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--suite', choices=('sweep', 'best', 'variants'), default='sweep')
    parser.add_argument('--variants', nargs='+', help=f'default: all, or {" | ".join(LADDER)}')
    parser.add_argument('--bits', nargs='+', type=int, default=[2, 4])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--iters', type=int, default=100)
    parser.add_argument('--init', default='mse')
    parser.add_argument('--range_lr', type=float, default=10)
    parser.add_argument('--w_granularity', default='tensor')
    parser.add_argument('--jobs', type=int, default=1)
    parser.add_argument('--out', type=Path, default=Path('sweep'))
    parser.add_argument('--command', default='-m basicsr_quant', help='what python runs')
    parser.add_argument('--table', action='store_true', help='print the table of what is there and stop')
    parser.add_argument('--measure', nargs='+', default=[], metavar='SET', help='test on these benchmarks too')
    args = parser.parse_args()
    results = args.out / 'results.jsonl'
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if args.table:
        print(table(done))
        return
    data = Path(os.environ['BASICSR_QUANT_DATA'])
    make_pairs(data, args.out / 'pairs')
    known = {run_name(run): run for run in done}
    lock = Lock()

    def work(run: dict[str, Any]) -> None:
        finished = known.get(run_name(run)) or train(run, args, data)
        if not set(args.measure) <= set(finished.get('benchmarks', {})):
            finished = measure(finished, args, data)
        with lock:
            known[run_name(run)] = finished
            temporary = results.with_suffix('.tmp')
            temporary.write_text(''.join(json.dumps(r) + '\n' for r in known.values()))
            temporary.replace(results)
            print(run_name(run), finished['psnr'], finished.get('benchmarks', ''), flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(work, suite(args.suite, args, done)))


if __name__ == '__main__':
    main()
