"""Named plug-ins: a registry per kind of room, filled by one decorator and opened to ``module:name``."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar

from nas.errors import ContentError

T = TypeVar("T")


class Registry(Generic[T]):
    """Maps a name in an experiment file to a class or function.

    A name with a colon, ``my_pkg.module:Name``, is imported instead of looked up, so that users add a
    plug-in without touching this package.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._items: dict[str, T] = {}
        self._families: dict[str, Callable[[str], T] | str] = {}

    def family(self, prefix: str, make: Callable[[str], T] | str) -> None:
        """Let ``prefix:rest`` stand for what ``make(rest)`` returns: plug-ins made of other plug-ins.

        Args:
            make: a function, or the ``module:name`` of one that is imported when first needed.
        """
        self._families[prefix] = make

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters an item under ``name``."""

        def enter(item: T) -> T:
            self._items[name] = item
            return item

        return enter

    def get(self, name: str) -> T:
        """The item called ``name``, one of a family (``prefix:rest``), or the object that ``module:name`` points at.

        Raises:
            ContentError: the name is unknown, or the module cannot be imported.
        """
        prefix, colon, rest = name.partition(":")
        if colon and prefix in self._families:
            make = self._families[prefix]
            return (import_object(make, self.what) if isinstance(make, str) else make)(rest)
        if colon:
            return import_object(name, self.what)
        if name not in self._items:
            raise ContentError(
                f"Unknown {self.what} {name!r}.",
                expected=f"one of {', '.join([*self, *(f'{p}:NAME' for p in self._families)])}, or 'module:name'",
            )
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._items))

    def __contains__(self, name: str) -> bool:
        return name in self._items


def import_object(path: str, what: str) -> Any:
    """Import ``module:name``; the working directory is importable, as it is for ``python script.py``.

    Raises:
        ContentError: the module or the name does not exist.
    """
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # and left there: worker processes inherit it and must find the module too
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ContentError(
            f"Cannot import {module_name!r} for the {what} {path!r}: {error}.",
            remedy="check the spelling, or run from the folder that holds the module",
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        raise ContentError(
            f"Module {module_name!r} has no {attribute!r} (asked for as the {what} {path!r})."
        ) from error
