"""Where work is done: an engine takes units, in any number, and gives back what is done, in any order.

A new engine is one file and one line in `ENGINES`. It does not know what it runs, which is deterministic, so that
a unit may be done twice.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any, Protocol


class Done:
    """What became of a unit: its `result`, or the `error` that was raised."""

    __slots__ = ("error", "number", "result")

    def __init__(self, number: int, result: Any = None, error: BaseException | None = None) -> None:
        self.number, self.result, self.error = number, result, error


class Engine(Protocol):
    """`submit` units as long as there is `room`, and take what is `done`; nothing of it is alive after `close`."""

    slots: int
    """Units that can be worked on at once."""

    @property
    def room(self) -> bool:
        """Whether another unit would find something to do soon."""
        ...

    def submit(self, number: int, function: Callable[[Any], Any], unit: Any) -> None:
        """Have `function(unit)` done; both must be picklable. `number` names it."""
        ...

    def done(self) -> Iterator[Done]:
        """What has become of units since; waits for one, and ends at once if there are none. Raises WorkerDied."""
        ...

    def close(self) -> None: ...


ENGINES = {"local": "millstream.engines.local:Local"}
"""Engines by name, as module:class."""


def engine(name: str) -> Callable[..., Engine]:
    """The class of an engine.

    >>> engine("local").__name__
    'Local'
    """
    module, _, made = ENGINES[name].partition(":")
    found: Callable[..., Engine] = getattr(import_module(module), made)
    return found
