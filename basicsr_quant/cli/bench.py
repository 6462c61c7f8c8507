"""``basicsr bench``."""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from .. import option_file
from ..errors import QuantError

name = 'bench'
help = 'time and memory of the training step or a calibration, or with --deploy of every engine, as ratios in one run'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option file and what to measure."""
    parser.add_argument('-opt', required=True, metavar='FILE', help='option file; network, batch and patch are its own')
    parser.add_argument('--methods', nargs='+', metavar='METHOD', help='methods to compare (default: the file\'s)')
    parser.add_argument('--pairs', type=int, default=10, help='pairs of steps, plain and quantized in turn')
    parser.add_argument('--batch', type=int, help='batch size instead of the file\'s')
    parser.add_argument('--patch', type=int, help='side of the LQ patch instead of the file\'s gt_size / scale')
    parser.add_argument('--threads', type=int, help='threads of torch (default: torch\'s own choice)')
    parser.add_argument('--calibration', type=int, metavar='N', help='not the training step: a calibration with N '
                        'random images of side --patch (default 96) over plain forward passes on them')
    parser.add_argument('--deploy', action='store_true', help='latency in every engine instead')
    parser.add_argument('--size', type=int, nargs=2, default=(180, 320), metavar=('HEIGHT', 'WIDTH'),
                        help='with --deploy: LQ image (default: 180 320)')
    parser.add_argument('--rounds', type=int, default=5, help='with --deploy: rounds (default: 5)')
    parser.add_argument('--checkpoint', metavar='FILE', help='with --deploy: a quantized checkpoint (default: ranges '
                        'from noise, which takes the same time)')
    parser.add_argument('--files', nargs='+', metavar='PATH', help='exported files, or folders of them, on the test '
                        'sets beside the network in PyTorch: PSNR, seconds, bits')
    parser.add_argument('--engine', choices=('onnxruntime', 'openvino'), help='with --files: runs .onnx files')
    parser.add_argument('--memory-of', help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> None:
    """Print a table of ratios."""
    if args.pairs < 1:
        raise QuantError(f'--pairs {args.pairs}: a whole number of at least 1 is needed')
    raw = option_file.read(option_file.find(args.opt))
    import basicsr_quant

    basicsr_quant.enable()
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.calibration is not None:
        _calibration(raw, args)
        return
    if args.files:
        _files(raw, args)
        return
    if args.deploy:
        _deploy(raw, args)
        return
    net, batch = _network(raw), _batch(raw, args)
    methods = args.methods or [_own(raw)]
    if args.memory_of is not None:
        from ..report.step_time import peak_memory

        method, _, teacher = args.memory_of.partition('+')
        plan = None if method == 'plain' else _plan(raw, net, method)
        print(peak_memory(net, plan, batch, distill=_distill(raw, net) if teacher else None))
        return
    from ..report.step_time import compare_steps
    from ..report.tables import markdown

    plain_bytes = _memory(args, 'plain')
    rows = []
    distill = _distill(raw, net)
    for method, teacher in ((m, t) for m in methods for t in (None, distill) if t is None or m == _own(raw)):
        plan = _plan(raw, net, method)
        found = compare_steps(net, plan, batch, args.pairs, distill=teacher)
        grown = _memory(args, method if teacher is None else f'{method}+teacher')
        rows.append([
            str(method) if teacher is None else f'{method} with teacher',
            f'{found.ratio:.2f}x', f'{found.low:.2f}-{found.high:.2f}', f'{grown / plain_bytes:.2f}x',
        ])  # fmt: skip
    lq = batch[0]
    shape = 'x'.join(map(str, lq.shape))
    print(f'basicsr bench -opt {args.opt}: training step on {lq.device.type}, {torch.get_num_threads()} threads, '
          f'batch {shape}, {args.pairs} pairs in turn; plain step {found.plain_seconds:.3f} s, '
          f'+{plain_bytes / 2**20:.0f} MiB')  # fmt: skip
    print(markdown(['method', 'step time (median)', 'least-greatest pair', 'peak memory'], rows))


def _calibration(raw: dict[str, Any], args: argparse.Namespace) -> None:
    import torch

    from ..report.calibration_time import RandomImages, compare_calibration, peak_memory
    from ..report.tables import markdown

    if args.calibration < 1:
        raise QuantError(f'--calibration {args.calibration}: a whole number of at least 1 is needed')
    net = _network(raw)
    channels = raw['network_g'].get('num_in_ch', 3)
    images = RandomImages(args.calibration, (args.batch or 1, channels, args.patch or 96, args.patch or 96))
    methods = args.methods or [(raw.get('quant') or {}).get('method')]
    if args.memory_of is not None:
        print(peak_memory(net, _plan(raw, net, args.memory_of), images))
        return
    rows = []
    for method in methods:
        found = compare_calibration(net, _plan(raw, net, method), images, args.pairs)
        grown = _memory(args, str(method))
        rows.append([
            str(method), f'{found.ratio:.2f}x', f'{found.low:.2f}-{found.high:.2f}', f'+{grown / 2**20:.0f} MiB',
        ])  # fmt: skip
    shape, device = 'x'.join(map(str, images.shape)), next(net.parameters()).device.type
    print(f'basicsr bench -opt {args.opt}: calibration with {len(images)} images of {shape} on {device}, '
          f'{torch.get_num_threads()} threads, {args.pairs} pairs in turn; plain passes {found.plain_seconds:.2f} s')
    print(markdown(['method', 'time (median)', 'least-greatest pair', 'peak memory'], rows))


def _deploy(raw: dict[str, Any], args: argparse.Namespace) -> None:
    """Print latencies in every engine."""
    import torch

    from ..deploy import bench
    from ..deploy.onnx_file import need
    from ..methods import method_of, quantize
    from ..models.deployment import load_quantized
    from ..models.preparation import build_float
    from ..network.trace import trace
    from ..report.tables import markdown
    from ..seam import import_components

    if args.rounds < 1 or min(args.size) < 1:
        raise QuantError(f'--rounds {args.rounds}, --size {args.size[0]} {args.size[1]}: numbers of at least 1 needed')
    need('onnx', 'onnxscript', 'onnxruntime')
    import_components(raw.get('imports'))
    if args.checkpoint:
        net, plan, source = load_quantized(raw, args.checkpoint, os.getcwd())
    else:
        net, source = build_float(raw['network_g']), 'ranges from noise'
        plan = _plan(raw, net, (raw.get('quant') or {}).get('method'))
        channels = trace(net).input_shape[1]
        quantize(net, plan)
        method_of(plan).calibrate(net, [torch.rand(1, channels, 48, 48, generator=torch.Generator().manual_seed(0))])
    image = torch.rand(1, trace(net).input_shape[1], *args.size, generator=torch.Generator().manual_seed(1))
    if bench.has_int8_instructions() is False:
        print('WARNING: this processor has no VNNI or AMX instructions; int8 gains little on it')
    rows = bench.compare(net.eval(), plan, image, args.rounds, threads=args.threads, report=print)
    threads = args.threads or 'default'
    print(f'basicsr bench --deploy -opt {args.opt}: {source}, input {"x".join(map(str, image.shape))}, '
          f'{threads} threads, medians of {args.rounds} rounds in turn')  # fmt: skip
    print(markdown(*bench.table(rows)))
    print(f"at most (Amdahl's law): {bench.GAIN:g}x for the MACs that run in integers; by time: {bench.GAIN:g}x "
          'for all but the time that the engine still computes in floating point')  # fmt: skip


def _files(raw: dict[str, Any], args: argparse.Namespace) -> None:
    """Print PSNR, time and bits of exported files on the test sets."""
    from pathlib import Path

    from ..config import read_config
    from ..cost import BitMeter, trace_at
    from ..deploy import compare_files, family_files
    from ..deploy.loading import load_file
    from ..deploy.router import Router
    from ..models.deployment import load_quantized, psnr_of, test_sets
    from ..report.tables import markdown

    missing = [path for path in args.files if not Path(path).exists()]
    if missing or args.rounds < 1:
        raise QuantError(f'--files {missing[0]} does not exist' if missing else f'--rounds {args.rounds}: at least 1')
    net, plan, checkpoint = load_quantized(raw, args.checkpoint, os.getcwd())
    patch = read_config(raw['quant']).patch
    cut = None if patch is None else (patch.size, patch.stride)
    meter = BitMeter(net, plan, trace_at(net, scale=raw.get('scale', 1)))
    runs: dict[str, Any] = {'basicsr test': net}
    bits: dict[str, Any] = {'basicsr test': lambda: meter.image().fab}
    for path in args.files:
        there = Path(path)
        load = family_files.load_family if there.is_dir() else load_file
        loaded = load(there, args.engine, args.threads)
        runs[path] = run = loaded.run
        if isinstance(run, Router):
            bits[path] = compare_files.bits_of_router(run)
    rows = compare_files.compare_files(
        {name: family_files.in_patches(run, cut) for name, run in runs.items()}, test_sets(raw),
        psnr_of(raw.get('scale', 1)), bits, args.rounds,
    )  # fmt: skip
    cutting = 'whole images' if cut is None else f'patches of {cut[0]} every {cut[1]} pixels'
    print(f'basicsr bench -opt {args.opt} --files: {checkpoint}, {cutting}, {args.threads or "default"} threads, '
          f'{args.rounds} rounds in turn')  # fmt: skip
    print(markdown(*compare_files.table(rows)))


def _network(raw: dict[str, Any]) -> Any:
    import torch

    from ..models.preparation import build_float

    for key in ('network_g', 'datasets', 'scale'):
        if key not in raw:
            raise QuantError(f'{key} is missing; `basicsr bench` reads it')
    device = 'cuda' if raw.get('num_gpu') != 0 and torch.cuda.is_available() else 'cpu'
    return build_float(raw['network_g']).to(device)


def _batch(raw: dict[str, Any], args: argparse.Namespace) -> Any:
    import torch

    train, scale = raw['datasets'].get('train', {}), raw['scale']
    size = args.patch or train.get('gt_size', 192) // scale
    count = args.batch or train.get('batch_size_per_gpu', 4)
    device = 'cuda' if raw.get('num_gpu') != 0 and torch.cuda.is_available() else 'cpu'
    generator = torch.Generator().manual_seed(0)
    sides = (size, size * scale)
    channels = raw['network_g'].get('num_in_ch', 3)
    lq, gt = (torch.rand(count, channels, side, side, generator=generator).to(device) for side in sides)
    return lq, gt


def _plan(raw: dict[str, Any], net: Any, method: str | None) -> Any:
    from ..config import read_config
    from ..network.trace import trace
    from ..sparsity import read_sparsity

    block = dict(raw.get('quant') or {})
    if method is None:
        raise QuantError('quant.method is missing in the option file; give it there, or by --methods')
    block = {k: v for k, v in block.items() if k != block.get('method') or k == method}
    sparsity = read_sparsity(raw.get('sparsity'))
    return read_config({**block, 'method': method}).plan(net, trace(net), sparsity=sparsity)


def _own(raw: dict[str, Any]) -> str | None:
    return (raw.get('quant') or {}).get('method')


def _distill(raw: dict[str, Any], net: Any) -> Any:
    """The file's distillation, for the method of the file; the teacher is the network at its start."""
    from ..config import read_config
    from ..methods.distillation import layer_weights

    block = raw.get('quant') or {}
    distill = read_config(block).distill if block.get('method') else None
    if distill is None:
        return None
    return layer_weights(net, distill.layer_weights(), distill.weight), distill.loss


def _memory(args: argparse.Namespace, of: str) -> int:
    """Peak memory in a process of its own: a peak never goes down again."""
    import subprocess

    command = [sys.executable, '-m', 'basicsr_quant', 'bench', '-opt', args.opt, '--memory-of', of]
    for flag in ('batch', 'patch', 'threads', 'calibration'):
        if getattr(args, flag):
            command += [f'--{flag}', str(getattr(args, flag))]
    # glibc keeps freed blocks of a few MiB in its heap; mapped one by one they count only while tensors live in them.
    env = {**os.environ, 'MALLOC_MMAP_THRESHOLD_': '1000000'}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise QuantError(f'measuring the memory of {of} failed: {done.stderr.strip().splitlines()[-1]}')
    return int(done.stdout.split()[-1])
