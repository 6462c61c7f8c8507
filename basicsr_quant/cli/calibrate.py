"""``basicsr calibrate``."""

from __future__ import annotations

import argparse

from . import _host

name = 'calibrate'
help = 'quantize a trained FP32 network without training, then measure it'
add_arguments = _host.add_arguments


def run(args: argparse.Namespace) -> None:
    """Run the host's test pipeline, which calibrates first."""
    _host.run('calibrate', 'test', args)
