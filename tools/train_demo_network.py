"""Train the small FP32 EDSR x2 that the demo starts from, on photographs whose terms allow passing them on,
and, with ``--more``, on others.

    python tools/train_demo_network.py --out first.pth

L1, Adam with cosine decay, an average of the weights over the second half, flips and rotations. Photographs are used at
several sizes: shrinking them removes JPEG traces and makes more kinds of edges out of few pictures; drawn images
(dead_leaves.py) add more. The held-out photographs are only measured. tools/demo/CARD.md gives the commands of the
network that ships.
"""

from __future__ import annotations

import argparse
import math
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from dead_leaves import dead_leaves
from numpy.typing import NDArray
from photographs import HELD_OUT, REDISTRIBUTABLE, read
from torch import nn
from tqdm import tqdm

from basicsr_quant import compat
from basicsr_quant.data.bicubic import crop_to_multiple, imresize, low_resolution

SCALE = 2
NETWORK: dict[str, Any] = {
    'num_in_ch': 3,
    'num_out_ch': 3,
    'num_feat': 32,
    'num_block': 8,
    'upscale': SCALE,
    'img_range': 2.0,
}
SHRINK = (Fraction(1), Fraction(3, 4), Fraction(1, 2), Fraction(1, 3))
SHRINK_JPEG = (Fraction(1, 2), Fraction(1, 3), Fraction(1, 4))
"""Photographs kept as JPEG are used small enough that the traces of compression are gone."""

MORE_JPEG = Fraction(2, 3)
"""Size at which JPEG photographs of ``--more`` are used."""

DRAWN_SIZE = 256
FLAT = 4.0
"""Crops whose gray levels vary less than this (standard deviation, 0-255) teach nothing and are drawn again."""

Image = NDArray[np.uint8]
Pair = tuple[Image, Image]


def pair(hr: Image) -> Pair:
    return crop_to_multiple(hr, SCALE), low_resolution(hr, SCALE)


def photographs() -> dict[str, Image]:
    return {name: read(name, package) for package, names in REDISTRIBUTABLE.items() for name in names}


def pairs(images: dict[str, Image], smallest: int) -> list[Pair]:
    """Return (HR, LR) of every photograph at every size whose shorter side keeps ``smallest`` HR pixels."""
    found = []
    for name, photograph in images.items():
        for shrink in SHRINK_JPEG if name.endswith('.jpg') else SHRINK:
            hr = photograph if shrink == 1 else imresize(photograph, shrink)
            if min(hr.shape[:2]) >= smallest:
                found.append(pair(hr))
    return found


def more_pairs(folders: list[list[str]]) -> list[Pair]:
    """Return (HR, LR) of every so-many-th photograph of each (folder, step)."""
    found = []
    for folder, step in folders:
        for file in sorted(Path(folder).glob('*.*'))[:: int(step)]:
            image = cv2.imread(str(file))
            found.append(pair(imresize(image, MORE_JPEG) if file.suffix == '.jpg' else image))
    return found


def drawn_pairs(colours: list[Image], count: int, seed: int) -> list[Pair]:
    """Return (HR, LR) of ``count`` drawn images."""
    rng = np.random.default_rng(seed)
    return [pair(dead_leaves(rng, colours, DRAWN_SIZE)) for _ in tqdm(range(count), unit='drawn image')]


def shares(pool: list[Pair]) -> NDArray[np.float64]:
    """How often each image is seen: by the square root of its area, four times the pixels twice as often."""
    area = np.sqrt([lr.shape[0] * lr.shape[1] for _, lr in pool])
    return np.asarray(area / area.sum())


def draw(pool: list[Pair], share: NDArray[np.float64], size: int, rng: np.random.Generator) -> Pair:
    """Draw one LR crop of ``size`` x ``size`` with its HR crop, turned, mirrored, channels swapped at random."""
    while True:
        hr, lr = pool[rng.choice(len(pool), p=share)]
        top, left = rng.integers(lr.shape[0] - size + 1), rng.integers(lr.shape[1] - size + 1)
        crop = lr[top : top + size, left : left + size]
        if crop.mean(axis=2).std() >= FLAT:
            break
    top, left, size = top * SCALE, left * SCALE, size * SCALE
    both = hr[top : top + size, left : left + size], crop
    turns, mirror, swap = rng.integers(4), rng.integers(2), rng.permutation(3)
    turned = [np.rot90(c[:, :: -1 if mirror else 1, swap], turns) for c in both]
    return turned[0], turned[1]


