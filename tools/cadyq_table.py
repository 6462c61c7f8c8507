"""CADyQ from an 8-bit PAMS network on real networks: bits, PSNR, and whether hard patches get more bits than easy ones.

Each run is two option files given to ``basicsr``: a calibrated PAMS W8A8 network (``basicsr calibrate``), then CADyQ
trained from it and taught by it (``basicsr train``), both tested in patches of 96x96 every 90 pixels, as published.
Runs that are in the results already are not repeated.

    BASICSR_QUANT_DATA=... python tools/cadyq_table.py --networks EDSR-b8f64_x2 --iters 200
    python tools/cadyq_table.py --table

The published settings need 300,000 iterations. With some hundred, selectors read normalized features at a learning rate
of their own (2e-2), each candidate's bound starts where its rounding errs least, and the weight of the bit loss stands
from the start. The loss is the squared error: what PSNR measures, and what quantization adds to it grows with the
gradient of a patch, while what it adds to L1 does not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from calibration_table import NETWORKS

PATCH = {'size': 96, 'stride': 90}
LAYERS = {  # of the attention losses: the last feature of the body, and each block's last convolution
    'EDSR-b8f64_x2': {'conv_after_body': 1000, 'body.*.conv2': 100},
    'SRResNet-BN-b8f64_x4': {'conv_after_body': 1000, 'body.*.conv2': 100},
}


def run_name(run: dict[str, Any]) -> str:
    return f'{run["network"]}_i{run["iters"]}_w{run["bit_weight"]:g}_s{run["seed"]}'


def options(run: dict[str, Any], sets: list[str], data: Path, out: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The option files of both networks."""
    network, total = run['network'], run['iters']
    scale = int(network[-1])
    pair = {'type': 'PairedImageDataset', 'io_backend': {'type': 'disk'}, 'filename_tmpl': f'{{}}x{scale}'}
    calib = {'dataroot_lq': str(data / f'calib/LR_bicubic/X{scale}'), 'io_backend': {'type': 'disk'}}
    common = {'model_type': 'SRModel', 'scale': scale, 'num_gpu': 0, 'manual_seed': run['seed']}
    tests = {
        f'test_{number}': {
            'name': name, **pair, 'dataroot_gt': str(data / f'benchmarks/{name}/HR'),
            'dataroot_lq': str(data / f'benchmarks/{name}/LR_bicubic/X{scale}'),
        }
        for number, name in enumerate(sets, 1)
    }  # fmt: skip
    quant = {'w_bits': 8, 'a_bits': 8, 'patch': PATCH}
    first = {
        'name': f'{network}_PAMS', **common, 'datasets': tests, 'network_g': NETWORKS[network],
        'path': {'pretrain_network_g': str(data / f'weights/{network}.pth')},
        'quant': {'method': 'pams', **quant, 'calibration': {'num_images': 100, 'dataset': calib}},
    }  # fmt: skip
    train = {
        'name': 'div2k_x4down100', **pair, 'dataroot_gt': str(out / f'pairs{scale}/HR'),
        'dataroot_lq': str(out / f'pairs{scale}/LR'), 'gt_size': 24 * scale, 'use_hflip': True, 'use_rot': True,
        'num_worker_per_gpu': 0, 'batch_size_per_gpu': 8, 'dataset_enlarge_ratio': 100,
    }  # fmt: skip
    second = {
        'name': run_name(run), **common, 'datasets': {'train': train, **tests}, 'network_g': NETWORKS[network],
        'path': {'pretrain_network_g': str(out / f'experiments/{first["name"]}/models/net_g_calibrated.pth')},
        'quant': {
            'method': 'cadyq', **quant, 'save_bits': True, 'calibration': {'num_images': 32, 'dataset': calib},
            'cadyq': {
                'bit_weight': run['bit_weight'], 'normalize': True, 'candidate_init': 'mse', 'selector_lr': 4000,
                'range_lr': 100,
            },
            'distill': {'teacher': 'start', 'loss': 'attention', 'layers': LAYERS[network]},
        },
        'train': {
            'optim_g': {'type': 'Adam', 'lr': 5e-6, 'betas': [0.9, 0.99]},
            'scheduler': {'type': 'MultiStepLR', 'milestones': [6 * total // 10, 85 * total // 100], 'gamma': 0.3},
            'total_iter': total,
            # 16: squared errors of these networks come to about a sixteenth of their L1
            'pixel_opt': {'type': 'MSELoss', 'loss_weight': 16.0, 'reduction': 'mean'},
        },
        'logger': {'print_freq': 20, 'save_checkpoint_freq': 10**9, 'use_tb_logger': False},
    }  # fmt: skip
    return first, second


def make_pairs(data: Path, folder: Path, scale: int) -> None:
    """HR images and their LR images from the training photographs, once."""
    import cv2

    from basicsr_quant.data.bicubic import crop_to_multiple, low_resolution

    for source in sorted((data / 'train/div2k_x4down100').glob('*.png')):
        targets = folder / f'HR/{source.name}', folder / f'LR/{source.stem}x{scale}.png'
        if not targets[1].exists():
            hr = crop_to_multiple(cv2.imread(str(source)), scale)
            for target, image in zip(targets, (hr, low_resolution(hr, scale))):
                target.parent.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(target), image)


def measure(run: dict[str, Any], args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Make both networks and test them; return the run with what was measured of each set."""
    out = args.out.resolve()
    first, second = options(run, args.sets, data, out)
    before = out / f'results/{first["name"]}/metrics.json'
    if not before.exists() or not set(args.sets) <= set(json.loads(before.read_text())['datasets']):
        call('calibrate', first, args)
    make_pairs(data, out / f'pairs{second["scale"]}', second['scale'])
    if not (out / f'experiments/{second["name"]}/models/net_g_latest.pth').exists():
        call('train', {**second, 'datasets': {'train': second['datasets']['train']}}, args)
    call('test', second, args)
    eight, chosen = (json.loads((out / f'results/{o["name"]}/metrics.json').read_text()) for o in (first, second))
    sets = {}
    for name in args.sets:
        one, found = eight['datasets'][name], chosen['datasets'][name]
        sets[name] = {
            'psnr_8bit': one['psnr'], 'psnr': found['psnr'], 'fab': found['fab'], 'fab_mac': found['fab_mac'],
            'correlation': found['extra'].get('bits_gradient_rank_correlation'),
        }  # fmt: skip
    return {**run, 'sets': sets, 'bitops': chosen['cost']['bitops'], 'bitops_8bit': eight['cost']['bitops']}


def call(command: str, opt: dict[str, Any], args: argparse.Namespace) -> None:
    file = args.out / f'{opt["name"]}_{command}.yml'
    file.write_text(yaml.safe_dump(opt, sort_keys=False))
    done = subprocess.run(
        [sys.executable, *args.command.split(), command, '-opt', str(file.resolve())],
        cwd=args.out, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f'{file} failed:\n' + '\n'.join((done.stdout + done.stderr).splitlines()[-5:]))


def table(runs: list[dict[str, Any]]) -> str:
    from basicsr_quant.report.tables import markdown

    def two(value: float | None) -> str | None:
        return None if value is None else f'{value:.2f}'

    rows = [
        [
            run['network'], run['iters'], f'{run["bit_weight"]:g}', name, f'{f["psnr_8bit"]:.3f}', f'{f["psnr"]:.3f}',
            f'{f["psnr_8bit"] - f["psnr"]:.3f}', two(f['fab']), two(f['fab_mac']), two(f['correlation']),
        ]
        for run in runs
        for name, f in run['sets'].items()
    ]  # fmt: skip
    header = ['network', 'iterations', 'bit_weight', 'set', 'PAMS W8A8', 'CADyQ', 'lost', 'FAB', 'by MACs']
    return markdown([*header, 'bits against gradient'], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--networks', nargs='+', choices=list(LAYERS), default=['EDSR-b8f64_x2'])
    parser.add_argument('--iters', type=int, default=200)
    parser.add_argument('--bit_weight', nargs='+', type=float, default=[9e-4])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0])
    parser.add_argument('--sets', nargs='+', default=['Set5', 'Set14', 'Urban100-20'])
    parser.add_argument('--out', type=Path, default=Path('cadyq'))
    parser.add_argument('--command', default='-m basicsr_quant', help='what python runs')
    parser.add_argument('--table', action='store_true', help='print the table of what is there and stop')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / 'results.jsonl'
    known = {run_name(r): r for r in map(json.loads, results.read_text().splitlines() if results.exists() else ())}
    if args.table:
        print(table(list(known.values())))
        return
    data = Path(os.environ['BASICSR_QUANT_DATA']).resolve()
    for network in args.networks:
        for weight in args.bit_weight:
            for seed in args.seeds:
                run = {'network': network, 'iters': args.iters, 'bit_weight': weight, 'seed': seed}
                if run_name(run) in known and set(args.sets) <= set(known[run_name(run)]['sets']):
                    continue
                known[run_name(run)] = measure(run, args, data)
                temporary = results.with_suffix('.tmp')
                temporary.write_text(''.join(json.dumps(r) + '\n' for r in known.values()))
                temporary.replace(results)
                print(table([known[run_name(run)]]), flush=True)


if __name__ == '__main__':
    main()
