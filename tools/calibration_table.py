"""Calibrate real networks with every method and tabulate PSNR against time: the figures of the README.

Each run is an option file given to ``basicsr calibrate`` in a process of its own, one after another, so that times can
be compared. Runs that are in the results already are not repeated.

    BASICSR_QUANT_DATA=... python tools/calibration_table.py --methods mse daq auto --sets Set5 Set14 Urban100-20
    python tools/calibration_table.py --table

Networks: those in ``weights/`` of BASICSR_QUANT_DATA. Calibration on the 100 crops in ``calib/``.
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

RGB = {'num_in_ch': 3, 'num_out_ch': 3}
NETWORKS: dict[str, dict[str, Any]] = {
    'EDSR-b8f64_x2': {'type': 'EDSR', **RGB, 'num_feat': 64, 'num_block': 8, 'upscale': 2, 'img_range': 2.0},
    'SRResNet-BN-b8f64_x4': {'type': 'SRResNetBN', 'num_block': 8, 'upscale': 4},
    'IMDN_x4': {'type': 'IMDN', 'upscale': 4},
    'RFDN-AIM_x4': {'type': 'RFDN', 'upscale': 4},
    'CARN_x2': {'type': 'CARN', 'upscale': 2},
}
VARIANTS: dict[str, dict[str, Any]] = {
    'minmax': {'method': 'minmax'},
    'minmax channel': {'method': 'minmax', 'w_granularity': 'channel'},
    'percentile': {'method': 'percentile'},
    'percentile channel': {'method': 'percentile', 'w_granularity': 'channel'},
    'mse': {'method': 'mse'},
    'mse channel': {'method': 'mse', 'w_granularity': 'channel'},
    'daq': {'method': 'daq'},
    'adabm': {'method': 'adabm'},
    'adabm reference': {'method': 'adabm', 'reference_compat': True},
    'adabm fast': {'method': 'adabm', 'adabm': {'schedule': 'fast'}},
    'auto': {'method': 'auto'},
    'auto tensor': {'method': 'auto', 'auto': {'a_granularity': 'tensor'}},
    'auto 10 s': {'method': 'auto', 'auto': {'budget': 10}},
    'auto 20 s': {'method': 'auto', 'auto': {'budget': 20}},
}


def run_name(run: dict[str, Any]) -> str:
    bits = f'W{run["w_bits"]}A{run["a_bits"]}'
    return '_'.join([run['network'], bits, run['scope'], run['variant'], str(run['images'])]).replace(' ', '-')


def options(run: dict[str, Any], sets: list[str], data: Path) -> dict[str, Any]:
    """The option file of a run."""
    network = run['network']
    scale = int(network[-1])
    disk = {'io_backend': {'type': 'disk'}, 'type': 'PairedImageDataset', 'filename_tmpl': f'{{}}x{scale}'}
    calib = {'dataroot_lq': str(data / f'calib/LR_bicubic/X{scale}'), 'io_backend': {'type': 'disk'}}
    return {
        'name': run_name(run), 'model_type': 'SRModel', 'scale': scale, 'num_gpu': 0, 'manual_seed': 0,
        'datasets': {
            f'test_{number}': {
                'name': name, **disk, 'dataroot_gt': str(data / 'benchmarks' / name / 'HR'),
                'dataroot_lq': str(data / f'benchmarks/{name}/LR_bicubic/X{scale}'),
            }
            for number, name in enumerate(sets, 1)
        },
        'network_g': NETWORKS[network],
        'path': {'pretrain_network_g': str(data / f'weights/{network}.pth')},
        'quant': {
            **VARIANTS[run['variant']], 'w_bits': run['w_bits'], 'a_bits': run['a_bits'], 'scope': run['scope'],
            'calibration': {'num_images': run['images'], 'dataset': calib},
        },
    }  # fmt: skip


def calibrate(run: dict[str, Any], args: argparse.Namespace, data: Path) -> dict[str, Any]:
    """Run one calibration and test; return the run with seconds, PSNR and mean bits."""
    file = args.out / f'{run_name(run)}.yml'
    file.write_text(yaml.safe_dump(options(run, args.sets, data), sort_keys=False))
    done = subprocess.run(
        [sys.executable, *args.command.split(), 'calibrate', '-opt', str(file.resolve())],
        cwd=args.out, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f'{run_name(run)} failed:\n' + '\n'.join((done.stdout + done.stderr).splitlines()[-5:]))
    found = json.loads((args.out / 'results' / run_name(run) / 'metrics.json').read_text())
    return {
        **run,
        'seconds': sum(found['calibration']['seconds'].values()),
        'psnr': {name: found['datasets'][name]['psnr'] for name in args.sets},
        'fab': {name: found['datasets'][name]['fab'] for name in args.sets},
        'fab_mac': {name: found['datasets'][name].get('fab_mac') for name in args.sets},
        'bitops': found['cost']['bitops'],
    }


def table(runs: list[dict[str, Any]], sets: list[str]) -> str:
    from basicsr_quant.report.tables import markdown

    rows = [
        [
            r['network'], f'W{r["w_bits"]}A{r["a_bits"]}', r['scope'], r['variant'], f'{r["seconds"]:.0f}',
            f'{max(r["fab_mac"].values()):.2f}', *(f'{r["psnr"][s]:.3f}' if s in r['psnr'] else None for s in sets),
        ]
        for r in runs
    ]  # fmt: skip
    return markdown(['network', 'bits', 'scope', 'method', 'seconds', 'bits of inputs (most)', *sets], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--networks', nargs='+', choices=list(NETWORKS), default=['EDSR-b8f64_x2'])
    parser.add_argument('--methods', nargs='+', choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument('--bits', nargs='+', default=['4,4'], metavar='W,A')
    parser.add_argument('--scopes', nargs='+', choices=('body', 'all'), default=['body'])
    parser.add_argument('--images', type=int, default=100)
    parser.add_argument('--sets', nargs='+', default=['Set5'])
    parser.add_argument('--out', type=Path, default=Path('calibration'))
    parser.add_argument('--command', default='-m basicsr_quant', help='what python runs')
    parser.add_argument('--table', action='store_true', help='print the table of what is there and stop')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / 'results.jsonl'
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if args.table:
        print(table(done, args.sets))
        return
    data = Path(os.environ['BASICSR_QUANT_DATA']).resolve()
    known = {run_name(run): run for run in done}
    for network in args.networks:
        for w_bits, a_bits in (map(int, pair.split(',')) for pair in args.bits):
            for scope in args.scopes:
                for variant in args.methods:
                    run = {
                        'network': network, 'variant': variant, 'w_bits': w_bits, 'a_bits': a_bits, 'scope': scope,
                        'images': args.images,
                    }  # fmt: skip
                    if run_name(run) in known and set(args.sets) <= set(known[run_name(run)]['psnr']):
                        continue
                    known[run_name(run)] = finished = calibrate(run, args, data)
                    temporary = results.with_suffix('.tmp')
                    temporary.write_text(''.join(json.dumps(r) + '\n' for r in known.values()))
                    temporary.replace(results)
                    print(run_name(run), f'{finished["seconds"]:.1f} s', finished['psnr'], flush=True)


if __name__ == '__main__':
    main()
