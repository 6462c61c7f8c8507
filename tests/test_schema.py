"""Options become dataclasses, or one sentence with the option's path."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import yaml

from basicsr_quant.errors import QuantError
from basicsr_quant.schema import option, read


@dataclass(frozen=True)
class Demo:
    count: int = option(3, low=1, high=10)
    rate: float = option(1.0, low=0)
    small: float = option(0.5, high=1.0)
    kind: str = option('red', choices=('red', 'green'))
    flag: bool = False
    text: str = 'a'
    maybe: str | None = option(None, choices=('x', 'y'))
    either: float | str = 'auto'
    raw: dict | None = None  # type: ignore[type-arg]


@pytest.mark.parametrize('given', [None, {}])
def test_defaults(given):
    assert read(Demo, given, 'quant.demo') == Demo()


@pytest.mark.parametrize(
    ('text', 'value'),
    [
        ('count: 4', 4),
        ('count: "4"', 4),
        ('count: 4.0', 4),
        ('count: "4.0"', 4),
        ('count: 1e1', 10),  # YAML gives text
        ('rate: 1e-5', 1e-5),
        ('rate: 1.0e-5', 1e-5),
        ('rate: "1E-5"', 1e-5),
        ('rate: 2', 2.0),
        ('rate: 0', 0.0),
        ('rate: 123456789012345678', 1.2345678901234568e17),
        ('kind: green', 'green'),
        ('flag: true', True),
        ('flag: off', False),
        ('text: ""', ''),
        ('maybe: null', None),
        ('maybe: x', 'x'),
        ('either: 3', 3.0),
        ('either: 1e-3', 1e-3),
        ('either: auto', 'auto'),
        ('raw: {a: {b: 1}}', {'a': {'b': 1}}),
        ('raw: null', None),
    ],
)
def test_values_are_read_as_meant(text, value):
    given = yaml.safe_load(text)
    (key,) = given
    found = getattr(read(Demo, given, 'quant.demo'), key)
    assert found == value and type(found) is type(value)
    assert all(getattr(read(Demo, given, 'p'), f.name) == f.default for f in dataclasses.fields(Demo) if f.name != key)


NUMBERS = 'a whole number from 1 to 10'


@pytest.mark.parametrize(
    ('given', 'path', 'said'),
    [
        ({'count': 0}, 'count', ['0 given', NUMBERS]),
        ({'count': 11}, 'count', ['11 given', NUMBERS]),
        ({'count': 2.5}, 'count', ['2.5 given', NUMBERS]),
        ({'count': '2.5'}, 'count', ["'2.5' given", NUMBERS]),
        ({'count': True}, 'count', ['True given', NUMBERS]),
        ({'count': None}, 'count', ['None given', NUMBERS]),
        ({'count': [4]}, 'count', ['[4] given', NUMBERS]),
        ({'count': {'a': 1}}, 'count', ["{'a': 1} given", NUMBERS]),
        ({'count': 'four'}, 'count', ["'four' given", NUMBERS]),
        ({'count': math.inf}, 'count', ['inf given', NUMBERS]),
        ({'count': 10**400}, 'count', ['given', NUMBERS]),
        ({'rate': -1e-9}, 'rate', ['-1e-09 given', 'a number of at least 0']),
        ({'rate': math.nan}, 'rate', ['nan given', 'a number of at least 0']),
        ({'rate': '.nan'}, 'rate', ["'.nan' given", 'a number of at least 0']),
        ({'rate': 'nan'}, 'rate', ["'nan' given", 'a number of at least 0']),
        ({'rate': math.inf}, 'rate', ['inf given', 'a number of at least 0']),
        ({'rate': '1e999'}, 'rate', ["'1e999' given", 'a number of at least 0']),
        ({'rate': False}, 'rate', ['False given', 'a number of at least 0']),
        ({'rate': ''}, 'rate', ["'' given", 'a number of at least 0']),
        ({'small': 1.5}, 'small', ['1.5 given', 'a number of at most 1']),
        ({'kind': 'gren'}, 'kind', ["'gren' given", "did you mean 'green'?", 'red | green']),
        ({'kind': 3}, 'kind', ['3 given', 'red | green']),
        ({'kind': None}, 'kind', ['None given', 'red | green']),
        ({'kind': ['red']}, 'kind', ["['red'] given", 'red | green']),
        ({'flag': 1}, 'flag', ['1 given', 'true or false']),
        ({'flag': 'true'}, 'flag', ["'true' given", 'true or false']),
        ({'text': 3}, 'text', ['3 given', 'text']),
        ({'maybe': 'z'}, 'maybe', ["'z' given", 'x | y']),
        ({'either': [1]}, 'either', ['[1] given', 'a number or text']),
        ({'raw': 'x'}, 'raw', ["'x' given", '`key: value` pairs']),
        ({'raw': []}, 'raw', ['[] given', '`key: value` pairs']),
        ({'cont': 3}, 'cont', ["did you mean 'count'?", 'allowed: count rate']),
        ({'zzz': 3}, 'zzz', ['is not an option', 'allowed: count rate']),
        ({3: 3}, '3', ['is not an option', 'allowed: count rate']),
        ({'count': 3, 'Count': 3}, 'Count', ["did you mean 'count'?"]),
    ],
)
def test_a_mistake_is_one_sentence_with_path_value_and_what_is_allowed(given, path, said):
    with pytest.raises(QuantError) as raised:
        read(Demo, given, 'quant.demo')
    message = str(raised.value)
    assert message.startswith(f'quant.demo.{path}') and '\n' not in message
    for part in said:
        assert part in message


@pytest.mark.parametrize('given', [3, 'text', [], [('count', 3)], True])
def test_anything_but_a_mapping_is_refused(given):
    with pytest.raises(QuantError, match=r'quant\.demo must hold `key: value` pairs, not .*allowed keys: count rate'):
        read(Demo, given, 'quant.demo')


def test_a_class_without_options_says_so():
    @dataclass(frozen=True)
    class Nothing: ...

    with pytest.raises(QuantError, match=r'quant\.none\.x is not an option; it has no options'):
        read(Nothing, {'x': 1}, 'quant.none')


def test_what_was_given_is_not_changed():
    given = {'raw': {'a': 1}, 'rate': '1e-5'}
    read(Demo, given, 'p').raw['a'] = 2
    assert given == {'raw': {'a': 1}, 'rate': '1e-5'}
