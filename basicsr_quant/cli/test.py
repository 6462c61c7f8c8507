"""``basicsr test``."""

from __future__ import annotations

import argparse

from . import _host

name = 'test'
help = 'measure PSNR, SSIM and cost of a trained or calibrated network'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the host's flags and the checkpoint."""
    _host.add_arguments(parser)
    parser.add_argument('--checkpoint', metavar='FILE', help='test this checkpoint, not the experiment\'s own')


def run(args: argparse.Namespace) -> None:
    """Run the host's test pipeline."""
    _host.run('test', 'test', args, checkpoint=args.checkpoint)
