"""Measure 8-bit mobile networks with their final clip, without it, and calibrated clip-free (CFQP).

    BASICSR_QUANT_DATA=... python tools/clip_free.py --network ABPN --weights ABPN_x2.pth

W8A8, every layer, per-channel weights, min-max ranges, 100 LR crops of calib/ to calibrate on. The 8-bit output is read
in two ways: rescaled and clipped by the host (the same pixels as a clip of its own in the network gives), or its codes
taken as pixels, which is what makes dropping the clip worth it. Where an engine can fuse the clip into the operator
before it, the output's range is exactly the image range, whatever the images: a row of its own.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from torch import Tensor, nn

from basicsr_quant import compat
from basicsr_quant.methods import method_of, quantize, settings_of
from basicsr_quant.methods.cfqp import CFQP
from basicsr_quant.network.plan import Plan
from basicsr_quant.network.planning import PlanRequest, make_plan
from basicsr_quant.network.stages import Stages
from basicsr_quant.network.surgery import floating_point
from basicsr_quant.network.trace import trace
from basicsr_quant.report.tables import markdown

SCALE = 2


def read(path: Path) -> Tensor:
    """(1, 3, H, W) RGB in 0-1."""
    image = cv2.imread(str(path), cv2.IMREAD_COLOR)
    return torch.from_numpy(np.ascontiguousarray(image[..., ::-1])).permute(2, 0, 1)[None].float() / 255


def pairs(folder: Path) -> list[tuple[Tensor, np.ndarray]]:
    """LR tensors and HR images (BGR uint8) of a benchmark."""
    found = []
    for file in sorted((folder / 'HR').glob('*.png')):
        lr = read(folder / f'LR_bicubic/X{SCALE}/{file.stem}x{SCALE}.png')
        hr = cv2.imread(str(file), cv2.IMREAD_COLOR)[: lr.shape[2] * SCALE, : lr.shape[3] * SCALE]
        found.append((lr, hr))
    return found


def measure(run: Any, sets: dict[str, list[tuple[Tensor, np.ndarray]]]) -> dict[str, float]:
    """Mean PSNR (Y, border of ``SCALE`` left out) by set."""
    from basicsr.metrics import calculate_psnr
    from basicsr.utils import tensor2img

    return {
        name: float(np.mean([
            calculate_psnr(tensor2img([run(lr)]), hr, crop_border=SCALE, test_y_channel=True) for lr, hr in images
        ]))
        for name, images in sets.items()
    }  # fmt: skip


def plan_for(net: nn.Module, options: dict[str, Any]) -> Plan:
    settings = settings_of('cfqp', w_granularity='channel', options=options)
    traced = trace(net)
    rectified = frozenset(layer.name for layer in traced.layers if layer.rectified)
    plan = make_plan(net, PlanRequest('cfqp', 8, 8, 'all', settings=settings), rectified)
    return method_of(plan).complete_plan(plan, net)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--network', choices=['ABPN', 'XLSR'], required=True)
    parser.add_argument('--weights', type=Path, required=True)
    parser.add_argument('--images', type=int, default=100)
    parser.add_argument('--sets', nargs='+', default=['Set5', 'Set14'])
    parser.add_argument('--options', type=json.loads, default={}, help='options of cfqp as JSON')
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    torch.set_num_threads(1)
    compat.apply()
    from basicsr_quant.archs import ABPN, XLSR
    from basicsr_quant.data.calibration import centre_crop

    net = {'ABPN': ABPN, 'XLSR': XLSR}[args.network](upscale=SCALE).eval()
    net.load_state_dict(torch.load(args.weights, weights_only=True)['params'])
    data = Path(os.environ['BASICSR_QUANT_DATA'])
    sets = {name: pairs(data / 'benchmarks' / name) for name in args.sets}
    files = sorted((data / f'calib/LR_bicubic/X{SCALE}').glob('*.png'))[: args.images]
    images = [centre_crop(read(file), 96) for file in files]
    rows: list[list[object]] = []

    def row(name: str, span: tuple[float, float] | None, run: Any) -> None:
        figures = measure(run, sets)
        rows.append([name, None if span is None else f'{span[0]:.4f} to {span[1]:.4f}', *figures.values()])

    with torch.no_grad():
        row('FP32, clip', None, net)
        plan = plan_for(net, args.options)
        quantize(net, plan)
        with floating_point(net):
            row('FP32, no clip', None, net)
        method = method_of(plan)
        assert isinstance(method, CFQP)

        def both(name: str) -> None:
            low, high = span = method.output_grid(net)
            row(f'{name}: rescaled, clipped outside', span, net)
            row(f'{name}: codes are pixels', span, lambda lr: (net(lr) - low) / (high - low))

        method.set_ranges(net, images, Stages())
        both('INT8, images as given')
        net.output_quantizer.set_range(torch.tensor(0.0), torch.tensor(1.0))
        row('INT8, images as given, clip fused into the last operator', method.output_grid(net), net)
        stages = Stages()
        seen = method.calibrate(net, images, stages)
        both('INT8, CFQP')
    print(json.dumps({k: v for k, v in seen.choices.items() if k != 'representative'}))
    print(*seen.choices['representative'], sep='\n')
    print({name: round(seconds, 2) for name, seconds in stages.seconds.items()})
    print(markdown([f'{args.network} x{SCALE}', 'output range', *sets], rows))


if __name__ == '__main__':
    main()
