"""``basicsr prune``."""

from __future__ import annotations

import argparse
import os

from .. import option_file

name = 'prune'
help = 'take whole filters out of a trained FP32 network: a smaller one with an option file of its own'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option file and what it does not say."""
    parser.add_argument('-opt', required=True, metavar='FILE', help='option file with a block sparsity:, its method '
                        'bn_filter, magnitude or random')
    parser.add_argument('--ratio', type=float, help='share of the prunable filters, instead of sparsity.ratio')
    parser.add_argument('--checkpoint', metavar='FILE', help='prune this FP32 file, not path.pretrain_network_g')
    parser.add_argument('--onnx', metavar='FILE', help='also write the smaller network as ONNX in floating point')
    parser.add_argument('--all', action='store_true', help='one row for each layer')


def run(args: argparse.Namespace) -> None:
    """Prune, write, print."""
    path = option_file.find(args.opt)
    raw = option_file.read(path)
    import basicsr_quant

    basicsr_quant.enable()
    from ..cost import trace_at
    from ..models.preparation import build_float
    from ..models.pruning import prune_file
    from ..report.pruning_card import pruning_card
    from ..sparsity.filter_options import read_filter_pruning

    block = raw.get('sparsity')
    if args.ratio is not None and isinstance(block, dict):
        block = {**block, 'ratio': args.ratio}
    options = read_filter_pruning(block)
    if args.onnx:
        from ..deploy.onnx_file import need

        need('onnx', 'onnxscript')
    made_by = f'written by `basicsr prune -opt {args.opt}` ({options.method}, ratio {options.ratio:g})'
    done = prune_file(raw, options, args.checkpoint, os.getcwd(), made_by)
    scale = raw.get('scale', 1)
    before = trace_at(build_float(raw['network_g']), scale=scale)
    print(pruning_card(done.report, before, trace_at(done.net, scale=scale), show_all=args.all))
    if args.onnx:
        from ..deploy.capture import float_graph
        from ..deploy.files import write_bytes
        from ..deploy.onnx_file import to_onnx

        assert done.report.traced_after is not None
        shape = done.report.traced_after.input_shape
        graph, batched = float_graph(done.net, shape)
        write_bytes(args.onnx, to_onnx(graph, shape, batched=batched).SerializeToString())
        print(f'\n{args.onnx}: {os.path.getsize(args.onnx):,} bytes')
    print(f'\n{os.path.relpath(done.checkpoint)}, from {done.source}'
          f'\nmeasure it: basicsr test -opt {done.option_file}'
          f'\nfine-tune it: basicsr train -opt {done.option_file}; test that with '
          f'--checkpoint experiments/{done.name}/models/net_g_latest.pth')  # fmt: skip
