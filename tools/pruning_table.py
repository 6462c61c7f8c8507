"""Prune SRResNet-BN x4 by every ranking and ratio, fine-tune, and tabulate PSNR, bytes and latency.

Each step is a command of basicsr in a process of its own. Steps whose results are there already are not repeated.

    BASICSR_QUANT_DATA=... python tools/pruning_table.py --ratios 0.1 0.3 0.5 --iters 200
    python tools/pruning_table.py --latency
    python tools/pruning_table.py --table

Data: ``train/div2k_x4down100`` of BASICSR_QUANT_DATA as HR. Fine-tuning: batch 4, LR patch 24, Adam 1e-4 halved at each
quarter, the same seed and data for all. Latency: ONNX Runtime, FP32, one thread, each file in turn with the whole
network's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from sweep import call, make_pairs

from basicsr_quant.report.tables import markdown

VARIANTS: dict[str, dict[str, Any]] = {
    'bn_filter': {'method': 'bn_filter'},
    'bn_filter plain': {'method': 'bn_filter', 'compensate': False},
    'bn_filter of 16': {'method': 'bn_filter', 'multiple_of': 16},
    'bn_filter layer': {'method': 'bn_filter', 'ranking': 'layer'},
    'bn_filter joint': {'method': 'bn_filter', 'joint': True},
    'magnitude': {'method': 'magnitude'},
    'random': {'method': 'random'},
}
WEIGHTS = 'weights/SRResNet-BN-b8f64_x4.pth'


def name_of(run: dict[str, Any]) -> str:
    return f'{run["variant"]}_{run["ratio"]}_{run["iters"]}'.replace(' ', '-')


def options(run: dict[str, Any], sets: list[str], data: Path, pairs: Path) -> dict[str, Any]:
    """The option file of a run."""
    disk = {'type': 'PairedImageDataset', 'io_backend': {'type': 'disk'}, 'filename_tmpl': '{}x4'}
    total = max(run['iters'], 4)
    tests = {
        f'test_{number}': {'name': name, **disk, 'dataroot_gt': str(data / f'benchmarks/{name}/HR'),
                           'dataroot_lq': str(data / f'benchmarks/{name}/LR_bicubic/X4')}
        for number, name in enumerate(sets, 1)
    }  # fmt: skip
    return {
        'name': name_of(run), 'model_type': 'SRModel', 'scale': 4, 'num_gpu': 0, 'manual_seed': 0,
        'network_g': {'type': 'SRResNetBN', 'num_block': 8, 'upscale': 4},
        'sparsity': {**VARIANTS[run['variant']], 'ratio': run['ratio']},
        'datasets': {
            'train': {
                'name': 'div2k_x4down100', **disk, 'dataroot_gt': str(pairs / 'HR'), 'dataroot_lq': str(pairs / 'LR'),
                'gt_size': 96, 'use_hflip': True, 'use_rot': True, 'num_worker_per_gpu': 0, 'batch_size_per_gpu': 4,
                'dataset_enlarge_ratio': 100,
            },
            **tests,
        },
        'path': {'pretrain_network_g': str(data / WEIGHTS)},
        'train': {
            'optim_g': {'type': 'Adam', 'lr': 1e-4, 'betas': [0.9, 0.99]},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [total // 4, total // 2, 3 * total // 4], 'gamma': 0.5},
            'total_iter': total, 'pixel_opt': {'type': 'L1Loss', 'loss_weight': 1.0, 'reduction': 'mean'},
        },
        'val': {'val_freq': 10**9, 'save_img': False},
        'logger': {'print_freq': max(1, total // 5), 'save_checkpoint_freq': 10**9, 'use_tb_logger': False},
    }  # fmt: skip


def work(run: dict[str, Any], args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Prune, test, fine-tune, test."""
    name = name_of(run)
    file = args.out / f'{name}.yml'
    file.write_text(yaml.safe_dump(options(run, args.sets, data, (args.out / 'pairs').resolve()), sort_keys=False))
    pruned = Path('experiments', name, f'{name}_pruned.yml')
    call(['prune', '-opt', str(file.resolve()), '--onnx', f'{name}.onnx'], args)
    widths = yaml.safe_load((args.out / pruned).read_text())['network_g']['widths']
    found = {**run, 'before': psnr(pruned, args), 'widths': widths}
    if run['iters']:
        call(['train', '-opt', str(pruned)], args)
        found['after'] = psnr(pruned, args, '--checkpoint', f'experiments/{name}_pruned/models/net_g_latest.pth')
    cost = json.loads((args.out / 'results' / f'{name}_pruned' / 'metrics.json').read_text())['cost']
    size = (args.out / f'{name}.onnx').stat().st_size
    return {**found, 'macs': cost['macs'], 'weight_bytes': cost['weight_bytes'], 'onnx_bytes': size}


