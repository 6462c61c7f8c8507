"""``basicsr train``."""

from __future__ import annotations

import argparse

from .. import option_file
from . import _host, _two_stages

name = 'train'
help = 'train a network as the option file says (quantization-aware with a quant: block)'
add_arguments = _host.add_arguments


def run(args: argparse.Namespace) -> None:
    """Run the host's training pipeline; with ``quant.first_stage``, that stage before it."""
    raw = option_file.read(option_file.find(args.opt))
    if not _two_stages.asked_for(raw):
        _host.run('train', 'train', args)
        return
    import basicsr_quant

    basicsr_quant.enable()
    from ..seam import force

    force(raw, args.force_yml)
    with _two_stages.first_stage(args, raw) as second:
        args.opt, args.force_yml = second, None
        _host.run('train', 'train', args)
