"""Where work is done: an engine takes units, in any number, and gives back what is done, in any order.

A new engine is one file and one line in `ENGINES`. It does not know what it runs, which is deterministic, so that
a unit may be done twice.
"""

from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from typing import Any, Protocol


class Done:
    """What became of a unit: its `result`, or the `error` that was raised.

    Of a generator each item is one, in order and once, and none of them the `last`; that comes at its end.
    """

    __slots__ = ("error", "last", "number", "result")

    def __init__(
        self, number: int, result: Any = None, error: BaseException | None = None, *, last: bool = True
    ) -> None:
        self.number, self.result, self.error, self.last = number, result, error, last


class Engine(Protocol):
    """`submit` units as long as there is `room`, and take what is `done`; nothing of it is alive after `close`."""

    slots: int
    """Units that can be worked on at once."""

    @property
    def room(self) -> bool:
        """Whether another unit would find something to do soon."""
        ...

    def submit(
        self,
        number: int,
        function: Callable[[Any], Any],
        unit: Any,
        needs: Iterable[str] = (),
        *,
        urgent: bool = False,
        ahead: int | None = None,
    ) -> None:
        """Have `function(unit)` done; both must be picklable. `number` names it; `needs` are the pieces that it reads.

        It may be a generator, which answers several times: `ahead` times (None: as often as it likes), and again for
        each `more`. What is `urgent` is begun before what is not, whenever that came.
        """
        ...

    def more(self, number: int) -> None:
        """Let a generator give another answer."""
        ...

    def give_up(self, number: int) -> None:
        """Have a generator end where it is: it is done soon, with answers that were on their way before."""
        ...

    def done(self) -> Iterator[Done]:
        """What has become of units since; waits for one, and ends at once if there are none. Raises WorkerDied."""
        ...

    def close(self) -> None: ...


ENGINES = {"local": "millstream.engines.local:Local", "ray": "millstream.engines.ray:Ray"}
"""Engines by name, as module:class."""


def engine(name: str) -> Callable[..., Engine]:
    """The class of an engine.

    >>> engine("local").__name__
    'Local'
    """
    module, _, made = ENGINES[name].partition(":")
    found: Callable[..., Engine] = getattr(import_module(module), made)
    return found
