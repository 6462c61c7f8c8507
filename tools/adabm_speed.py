"""Time AdaBM's fine-tuning steps against a plain form of the published step, as interleaved pairs.

The plain form does what the publication describes with nothing kept or merged: the FP32 network runs again for every
step, quantizers are elementwise operators under autograd, block outputs are compared as they come.

    BASICSR_QUANT_DATA=... python tools/adabm_speed.py --steps 7 --images 16

prints, for each kind of epoch, the median seconds of a step of both and the median of the pairs' ratios, and the ratio
of a whole schedule (4, 3 and 3 epochs). On a machine that does other work use ``--clock cpu``.
"""

from __future__ import annotations

import argparse
import copy
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from basicsr_quant.methods import method_of, quantize
from basicsr_quant.methods.adabm_tuning import GROUPS, Tuner, Tuning
from basicsr_quant.network.scope import block_names
from basicsr_quant.network.surgery import quant_layers
from basicsr_quant.network.teacher import Teacher
from basicsr_quant.quantizers import AdaptiveRange, complexity


def round_through(x: Tensor) -> Tensor:
    """round(x), gradient of x."""
    return x + (x.round() - x).detach()


def range_quantize(x: Tensor, lower: Tensor, upper: Tensor, bits: Any) -> Tensor:
    """The asymmetric range quantizer as autograd sees it, operator by operator."""
    steps = 2.0**bits - 1
    clipped = torch.clamp(x, lower, upper)
    return round_through((clipped - lower) * steps / (upper - lower)) * (upper - lower) / steps + lower


class PlainConv(nn.Module):
    """A convolution with AdaBM's quantizers, written out."""

    def __init__(self, owner: PlainStep, layer: Any) -> None:
        super().__init__()
        self.owner = [owner]  # a list, so that it is no submodule
        self.weight, self.bias, self.padding = layer.weight.detach(), layer.bias.detach(), layer.padding
        a, w = layer.input_quantizer, layer.weight_quantizer
        self.base = a.num_bits
        self.w_bits = w.num_bits
        lower, upper = (b.detach().clone() for b in a.bounds(self.weight))
        self.lower, self.upper = nn.Parameter(lower), nn.Parameter(upper)
        self.bound = nn.Parameter((w.alpha * w.unit).detach().clone())
        self.factor = nn.Parameter(a.layer_factor.detach().clone()) if isinstance(a, AdaptiveRange) else None

    def forward(self, x: Tensor) -> Tensor:
        owner = self.owner[0]
        bits: Any = float(self.base)
        if self.factor is not None:
            soft = torch.tanh(self.factor)
            bits = self.base + owner.image_bits + soft + (self.factor.clamp(-1, 1).round() - soft).detach()
            owner.bits.append(bits)
            bits = bits.reshape(-1, 1, 1, 1)
        weight = range_quantize(self.weight, -self.bound, self.bound, self.w_bits)
        return nn.functional.conv2d(range_quantize(x, self.lower, self.upper, bits), weight, self.bias, 1, self.padding)


