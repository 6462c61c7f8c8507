"""Export real networks with every method, bit width and engine, and tabulate what the proofs say.

    BASICSR_QUANT_DATA=... python tools/parity_table.py --out parity.jsonl
    python tools/parity_table.py --out parity.jsonl --table    # the rows that are there

Every network is calibrated on crops of ``calib/`` with ``scope: all, skip: quantized`` (first and last layer at 8 bits)
and exported in memory; nothing is trained. Rows that are in the file already are not repeated. SwinIR has no weights in
BASICSR_QUANT_DATA: its weights are random and its PSNR says nothing but whether engines agree.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from calibration_table import NETWORKS

import basicsr_quant
from basicsr_quant.errors import QuantError

SWINIR = {
    'type': 'SwinIR', 'upscale': 2, 'img_size': 48, 'window_size': 8, 'img_range': 1.0, 'depths': [2, 2],
    'embed_dim': 32, 'num_heads': [4, 4], 'mlp_ratio': 2, 'upsampler': 'pixelshuffledirect', 'resi_connection': '1conv',
}  # fmt: skip
RANDOM = {'SwinIR_x2': SWINIR}
SIZE = (48, 48)
"""LR size of the files of networks that cannot leave it free."""
METHODS: dict[str, dict[str, Any]] = {
    'minmax': {'method': 'minmax'},
    'mse': {'method': 'mse'},
    'percentile': {'method': 'percentile', 'percentile': {'percentile': 99.99}},
    'lsq': {'method': 'lsq', 'lsq': {'init': 'mse'}},
    'pams': {'method': 'pams'},
    'odm': {'method': 'odm', 'odm': {'init': 'mse'}},
    'auto': {'method': 'auto', 'auto': {'a_granularity': 'tensor', 'budget': 20}},
}
ENGINES = ('onnxruntime', 'openvino')
SETTINGS = {'scope': 'all', 'skip': 'quantized'}


def network(name: str, data: Path) -> torch.nn.Module:
    """The FP32 network."""
    from basicsr_quant.models import checkpoint
    from basicsr_quant.models.preparation import build_float

    if name in RANDOM:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return build_float(RANDOM[name]).eval()
    net = build_float(NETWORKS[name]).eval()
    checkpoint.load_state(net, checkpoint.read_network_file(str(data / f'weights/{name}.pth')), 'params')
    return net


def calibrated(name: str, method: str, bits: int, images: int, data: Path) -> tuple[Any, Any, int]:
    """A calibrated network, its plan and its scale."""
    from basicsr_quant.config import read_config
    from basicsr_quant.data.calibration import CalibrationImages, dataset_options
    from basicsr_quant.methods import method_of, quantize
    from basicsr_quant.network.trace import trace

    scale = int(name[-1])
    folder = {'dataroot_lq': str(data / f'calib/LR_bicubic/X{scale}'), 'io_backend': {'type': 'disk'}}
    config = read_config({
        **METHODS[method], **SETTINGS, 'w_bits': bits, 'a_bits': bits,
        'calibration': {'num_images': images, 'patch_size': SIZE[0], 'dataset': folder},
    })  # fmt: skip
    net = network(name, data)
    plan = config.plan(net, trace(net))
    quantize(net, plan)
    options = dataset_options(config.calibration, None, scale)
    assert config.calibration is not None
    crops = list(CalibrationImages(config.calibration, options, lambda found: found['lq'], 0))
    method_of(plan).calibrate(net, crops)
    return net.eval(), plan, scale


def test_images(scale: int, data: Path, fixed: bool) -> list[Any]:
    """Set5, as ``basicsr export`` reads it."""
    from basicsr_quant.models.deployment import parity_images

    folder = data / 'benchmarks/Set5'
    options = {
        'name': 'Set5', 'type': 'PairedImageDataset', 'filename_tmpl': f'{{}}x{scale}', 'io_backend': {'type': 'disk'},
        'dataroot_gt': str(folder / 'HR'), 'dataroot_lq': str(folder / f'LR_bicubic/X{scale}'),
    }  # fmt: skip
    return parity_images({'scale': scale, 'datasets': {'test': options}}, (1, 3, *SIZE), 5, fixed)[0]


def measured(net: Any, plan: Any, scale: int, engine: str, data: Path, fixed: bool) -> dict[str, Any]:
    """One export without its file: the figures, and what would have refused it."""
    from basicsr_quant.deploy import checker
    from basicsr_quant.deploy.capture import integer_plan
    from basicsr_quant.deploy.export import left_out_names
    from basicsr_quant.deploy.onnx_file import packed_onnx
    from basicsr_quant.deploy.parity import measure
    from basicsr_quant.models.deployment import psnr_of

    left_out = left_out_names(plan, engine)
    lowered = integer_plan(net, (1, 3, *SIZE), engine, dynamic=not fixed, leave_out=lambda name: name in left_out)
    content = packed_onnx(lowered).SerializeToString()
    images = test_images(scale, data, fixed)
    parity = measure(net, lowered, content, images, 'Set5', psnr_of(scale), openvino=engine == 'openvino')
    check = checker.check_onnxruntime if engine == 'onnxruntime' else checker.check_openvino
    found = check(lowered, content)
    refused = found.faults[0] if found.faults else ''
    try:
        parity.check(lowered, min(min(layer.w_bits, layer.a_bits) for layer in plan.quantized))
    except QuantError as error:
        refused = str(error)
    return {
        **parity.to_plain(), 'integer': found.integer, 'float': found.floating, 'bytes': len(content),
        'fixed_size': list(SIZE) if fixed else None, 'realigned': len(lowered.realigned), 'refused': refused,
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    from basicsr_quant.report.tables import markdown

    def cells(row: dict[str, Any]) -> list[Any]:
        ort = row['engine'] == 'onnxruntime'
        apart = row['simulator_vs_onnxruntime']
        psnr = row['psnr']
        integer, floating = (', '.join(f'{n} {k}' for k, n in row[part].items()) for part in ('integer', 'float'))
        return [
            row['network'], row['method'], row['bits'], row['engine'],
            f'{100 * apart["differing"]:.4f} %, {apart["largest_difference"]}' if ort else None,
            f'{psnr["test"]:.3f}', f'{psnr[row["engine"]]:.3f}', integer, floating, row['bytes'],
            row['refused'] or None,
        ]  # fmt: skip

    head = ['network', 'method', 'bits', 'engine', 'differ, by', '`basicsr test`', "engine's PSNR", 'integer', 'float',
            'bytes', 'refused']  # fmt: skip
    return markdown(head, [cells(row) for row in rows])


def main() -> None:
    names = [*list(NETWORKS)[:3], *RANDOM]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--networks', nargs='+', choices=[*NETWORKS, *RANDOM], default=names)
    parser.add_argument('--methods', nargs='+', choices=list(METHODS), default=list(METHODS))
    parser.add_argument('--bits', nargs='+', type=int, default=[8, 4, 2])
    parser.add_argument('--engines', nargs='+', choices=ENGINES, default=list(ENGINES))
    parser.add_argument('--images', type=int, default=16, help='calibration crops')
    parser.add_argument('--out', type=Path, default=Path('parity.jsonl'))
    parser.add_argument('--table', action='store_true', help='print the table of what is there and stop')
    args = parser.parse_args()
    rows = [json.loads(line) for line in args.out.read_text().splitlines()] if args.out.exists() else []
    if args.table:
        print(table(rows))
        return
    basicsr_quant.enable()
    torch.set_num_threads(1)
    data = Path(os.environ['BASICSR_QUANT_DATA']).resolve()
    there = {(row['network'], row['method'], row['bits'], row['engine']) for row in rows}
    for bits in args.bits:
        for name in args.networks:
            for method in args.methods:
                engines = [engine for engine in args.engines if (name, method, bits, engine) not in there]
                if not engines:
                    continue
                net, plan, scale = calibrated(name, method, bits, args.images, data)
                for engine in engines:
                    start = time.perf_counter()
                    run = {'network': name, 'method': method, 'bits': bits, 'engine': engine, 'crops': args.images}
                    row = {**run, **measured(net, plan, scale, engine, data, name in RANDOM)}
                    row['seconds'] = round(time.perf_counter() - start, 1)
                    with args.out.open('a') as file:
                        file.write(json.dumps(row) + '\n')
                    print(table([row]).splitlines()[-1], flush=True)


if __name__ == '__main__':
    main()