def to_tensor(images: list[Image]) -> torch.Tensor:
    """(H, W, 3) BGR 0-255 -> (N, 3, H, W) RGB 0-1."""
    stacked = np.stack([np.ascontiguousarray(i[..., ::-1]) for i in images])
    return torch.from_numpy(stacked).permute(0, 3, 1, 2).contiguous().float() / 255


def upscale(network: nn.Module, lr: Image) -> Image:
    """Run the network on one BGR uint8 image."""
    with torch.no_grad():
        out = network(to_tensor([lr]))[0].clamp(0, 1).mul(255).round().byte()
    return np.ascontiguousarray(out.permute(1, 2, 0).numpy()[..., ::-1])


def measure(network: nn.Module) -> dict[str, tuple[float, float]]:
    """Return PSNR in dB (Y, border 2) of bicubic and of the network, for each held-out photograph."""
    from basicsr.metrics import calculate_psnr

    figures = {}
    for name in HELD_OUT:
        hr = crop_to_multiple(read(name), SCALE)
        lr = low_resolution(hr, SCALE)
        both = imresize(lr, SCALE), upscale(network, lr)
        bicubic, ours = (calculate_psnr(sr, hr, crop_border=SCALE, test_y_channel=True) for sr in both)
        figures[name] = bicubic, ours
    return figures


def show(figures: dict[str, tuple[float, float]]) -> str:
    bicubic, ours = np.mean(list(figures.values()), axis=0)
    each = ', '.join(f'{name} {b:.2f} -> {o:.2f}' for name, (b, o) in figures.items())
    return f'{each}; mean {bicubic:.3f} -> {ours:.3f} dB, {ours - bicubic:+.3f}'


def train(args: argparse.Namespace) -> nn.Module:
    """Train and return the averaged network."""
    from basicsr.archs.edsr_arch import EDSR

    torch.manual_seed(args.seed)
    rng = np.random.default_rng(args.seed)
    images = photographs()
    pools = [
        pairs(images, smallest=3 * SCALE * args.crop // 2),
        drawn_pairs(list(images.values()), args.drawn, args.seed) if args.drawn else [],
        more_pairs(args.more),
    ]
    chances = np.array([1 - args.drawn_share - args.more_share, args.drawn_share, args.more_share])
    shared = [shares(pool) if pool else np.zeros(0) for pool in pools]
    network = EDSR(**NETWORK)
    if args.start:
        network.load_state_dict(torch.load(args.start, weights_only=True)['params'])
    average = torch.optim.swa_utils.AveragedModel(
        network, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(args.ema)
    )
    optimizer = torch.optim.Adam(network.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1.0, (i + 1) / 100) * (0.005 + 0.995 * 0.5 * (1 + math.cos(math.pi * i / args.iterations))),
    )
    bar = tqdm(range(1, args.iterations + 1), unit='step', mininterval=5)
    for i in bar:
        which = rng.choice(3, args.batch, p=chances)
        batch = [draw(pools[w], shared[w], args.crop, rng) for w in which]
        hr, lr = to_tensor([b[0] for b in batch]), to_tensor([b[1] for b in batch])
        loss = nn.functional.l1_loss(network(lr), hr)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if i > args.iterations // 2:  # earlier weights would only drag
            average.update_parameters(network)
        if i % args.report == 0 or i == args.iterations:
            bar.write(f'{i}: {show(measure(average.module if average.n_averaged else network))}')
    return average.module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('tools/demo/EDSR_demo_x2.pth'))
    parser.add_argument('--start', type=Path, help='go on from this file')
    parser.add_argument('--drawn', type=int, default=96, help='number of drawn images')
    parser.add_argument('--drawn-share', type=float, default=0.4, help='share of the crops that are drawn ones')
    parser.add_argument('--more', nargs=2, action='append', default=[], metavar=('FOLDER', 'STEP'),
                        help='every STEP-th photograph of a folder; the network then carries their terms')  # fmt: skip
    parser.add_argument('--more-share', type=float, default=0.0, help='share of the crops that are from --more')
    parser.add_argument('--iterations', type=int, default=8000)
    parser.add_argument('--batch', type=int, default=16)
    parser.add_argument('--crop', type=int, default=24, help='LR crop in pixels')
    parser.add_argument('--lr', type=float, default=1e-3)
    parser.add_argument('--ema', type=float, default=0.999)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--report', type=int, default=500, help='measure the held-out photographs every so many steps')
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    compat.apply()
    network = train(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_name(args.out.name + '.tmp')
    torch.save({'params': network.state_dict()}, temporary)
    os.replace(temporary, args.out)
    print(f'{args.out}: {args.out.stat().st_size} bytes')


if __name__ == '__main__':
    main()
