"""The registry: names are taken once, missing ones are answered with the known ones."""

from __future__ import annotations

import pytest

from basicsr_quant.errors import QuantError
from basicsr_quant.methods import METHODS
from basicsr_quant.registry import Registry


@pytest.fixture
def colours() -> Registry[int]:
    registry: Registry[int] = Registry('colour')
    registry.register('red')(1)
    registry.register('green')(2)
    return registry


def test_items_are_found_in_the_order_they_came(colours):
    assert list(colours) == ['red', 'green'] and colours['red'] == 1
    assert 'red' in colours and 'blue' not in colours


def test_a_decorator_gives_back_what_it_decorates():
    registry: Registry[type] = Registry('shape')

    @registry.register('square')
    class Square: ...

    assert registry['square'] is Square


def test_a_name_is_taken_once_and_a_refusal_changes_nothing(colours):
    late = colours.register('blue')
    colours.register('blue')(3)
    for attempt in (lambda: colours.register('red'), lambda: late(4)):
        with pytest.raises(KeyError, match='is registered already'):
            attempt()
    assert [colours[name] for name in colours] == [1, 2, 3]


@pytest.mark.parametrize(
    ('name', 'hint'),
    [('rad', " (did you mean 'red'?)"), ('xyz', ''), (None, ''), (3, ''), (['red'], " (did you mean 'red'?)")],
)
def test_a_missing_name_is_answered_with_the_known_ones(colours, name, hint):
    assert name not in colours
    with pytest.raises(QuantError) as raised:
        colours[name]
    assert str(raised.value) == f"there is no colour '{name}'{hint}; known: red green"


def test_the_methods_of_this_version():
    assert set(METHODS) >= {'none', 'minmax', 'percentile', 'mse', 'lsq', 'pams', 'odm', 'odm_v1'}
    assert all(METHODS[name].name == name for name in METHODS)
