"""What N:M sparsity leaves of each layer, for the card of a plan and the result page."""

from __future__ import annotations

from ..network.sparsity_plan import SparsityPlan
from .spans import by_pattern, span

HEADER = ('masked layers', 'N:M', 'density')


def rows(sparsity: SparsityPlan) -> list[list[object]]:
    """Layers of one N and density in one row, as the network registers them."""
    kinds: dict[tuple[str, str], list[str]] = {}
    for layer in sparsity.layers:
        kind = f'{layer.kept}:{sparsity.group}', f'{layer.density(sparsity.group):.4f}'
        kinds.setdefault(kind, []).append(layer.layer)
    return [[', '.join(map(span, by_pattern(names))), *kind] for kind, names in kinds.items()]


def lines(sparsity: SparsityPlan, learns: bool) -> list[str]:
    """What the card says: layers, budget, what stays dense and why, and what engines do with it.

    Args:
        sparsity: The plan.
        learns: N comes out of training, so that the plan's is only its start.
    """
    reasons: dict[str, list[str]] = {}
    for name, why in sparsity.dense.items():
        reasons.setdefault(why, []).append(name)
    dense = [f'  {why}: {", ".join(map(span, by_pattern(names)))}' for why, names in reasons.items()]
    heading = f'sparsity {sparsity.method}, M {sparsity.group}: {len(sparsity.layers)} layers masked, '
    if learns:
        heading += f'N of each is learned until at most {100 * sparsity.budget:g} % of their MACs remain'
        found = []
    else:
        heading += f'{100 * sparsity.share():.2f} % of their MACs remain (budget {100 * sparsity.budget:g} %)'
        found = [f'  {names}: {pattern}, density {density}' for names, pattern, density in rows(sparsity)]
    return [heading, *found, 'dense:', *dense, sparsity.engines]
