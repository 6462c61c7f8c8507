"""Time what the final clip of a mobile network costs in ONNX Runtime, in floating point and as 8-bit QDQ.

    python tools/clip_time.py --network ABPN --threads 1

Weights are random (time does not depend on them); the 8-bit graphs are ONNX Runtime's own static quantization, min-max,
per-channel weights. Graphs with and without clip run in turn; the ratio is the median over the pairs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from basicsr_quant import compat
from basicsr_quant.report.tables import markdown


class Images(CalibrationDataReader):
    def __init__(self, shape: tuple[int, ...]) -> None:
        draw = np.random.default_rng(0)
        self._images = iter([{'input': draw.random(shape, dtype=np.float32)} for _ in range(4)])

    def get_next(self) -> Any:
        return next(self._images, None)


def session(path: Path, threads: int) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return onnxruntime.InferenceSession(str(path), options, providers=['CPUExecutionProvider'])


def seconds(run: onnxruntime.InferenceSession, image: np.ndarray) -> float:
    start = time.perf_counter()
    run.run(None, {'input': image})
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--network', choices=['ABPN', 'XLSR'], required=True)
    parser.add_argument('--scale', type=int, default=2)
    parser.add_argument('--size', type=int, nargs=2, default=[180, 320], help='height and width of the input')
    parser.add_argument('--pairs', type=int, default=31)
    parser.add_argument('--threads', type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    compat.apply()
    from basicsr_quant.archs import ABPN, XLSR

    kind = {'ABPN': ABPN, 'XLSR': XLSR}[args.network]
    shape = (1, 3, *args.size)
    image = np.random.default_rng(1).random(shape, dtype=np.float32)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for clip in (True, False):
            torch.manual_seed(0)
            path = Path(folder, f'fp32_{clip}.onnx')
            net = kind(upscale=args.scale, clip=clip).eval()
            program = torch.onnx.export(net, (torch.rand(shape),), dynamo=True, verbose=False, input_names=['input'])
            program.save(str(path))
            quantize_static(
                str(path), Path(folder, f'int8_{clip}.onnx'), Images(shape), quant_format=QuantFormat.QDQ,
                per_channel=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
            )  # fmt: skip
        for bits in ('fp32', 'int8'):
            paths = [Path(folder, f'{bits}_{clip}.onnx') for clip in (True, False)]
            runs = [session(path, args.threads) for path in paths]
            for run in runs * 3:
                seconds(run, image)
            pairs = [(seconds(runs[0], image), seconds(runs[1], image)) for _ in range(args.pairs)]
            nodes = [sum(n.op_type in ('Clip', 'Min', 'Max') for n in onnx.load(path).graph.node) for path in paths]
            rows.append([
                bits, nodes[0] - nodes[1], 1e3 * min(a for a, _ in pairs), 1e3 * min(b for _, b in pairs),
                median(b / a for a, b in pairs), min(b for _, b in pairs) / min(a for a, _ in pairs),
            ])  # fmt: skip
    header = ['graph', 'clip nodes', 'ms with clip', 'ms without', 'without / with, median', 'of the minima']
    print(f'{args.network} x{args.scale}, input {args.size}, {args.threads} threads')
    print(markdown(header, rows))


if __name__ == '__main__':
    main()
