"""One network and one ``quant`` block in both hosts: is PSNR the same, with files that move across?

For each method four figures on Set5: calibrated and tested by BasicSR; by MMagic's own ``tools/test.py``; and each
host's calibrated file tested by the other. Each is a process of its own, and results that are there are not repeated.

    BASICSR_QUANT_DATA=... python tools/two_hosts.py --methods 'adabm fast' daq
    python tools/two_hosts.py --table

The network is EDSR-b8f64 x2 of ``weights/``, calibrated on the crops in ``calib/``; MMagic's environment is that of
``make env-mmagic``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from calibration_table import VARIANTS, options

NETWORK = 'EDSR-b8f64_x2'
WAYS = ('BasicSR', 'MMagic', 'BasicSR to MMagic', 'MMagic to BasicSR')
WHERE = "import mmagic, pathlib; print(pathlib.Path(mmagic.__file__).parent / '.mim/tools/test.py')"
CONFIG = """
_base_ = 'mmagic::edsr/edsr_x2c64b16_1xb16-300k_div2k.py'
custom_imports = dict(imports=['basicsr_quant.mmagic'], allow_failed_imports=False)
common = dict(
    type='BasicImageDataset', metainfo=dict(dataset_type='set5', task_name='sisr'),
    data_prefix=dict(img='LR_bicubic/X2', gt='HR'), filename_tmpl=dict(img='{{}}x2', gt='{{}}'),
    pipeline=_base_.val_pipeline)
model = dict(generator=dict(
    _delete_=True,
    type='QuantizedNetwork',
    generator=dict(  # BasicSR's img_range 2 is a deviation of 0.5 here
        type='EDSRNet', in_channels=3, out_channels=3, mid_channels=64, num_blocks=8, upscale_factor=2,
        rgb_std=[0.5] * 3),
    quant={quant!r}))
model['generator']['quant']['calibration']['dataset'] = dict(data_root={data!r} + '/calib', **common)
test_dataloader = [dict(
    num_workers=0, persistent_workers=False, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(data_root={data!r} + '/benchmarks/Set5', **common))]
test_evaluator = [dict(type='Evaluator', metrics=[dict(type='PSNR', crop_border=2, convert_to='Y', prefix='Set5')])]
custom_hooks = [dict(type='RangeCalibrationHook'), dict(type='QuantizationReportHook')]
"""


def measure(variant: str, args: argparse.Namespace, data: Path) -> list[dict[str, Any]]:
    """The four figures of a method."""
    bits = {'w_bits': args.bits, 'a_bits': args.bits, 'scope': 'body'}
    block = options({**bits, 'network': NETWORK, 'variant': variant, 'images': args.images}, ['Set5'], data)
    name = block['name'] = f'{variant} W{args.bits}A{args.bits}'.replace(' ', '_')
    folder = (args.out / name).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'basicsr.yml').write_text(yaml.safe_dump(block, sort_keys=False))
    quant = {**block['quant'], 'calibration': {'num_images': args.images}}
    (folder / 'config.py').write_text(CONFIG.format(quant=quant, data=str(data)))
    tool = _run([args.mmagic, '-c', WHERE], folder).splitlines()[-1]
    ours = f'experiments/{name}/models/net_g_calibrated.pth'
    host = [sys.executable, '-m', 'basicsr_quant']
    commands = {
        'BasicSR': [*host, 'calibrate', '-opt', 'basicsr.yml'],
        'MMagic': [args.mmagic, tool, 'config.py', block['path']['pretrain_network_g'], '--work-dir', 'mmagic'],
        'BasicSR to MMagic': [args.mmagic, tool, 'config.py', ours, '--work-dir', 'moved'],
        'MMagic to BasicSR': [*host, 'test', '-opt', 'basicsr.yml', '--checkpoint', 'mmagic/net_g_calibrated.pth'],
    }
    found = []
    for way in WAYS:
        kept = folder / f'{way.replace(" ", "_")}.json'
        if not kept.exists():
            _run(commands[way], folder)
            left = {'MMagic': 'mmagic', 'BasicSR to MMagic': 'moved'}.get(way, f'results/{name}')
            shutil.copy(folder / left / 'metrics.json', kept)
        result = json.loads(kept.read_text())['datasets']['Set5']
        found.append({'variant': variant, **bits, 'images': args.images, 'way': way, 'psnr': result['psnr']})
    return found


def _run(command: list[str], folder: Path) -> str:
    # MMEngine's own checkpoints hold its log as objects; these files would load without.
    environment = {**os.environ, 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD': '1'}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'{" ".join(command)} failed:\n' + '\n'.join((done.stdout + done.stderr).splitlines()[-5:]))
    return done.stdout


def table(runs: list[dict[str, Any]]) -> str:
    """A row for each method, a column for each way."""
    from basicsr_quant.report.tables import markdown

    psnr = {(r['variant'], f'W{r["w_bits"]}A{r["a_bits"]}', r['way']): r['psnr'] for r in runs}
    rows = dict.fromkeys((variant, bits) for variant, bits, _ in psnr)
    return markdown(['method', 'bits', *WAYS], [[*row, *(f'{psnr[(*row, way)]:.4f}' for way in WAYS)] for row in rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--methods', nargs='+', default=['adabm fast', 'daq'], choices=list(VARIANTS), metavar='METHOD')
    parser.add_argument('--bits', type=int, default=4)
    parser.add_argument('--images', type=int, default=100)
    parser.add_argument('--out', type=Path, default=Path('two_hosts'))
    parser.add_argument('--mmagic', default='.venv-mmagic/bin/python', help="Python of MMagic's environment")
    parser.add_argument('--table', action='store_true', help='print the table of what there is and stop')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.mmagic = os.path.abspath(args.mmagic)
    file = args.out / 'results.jsonl'
    runs = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for variant in () if args.table else args.methods:
        data = Path(os.environ['BASICSR_QUANT_DATA']).resolve()
        found = measure(variant, args, data)
        same = ('variant', 'w_bits', 'images')
        runs = [r for r in runs if any(r[key] != found[0][key] for key in same)] + found
        file.write_text(''.join(json.dumps(run) + '\n' for run in runs))
    print(table(runs))


if __name__ == '__main__':
    main()