class PlainStep:
    """The published step on a copy of a calibrated network.

    Args:
        net: The quantized network.
        original: The FP32 network.
    """

    def __init__(self, net: nn.Module, original: nn.Module) -> None:
        self.teacher = copy.deepcopy(original).eval().requires_grad_(False)
        self.student = copy.deepcopy(original).eval().requires_grad_(False)
        self.convs = []
        for name, layer in quant_layers(net).items():
            parent, _, child = name.rpartition('.')
            self.convs.append(PlainConv(self, layer))
            setattr(self.student.get_submodule(parent), child, self.convs[-1])
        mapping: Any = net.get_submodule('quant_measures.image_bits')
        self.lower, self.upper = (nn.Parameter(p.detach().clone()) for p in (mapping.lower, mapping.upper))
        self.bits: list[Tensor] = []
        self.groups = {
            'weight ranges': [{'params': [c.bound], 'lr': 0.01 * float(c.bound.detach())} for c in self.convs],
            'activation ranges': [{'params': [c.lower, c.upper], 'lr': 0.01 * float((c.upper - c.lower).detach())}
                                  for c in self.convs],
            'bit mappings': [{'params': [self.lower, self.upper], 'lr': 0.1},
                             {'params': [c.factor for c in self.convs if c.factor is not None], 'lr': 0.01}],
        }  # fmt: skip
        self.optimizers = {name: torch.optim.Adam(groups) for name, groups in self.groups.items()}

    def learn(self, name: str) -> None:
        """Let one group learn and the others rest."""
        for other, groups in self.groups.items():
            for group in groups:
                for p in group['params']:
                    p.requires_grad_(other == name)

    def run(self, net: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        features: list[Tensor] = []
        handles = [net.get_submodule(name).register_forward_hook(lambda m, i, o: features.append(o))
                   for name in block_names(self.teacher)]  # fmt: skip
        output = net(images)
        for handle in handles:
            handle.remove()
        return output, features

    def loss(self, images: Tensor, name: str) -> Tensor:
        """The loss of a step of group ``name``."""
        self.bits = []
        found = complexity(images)
        hard = (found > self.upper).float() - (found < self.lower).float()
        soft = torch.tanh((found - (self.upper + self.lower) / 2) * 2 / (self.upper - self.lower))
        self.image_bits = soft + (hard - soft).detach()
        with torch.no_grad():
            wanted, wanted_features = self.run(self.teacher, images)
        output, features = self.run(self.student, images)
        loss = 255.0 * (output - wanted).abs().mean()
        distances = []
        for ours, theirs in zip(features, wanted_features):
            for a, b in zip(ours, theirs):
                distances.append((a / torch.norm(a) - b / torch.norm(b)).norm())
        loss = loss + 10.0 * torch.stack(distances).mean()
        if name == 'bit mappings' and self.bits:
            base = sum(c.base for c in self.convs if c.factor is not None) / len(self.bits)
            loss = loss + 50.0 * (torch.stack(self.bits).mean() - base).clamp(min=0.0)
        return loss

    def step(self, images: Tensor, name: str) -> float:
        loss = self.loss(images, name)
        self.optimizers[name].zero_grad()
        loss.backward()
        self.optimizers[name].step()
        return float(loss)


def timed(clock: Callable[[], float], work: Callable[[], Any]) -> float:
    start = clock()
    work()
    return clock() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=7, help='pairs of steps of each kind')
    parser.add_argument('--images', type=int, default=16)
    parser.add_argument('--batch', type=int, default=2)
    parser.add_argument('--clock', choices=('wall', 'cpu'), default='wall')
    args = parser.parse_args()
    clock = time.perf_counter if args.clock == 'wall' else time.process_time

    import cv2

    from basicsr_quant import compat

    compat.apply()
    from basicsr.archs.edsr_arch import EDSR

    from basicsr_quant.config import read_config
    from basicsr_quant.network.trace import trace

    data = Path(os.environ['BASICSR_QUANT_DATA'])
    original = EDSR(3, 3, num_feat=64, num_block=8, upscale=2, img_range=2.0)
    original.load_state_dict(torch.load(data / 'weights/EDSR-b8f64_x2.pth', weights_only=True)['params'])
    net = copy.deepcopy(original)
    block = {'method': 'adabm', 'w_bits': 4, 'a_bits': 4, 'adabm': {'epochs': 0, 'batch': args.batch}}
    plan = read_config(block).plan(net, trace(net))
    quantize(net, plan)
    files = sorted((data / 'calib/LR_bicubic/X2').glob('*.png'))[: args.images]
    images = [torch.from_numpy(cv2.imread(str(f))[:, :, ::-1].copy()).permute(2, 0, 1)[None] / 255 for f in files]
    method_of(plan).calibrate(net, images)
    plain = PlainStep(net, original)
    teacher = Teacher(net)
    from basicsr_quant.network.surgery import floating_point

    with teacher.recording(), floating_point(net), torch.no_grad():
        for image in images:
            net(image)
    whole = [0.0, 0.0]
    for name, epochs in zip(GROUPS, (4, 3, 3)):
        tuner = Tuner(net, teacher, Tuning(cycle=((name,),), batch=args.batch))
        plain.learn(name)
        ours, theirs = [], []
        with tuner.learning((name,)) as step:
            for number in range(args.steps + 1):
                indices = [(number * args.batch + k) % len(images) for k in range(args.batch)]
                batch = torch.cat([images[i] for i in indices])
                theirs.append(timed(clock, lambda: plain.step(batch, name)))  # noqa: B023 (called at once)
                ours.append(timed(clock, lambda: step(indices)))  # noqa: B023
        ours, theirs = ours[1:], theirs[1:]  # the first pair warms up
        ratio = median(b / a for a, b in zip(ours, theirs))
        whole[0] += epochs * median(ours)
        whole[1] += epochs * median(theirs)
        print(f'{name:18} ours {median(ours):.3f} s, plain {median(theirs):.3f} s, ratio {ratio:.2f}', flush=True)
    print(f'schedule of 4, 3 and 3 epochs: ratio {whole[1] / whole[0]:.2f} ({args.clock} time, batch {args.batch})')
    teacher.close()


if __name__ == '__main__':
    main()
