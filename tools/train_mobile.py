"""Train the mobile networks of the clip-free figures, ABPN and XLSR x2, on the photographs of BASICSR_QUANT_DATA.

    BASICSR_QUANT_DATA=... python tools/train_mobile.py --network ABPN --out ABPN_x2.pth

L1 through the clip, as the papers train. 400 JPEG photographs at two thirds of their size and 100 PNG ones; their terms
(research use) go on to the weights. The full recipe on DIV2K is options/ABPN_x2_FP32.yml and options/XLSR_x2_FP32.yml.
"""

from __future__ import annotations

import argparse
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from train_demo_network import SCALE, draw, more_pairs, shares, to_tensor

from basicsr_quant import compat


def train(args: argparse.Namespace) -> nn.Module:
    """Train and return the averaged network."""
    from basicsr_quant.archs import ABPN, XLSR

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    data = Path(os.environ['BASICSR_QUANT_DATA']) / 'train'
    pool = more_pairs([[str(data / 'bsds400'), '1'], [str(data / 'div2k_x4down100'), '1']])
    share = shares(pool)
    network = {'ABPN': ABPN, 'XLSR': XLSR}[args.network](upscale=SCALE)
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.999)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1.0, (i + 1) / 100) * (0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * i / args.iterations))),
    )
    bar = tqdm(range(1, args.iterations + 1), unit='step', mininterval=5)
    mean = 0.0
    for i in bar:
        batch = [draw(pool, share, args.crop, rng) for _ in range(args.batch)]
        hr, lr = to_tensor([b[0] for b in batch]), to_tensor([b[1] for b in batch])
        loss = nn.functional.l1_loss(network(lr), hr)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        mean += (loss.item() - mean) / min(i, 200)
        if i > args.iterations // 2:
            average.update_parameters(network)
        if i % 200 == 0:
            bar.write(f'{i}: L1 {mean:.5f}')
    return average.module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--network', choices=['ABPN', 'XLSR'], required=True)
    parser.add_argument('--out', type=Path, required=True)
    parser.add_argument('--iterations', type=int, default=6000)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--crop', type=int, default=24, help='LR crop in pixels')
    parser.add_argument('--lr', type=float, default=2e-3)
    parser.add_argument('--seed', type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    compat.apply()
    network = train(args)
    temporary = args.out.with_name(args.out.name + '.tmp')
    torch.save({'params': network.state_dict()}, temporary)
    os.replace(temporary, args.out)
    print(f'{args.out}: {args.out.stat().st_size} bytes')


if __name__ == '__main__':
    main()
