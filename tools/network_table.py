"""Quantize many networks without training and tabulate what it costs in PSNR: the table of the README.

    BASICSR_QUANT_DATA=... python tools/network_table.py --weights FOLDER --out networks
    python tools/network_table.py --table --out networks

Weights are ``<name>.pth`` in ``weights/`` of BASICSR_QUANT_DATA or in FOLDER. PSNR is then that of ``basicsr test`` on
Set5. A network without a file has random weights (seed 0), and its PSNR is the one of its quantized output against its
own FP32 output, over the range of that, on crops of Set5 (32x32 by default). Calibration: the first crops in
``calib/`` of BASICSR_QUANT_DATA. Seconds are of the processor, on one thread. Runs that are there are not repeated.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import torch
from calibration_table import NETWORKS as REAL
from torch import Tensor, nn

import basicsr_quant

basicsr_quant.enable()

from basicsr_quant.config import read_config  # noqa: E402 (after the host is mended)
from basicsr_quant.methods import calibrate, quantize  # noqa: E402
from basicsr_quant.models.checkpoint import load_state, read_network_file  # noqa: E402
from basicsr_quant.models.deployment import psnr_of  # noqa: E402
from basicsr_quant.models.preparation import build_float  # noqa: E402
from basicsr_quant.network.scope import weight_layers  # noqa: E402
from basicsr_quant.network.trace import trace  # noqa: E402
from basicsr_quant.report.tables import markdown  # noqa: E402

RGB = {'num_in_ch': 3, 'num_out_ch': 3}
SWIN = {'img_size': 64, 'window_size': 8, 'embed_dim': 60, 'depths': [6] * 4, 'num_heads': [6] * 4, 'mlp_ratio': 2}
NETWORKS: dict[str, dict[str, Any]] = {
    **REAL,
    'CARNM_x4': {'type': 'CARNM', 'upscale': 4},
    'SRVGGNetCompact_x4': {'type': 'SRVGGNetCompact', 'num_feat': 64, 'num_conv': 16, 'upscale': 4},
    'DCTLSA_x4': {'type': 'Spandrel', 'spandrel': 'DCTLSA'},
    'CRAFT_x4': {'type': 'Spandrel', 'spandrel': 'CRAFT'},
    'EDSR-baseline_x4': {'type': 'EDSR', **RGB, 'num_feat': 64, 'num_block': 16, 'upscale': 4},
    'MSRResNet_x4': {'type': 'MSRResNet', **RGB, 'num_feat': 64, 'num_block': 16, 'upscale': 4},
    'RCAN-5x10_x4': {'type': 'RCAN', **RGB, 'num_feat': 64, 'num_group': 5, 'num_block': 10, 'upscale': 4},
    'RRDBNet-6B_x4': {'type': 'RRDBNet', **RGB, 'num_feat': 64, 'num_block': 6, 'num_grow_ch': 32},
    'SwinIR-S_x4': {'type': 'SwinIR', **SWIN, 'upscale': 4, 'upsampler': 'pixelshuffledirect'},
    'RIDNet_x1': {'type': 'RIDNet', 'in_channels': 3, 'mid_channels': 64, 'out_channels': 3},
    'RDN-A_x4': {'type': 'RDN', 'num_block': 20, 'num_layer': 6, 'growth': 32, 'upscale': 4},
    'IDN_x4': {'type': 'IDN', 'upscale': 4},
    'BasicVSR_x4': {'type': 'BasicVSR', 'num_feat': 64, 'num_block': 15},
    'DUF_x4': {'type': 'DUF', 'scale': 4, 'num_layer': 16},
    'HAT_x4': {'type': 'Spandrel', 'spandrel': 'HAT', 'img_size': 64, 'window_size': 16, 'embed_dim': 96,
               'depths': (6,) * 4, 'num_heads': (6,) * 4, 'mlp_ratio': 2, 'compress_ratio': 24, 'squeeze_factor': 24,
               'upscale': 4, 'upsampler': 'pixelshuffle'},
    'DAT_x4': {'type': 'Spandrel', 'spandrel': 'DAT', 'img_size': 64, 'embed_dim': 60, 'split_size': [8, 32],
               'depth': [18], 'num_heads': [6], 'expansion_factor': 2, 'upscale': 4,
               'upsampler': 'pixelshuffledirect'},
    'SPAN_x4': {'type': 'Spandrel', 'spandrel': 'SPAN', 'num_in_ch': 3, 'num_out_ch': 3},
    'OmniSR_x4': {'type': 'Spandrel', 'spandrel': 'OmniSR', 'num_feat': 64, 'res_num': 5},
    'SAFMN_x4': {'type': 'Spandrel', 'spandrel': 'SAFMN', 'dim': 36},
}  # fmt: skip
STATED = {  # dB on Set5: of the files in weights/ by their table, CARN-M by its paper
    'EDSR-b8f64_x2': 37.801, 'SRResNet-BN-b8f64_x4': 31.883, 'IMDN_x4': 32.210, 'RFDN-AIM_x4': 32.159,
    'CARN_x2': 37.883, 'CARNM_x4': 31.92,
}  # fmt: skip
FRAMES = {'BasicVSR_x4': 5, 'DUF_x4': 7}
VARIANTS: dict[str, dict[str, Any]] = {
    'minmax': {'method': 'minmax'},
    'percentile': {'method': 'percentile'},
    'percentile 99.99': {'method': 'percentile', 'percentile': {'percentile': 99.99}},
    'mse': {'method': 'mse'},
    'dobi': {'method': 'mse', 'mse': {'init': 'dobi'}},
}
SCOPES = ('body', 'all', 'attention')  # attention: linear layers and attention only, as 2DQuant has it


def find_weights(name: str, data: Path, folder: Path | None) -> Path | None:
    places = [data / 'weights', *([folder] if folder else [])]
    return next((path for place in places if (path := place / f'{name}.pth').exists()), None)


def build(name: str, weights: Path | None, out: Path) -> nn.Module:
    """The network in evaluation mode, with the weights of its file or random ones."""
    options = dict(NETWORKS[name])
    torch.manual_seed(0)
    if kind := options.pop('spandrel', None):
        import spandrel

        path = weights or out / f'{name}_random.pth'
        if weights is None:
            options.pop('type')
            torch.save(randomized(getattr(getattr(spandrel.architectures, kind), kind)(**options)).state_dict(), path)
        return build_float({'type': 'Spandrel', 'path': str(path)}).eval()
    net = build_float(options).eval()
    if weights is None:
        return randomized(net)
    load_state(net, read_network_file(str(weights)), 'params')
    return net


def randomized(net: nn.Module) -> nn.Module:
    """Weights of deviation 1 / sqrt(fan_in): the defaults of some networks leave their body without effect."""
    for layer in weight_layers(net).values():
        nn.init.kaiming_normal_(layer.weight, nonlinearity='linear')
    return net


def images(folder: Path, name: str, count: int, side: int = 0) -> list[Tensor]:
    """LQ images (1, 3, H, W) in 0..1; crops of ``side``, and clips of the crop moving by a pixel for video networks."""
    from basicsr.utils import img2tensor

    found = []
    for path in islice(sorted(folder.glob('*.png')), count):
        image: Tensor = img2tensor(cv2.imread(str(path)).astype('float32') / 255)[None]
        image = image[..., :side, :side] if side else image
        if name in FRAMES:
            image = torch.stack([image.roll(frame, dims=-1) for frame in range(FRAMES[name])], dim=1)
        found.append(image)
    return found


def range_psnr(output: Tensor, wanted: Tensor) -> float:
    error = float((output - wanted).square().mean())
    return 20 * math.log10(float(wanted.max() - wanted.min())) - 10 * math.log10(error)


@torch.no_grad()
def run(name: str, jobs: list[dict[str, Any]], args: argparse.Namespace, data: Path) -> Iterator[dict[str, Any]]:
    """Quantize one network in each of the ways that ``jobs`` name."""
    scale = int(name[-1])
    weights = find_weights(name, data, args.weights)
    net = build(name, weights, args.out)
    known = scale if scale > 1 else 2  # denoisers are given the images of x2
    lq = f'LR_bicubic/X{known}'
    crops = images(data / 'calib' / lq, name, args.images)
    test = data / 'benchmarks' / 'Set5'
    inputs = images(test / lq, name, *((5, 0) if weights else (args.tests, args.crop)))
    if weights is None:
        truths: list[Any] = [net(x) for x in inputs]
        measure: Any = range_psnr
    else:
        truths = [cv2.imread(str(path)) for path in sorted((test / 'HR').glob('*.png'))]
        measure = psnr_of(scale)
    plain = {'psnr': mean([measure(net(x), t) for x, t in zip(inputs, truths)])} if weights else {'psnr': None}
    traced = trace(net)
    for job in jobs:
        quantized = copy.deepcopy(net)
        bits = {'w_bits': job['w_bits'], 'a_bits': job['a_bits']}
        block = {**VARIANTS[job['variant']], **bits, 'scope': 'body' if job['scope'] == 'body' else 'all'}
        if job['scope'] == 'attention':
            others = [layer.name for layer in traced.layers if layer.type != 'Linear']
            block.update(attention=True, layers=dict.fromkeys(others, 'fp'))
        plan = read_config(block).plan(quantized, traced)
        quantize(quantized, plan)
        start = time.process_time()
        calibrate(quantized, plan, crops)
        seconds = time.process_time() - start
        psnr = mean([measure(quantized(x), t) for x, t in zip(inputs, truths)])
        yield {
            **job, 'weights': 'file' if weights else 'random', 'fp32': plain['psnr'], 'stated': STATED.get(name),
            'psnr': psnr, 'quantized': len(plan.quantized), 'left': len(plan) - len(plan.quantized),
            'seconds': round(seconds, 2), 'images': args.images,
        }  # fmt: skip


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row['network'], row['scope'], row['w_bits'], row['a_bits'], row['variant']


def table(rows: list[dict[str, Any]]) -> str:
    """One row a network and scope: FP32, stated, and each way of quantizing it."""
    ways = list(dict.fromkeys((r['w_bits'], r['a_bits'], r['variant']) for r in rows))
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row['network'], row['scope']), []).append(row)
    lines = []
    for (name, scope), members in groups.items():
        first, found = members[0], {(r['w_bits'], r['a_bits'], r['variant']): f'{r["psnr"]:.2f}' for r in members}
        fp32, stated = (None if first[k] is None else f'{first[k]:.3f}' for k in ('fp32', 'stated'))
        layers = f'{first["quantized"]} / {first["left"]}'
        seconds = f'{mean([r["seconds"] for r in members]):.0f}'
        lines.append([name, scope, first['weights'], fp32, stated, *map(found.get, ways), layers, seconds])
    titles = [f'W{w}A{a} {variant}' for w, a, variant in ways]
    return markdown(['network', 'scope', 'weights', 'FP32', 'stated', *titles, 'layers', 'seconds'], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--networks', nargs='+', choices=list(NETWORKS), default=list(NETWORKS))
    parser.add_argument('--variants', nargs='+', choices=list(VARIANTS), default=['minmax', 'percentile'])
    parser.add_argument('--bits', nargs='+', default=['8,8', '4,4'], metavar='W,A')
    parser.add_argument('--scopes', nargs='+', choices=SCOPES, default=['body'])
    parser.add_argument('--images', type=int, default=8, help='calibration images')
    parser.add_argument('--tests', type=int, default=3, help='test images, for random weights')
    parser.add_argument('--crop', type=int, default=32, help='their side, for random weights')
    parser.add_argument('--weights', type=Path, help='folder of more weights')
    parser.add_argument('--out', type=Path, default=Path('networks'))
    parser.add_argument('--table', action='store_true', help='print the table of what is there and stop')
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    results = args.out / 'results.jsonl'
    done = [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []
    if args.table:
        print(table(done))
        return
    data = Path(os.environ['BASICSR_QUANT_DATA']).resolve()
    torch.set_num_threads(1)
    for name in args.networks:
        jobs = [
            {'network': name, 'scope': scope, 'w_bits': w_bits, 'a_bits': a_bits, 'variant': variant}
            for scope in args.scopes
            for w_bits, a_bits in (map(int, pair.split(',')) for pair in args.bits)
            for variant in args.variants
        ]
        there = {key(row) for row in done}
        jobs = [job for job in jobs if key(job) not in there]
        for row in run(name, jobs, args, data) if jobs else ():
            done.append(row)
            temporary = results.with_suffix('.tmp')
            temporary.write_text(''.join(json.dumps(row) + '\n' for row in done))
            temporary.replace(results)
            print(*key(row), f'{row["psnr"]:.3f}', flush=True)


if __name__ == '__main__':
    main()
