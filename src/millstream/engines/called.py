"""A worker that does calls one after the other, and leaves what it puts on its shelf to whoever called."""

import os
import resource
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

from millstream.engines.lean import keep_freed_memory
from millstream.engines.steps import Stepped, Steps


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


class Consumed(NamedTuple):
    """What a process has taken by now: at most so many bytes of memory at once, and seconds of CPU time."""

    memory: int = 0
    cpu: float = 0.0


class Handed(NamedTuple):
    """What a call gave: `kind` is "part", "done" or "error", or nothing where there was nothing to do; the names of
    what it has put on the shelf; and what the worker has taken."""

    kind: str
    result: Any
    names: tuple[str, ...]
    taken: Consumed | None = None


class CalledWorker:
    """What a worker does. Each call hands back a `Handed`, and what was put on the shelf, by name.

    >>> worker = CalledWorker(".")
    >>> worker.learn(abs)
    >>> handed, shelf = worker.begin(7, 0, -3, {})
    >>> handed.kind, handed.result, handed.names, shelf
    ('done', 3, (), {})
    >>> handed.taken.memory > 1 << 20, handed.taken.cpu > 0
    (True, True)
    """

    def __init__(self, folder: str) -> None:
        with suppress(OSError):  # so that relative paths mean what they mean to the driver, where it is the same disk
            os.chdir(folder)
        keep_freed_memory()
        self._steps = Steps()
        self._given: dict[int, dict[str, Any]] = {}  # to generators that were begun

    def learn(self, *functions: Callable[[Any], Any]) -> None:
        """Functions that calls name by their place among all that it was told."""
        self._steps.learn(*functions)

    def begin(
        self, number: int, which: int, unit: Any, given: dict[str, Any], *, step: bool = True
    ) -> tuple[Handed, dict[str, Any]]:
        """Do a unit, or the first step of one that is a generator."""
        _OWN.given = given
        done = self._steps.begin(number, which, unit)
        if done.kind:
            return self._answer(done)
        self._given[number] = given
        return self.go_on(number) if step else self._answer(done)

    def go_on(self, number: int) -> tuple[Handed, dict[str, Any]]:
        """The next step of a generator."""
        _OWN.given = self._given.get(number, {})
        done = self._steps.go_on(number)
        if done.kind != "part":
            self._given.pop(number, None)
        return self._answer(done)

    def give_up(self, number: int) -> tuple[Handed, dict[str, Any]]:
        """End a generator where it is."""
        self._given.pop(number, None)
        return self._answer(self._steps.give_up(number))

    def _answer(self, step: Stepped) -> tuple[Handed, dict[str, Any]]:
        tray, _OWN.tray, _OWN.given = _OWN.tray, {}, {}
        return Handed(*step, tuple(tray), _taken()), tray


def _taken() -> Consumed:
    used = resource.getrusage(resource.RUSAGE_SELF)
    unit = 1 if sys.platform == "darwin" else 1024
    return Consumed(used.ru_maxrss * unit, used.ru_utime + used.ru_stime)
