"""``basicsr train``."""

from __future__ import annotations

import argparse

from . import _host

name = 'train'
help = 'train a network as the option file says (quantization-aware with a quant: block)'
add_arguments = _host.add_arguments


def run(args: argparse.Namespace) -> None:
    """Run the host's training pipeline."""
    _host.run('train', 'train', args)
