"""Which room may know which: read from the import statements, so that nothing has to be installed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import basicsr_quant

ROOT = Path(basicsr_quant.__file__).parent
BELOW = {  # each room and the ones it may know
    'quantizers': set(),
    'nn': {'quantizers'},
    'network': {'quantizers', 'nn'},
    'sparsity': {'nn', 'network'},
    'methods': {'quantizers', 'nn', 'network', 'sparsity'},
    'cost': {'network'},
    'deploy': {'quantizers', 'nn', 'network', 'methods', 'cost'},
}
HOSTS = {'basicsr', 'mmagic', 'mmengine', 'torchvision', 'cv2'}
COMMON = {'errors', 'random_state', 'registry', 'schema', 'version'}
"""Modules beside the rooms that know none of them."""


def imports(file: Path) -> set[str]:
    """Absolute names of the modules that a file imports."""
    package = ('basicsr_quant', *file.relative_to(ROOT).parts[:-1])
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = '.'.join(package[: len(package) - node.level + 1]) + '.' if node.level else ''
            names = [node.module] if node.module else [alias.name for alias in node.names]
            found |= {base + name for name in names}
    return found


@pytest.mark.parametrize('room', BELOW)
def test_a_room_knows_only_what_lies_below_it(room):
    files = sorted((ROOT / room).rglob('*.py'))
    assert files
    for file in files:
        names = imports(file)
        assert not {n.split('.')[0] for n in names} & HOSTS, file
        own = {n.split('.')[1] for n in names if n.startswith('basicsr_quant.')}
        assert own <= BELOW[room] | COMMON | {room}, file


@pytest.mark.parametrize('module', sorted(COMMON))
def test_common_modules_know_no_room(module):
    own = {n.split('.')[1] for n in imports(ROOT / f'{module}.py') if n.startswith('basicsr_quant.')}
    assert own <= COMMON
