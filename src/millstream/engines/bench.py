"""A worker that does calls one after the other, and leaves what it puts on its shelf to whoever called."""

import os
from collections.abc import Callable, Generator
from contextlib import suppress
from types import GeneratorType
from typing import Any, NamedTuple

from millstream.engines.lean import keep_freed_memory
from millstream.engines.worker import portable


class OwnShelf:
    """The shelf of a worker process: what the call that it does was `given`, and what it has `put`."""

    def __init__(self) -> None:
        self.given: dict[str, Any] = {}
        self.tray: dict[str, Any] = {}

    def put(self, name: str, data: Any) -> None:
        self.tray[name] = data

    def get(self, name: str) -> Any:
        """What has this name; None if it was not given."""
        return self.given.get(name)

    def has(self, name: str) -> bool:
        return name in self.given

    def drop(self, name: str) -> None:
        """Nothing: whoever called keeps account."""

    def __reduce__(self) -> tuple[Any, ...]:
        return own_shelf, ()


_OWN = OwnShelf()


def own_shelf() -> OwnShelf:
    """The shelf of this process."""
    return _OWN


class Handed(NamedTuple):
    """What a call gave: `kind` is "part", "done" or "error", or nothing where there was nothing to do; and the names of
    what it has put on the shelf."""

    kind: str
    result: Any
    names: tuple[str, ...]


class _Items(NamedTuple):
    items: Generator[Any]
    given: dict[str, Any]


class Bench:
    """What a worker does. Each call hands back a `Handed`, and what was put on the shelf, by name.

    >>> bench = Bench(".")
    >>> bench.learn(abs)
    >>> bench.begin(7, 0, -3, {})
    (Handed(kind='done', result=3, names=()), {})
    """

    def __init__(self, folder: str) -> None:
        with suppress(OSError):  # so that relative paths mean what they mean to the driver, where it is the same disk
            os.chdir(folder)
        keep_freed_memory()
        self._functions: list[Callable[[Any], Any]] = []
        self._begun: dict[int, _Items] = {}

    def learn(self, *functions: Callable[[Any], Any]) -> None:
        """Functions that calls name by their place among all that it was told."""
        self._functions += functions

    def begin(
        self, number: int, which: int, unit: Any, given: dict[str, Any], *, step: bool = True
    ) -> tuple[Handed, dict[str, Any]]:
        """Do a unit, or the first step of one that is a generator."""
        _OWN.given = given
        try:
            result = self._functions[which](unit)
        except BaseException as error:
            return self._answer("error", portable(error))
        if not isinstance(result, GeneratorType):
            return self._answer("done", result)
        self._begun[number] = _Items(result, given)
        return self.go_on(number) if step else self._answer("", None)

    def go_on(self, number: int) -> tuple[Handed, dict[str, Any]]:
        """The next step of a generator."""
        if number not in self._begun:
            return self._answer("", None)
        items, _OWN.given = self._begun[number]
        try:
            return self._answer("part", next(items))
        except StopIteration as end:
            kind, result = "done", end.value
        except BaseException as error:
            kind, result = "error", portable(error)
        del self._begun[number]
        return self._answer(kind, result)

    def give_up(self, number: int) -> tuple[Handed, dict[str, Any]]:
        """End a generator where it is."""
        if number not in self._begun:
            return self._answer("", None)
        self._begun.pop(number).items.close()
        return self._answer("done", None)

    def _answer(self, kind: str, result: Any) -> tuple[Handed, dict[str, Any]]:
        tray, _OWN.tray, _OWN.given = _OWN.tray, {}, {}
        return Handed(kind, result, tuple(tray)), tray
