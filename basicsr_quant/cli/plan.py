"""``basicsr plan``."""

from __future__ import annotations

import argparse

from .. import option_file
from ..errors import QuantError

name = 'plan'
help = 'show what would be quantized, layer by layer, and why'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the option file and the level of detail."""
    parser.add_argument('-opt', required=True, metavar='FILE', help='option file; data and checkpoints are not read')
    parser.add_argument('--all', action='store_true', help='one row for each layer')


def run(args: argparse.Namespace) -> None:
    """Print the card of the plan."""
    raw = option_file.read(option_file.find(args.opt))
    if not isinstance(raw.get('network_g'), dict) or 'type' not in raw['network_g']:
        raise QuantError(f'{args.opt} has no network_g.type; `basicsr plan` shows the plan of that network')
    import basicsr_quant

    basicsr_quant.enable()
    from ..config import read_config
    from ..models.preparation import build_float
    from ..network.trace import trace
    from ..report.plan_card import plan_card
    from ..seam import import_components
    from ..sparsity import read_sparsity

    import_components(raw.get('imports'))
    net = build_float(raw['network_g'])
    traced = trace(net)
    config = read_config(raw.get('quant') or {'method': 'none'})
    plan = config.plan(net, traced, sparsity=read_sparsity(raw.get('sparsity')))
    print(plan_card(traced, plan, show_all=args.all))
