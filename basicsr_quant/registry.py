"""Named things: methods, observers, quantizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from .errors import QuantError, nearest

T = TypeVar('T')


class Registry(Generic[T]):
    """A dictionary with a decorator. A name is registered once; a missing one lists those that exist.

    >>> colours: Registry[type] = Registry('colour')
    >>> @colours.register('red')
    ... class Red: ...
    >>> colours['red'].__name__
    'Red'
    >>> colours['rad']
    Traceback (most recent call last):
    basicsr_quant.errors.QuantError: there is no colour 'rad' (did you mean 'red'?); known: red
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Return a decorator that files what it decorates under ``name``; raises KeyError if the name is taken."""
        if name in self._items:
            raise KeyError(f"{self.kind} '{name}' is registered already")

        def decorate(item: T) -> T:
            if self._items.setdefault(name, item) is not item:
                raise KeyError(f"{self.kind} '{name}' is registered already")
            return item

        return decorate

    def __getitem__(self, name: str) -> T:
        if name not in self:
            known = ' '.join(self._items)
            raise QuantError(f"there is no {self.kind} '{name}'{nearest(name, self._items)}; known: {known}")
        return self._items[name]

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)