def psnr(file: Path, args: argparse.Namespace, *checkpoint: str) -> dict[str, float]:
    call(['test', '-opt', str(file), *checkpoint], args)
    found = json.loads((args.out / 'results' / file.stem / 'metrics.json').read_text())
    return {name: entry['psnr'] for name, entry in found['datasets'].items()}


def latency(runs: list[dict[str, Any]], args: argparse.Namespace) -> None:
    """Seconds of each ONNX file over those of the whole network's (ratio 0), in turn, into the runs."""
    import numpy as np
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = 1
    image = {'input': np.random.default_rng(0).random((1, 3, 180, 320), dtype=np.float32)}

    def seconds(session: Any) -> float:
        start = time.perf_counter()
        session.run(None, image)
        return time.perf_counter() - start

    whole = next(run for run in runs if run['ratio'] == 0)
    files = [str(args.out / f'{name_of(run)}.onnx') for run in (whole, *runs)]
    sessions = [onnxruntime.InferenceSession(file, settings) for file in files]
    pairs: list[list[float]] = [[] for _ in runs]
    for _ in range(args.pairs):
        for number, session in enumerate(sessions[1:]):
            pairs[number].append(seconds(sessions[0]) / seconds(session))
    for run, ratios in zip(runs, pairs):
        run['faster'] = statistics.median(ratios)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--ratios', nargs='+', type=float, default=[0.1, 0.2, 0.3, 0.4, 0.5])
    parser.add_argument('--methods', nargs='+', choices=list(VARIANTS), default=['bn_filter', 'magnitude', 'random'])
    parser.add_argument('--iters', type=int, default=200)
    parser.add_argument('--sets', nargs='+', default=['Set5'])
    parser.add_argument('--pairs', type=int, default=7)
    parser.add_argument('--out', type=Path, default=Path('pruning'))
    parser.add_argument('--command', default='-m basicsr_quant', help='what python runs')
    parser.add_argument('--latency', action='store_true', help='time the ONNX files that are there')
    parser.add_argument('--table', action='store_true', help='print the table of what is there and stop')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / 'pruning.jsonl'
    runs = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if args.latency:
        latency(runs, args)
        results.write_text(''.join(json.dumps(run) + '\n' for run in runs))
    elif not args.table:
        if 'BASICSR_QUANT_DATA' not in os.environ:
            sys.exit('BASICSR_QUANT_DATA is not set; it names the folder with weights/, benchmarks/ and train/')
        data = Path(os.environ['BASICSR_QUANT_DATA']).resolve()
        make_pairs(data, args.out / 'pairs', 4)
        done = {name_of(run) for run in runs}
        wanted = [{'variant': v, 'ratio': r, 'iters': args.iters} for r in args.ratios for v in args.methods]
        for run in wanted:
            if name_of(run) in done:
                continue
            runs.append(work(run, args, data))
            with results.open('a') as file:
                file.write(json.dumps(runs[-1]) + '\n')
            print(name_of(run), runs[-1]['before'], runs[-1].get('after'), flush=True)
    rows = [
        [run['variant'], run['ratio'], run['before'].get('Set5'), run.get('after', {}).get('Set5'), run['macs'] / 1e9,
         run['weight_bytes'], f'{run["faster"]:.2f}x' if 'faster' in run else None]
        for run in sorted(runs, key=lambda run: (run['ratio'], run['variant']))
    ]  # fmt: skip
    print(markdown(['ranking', 'ratio', 'pruned', 'fine-tuned', 'G MACs', 'bytes', 'faster'], rows))


if __name__ == '__main__':
    main()
