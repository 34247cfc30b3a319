"""Units on their way through an engine, and who takes what becomes of each."""

import itertools
from collections.abc import Callable
from typing import Any

from millstream.engines import Done, Engine
from millstream.runs.pack.run import Tally

Taker = Callable[[Done], None]


class Traffic:
    """`submit` units to the `pool`; `wait` has those who wait for them take what is done. `tally` is told of waits."""

    def __init__(self, pool: Engine, tally: Tally) -> None:
        self._pool, self.tally = pool, tally
        self._numbers = itertools.count()
        self._takers: dict[int, Taker] = {}
        self.more, self.give_up, self.close = pool.more, pool.give_up, pool.close

    def __len__(self) -> int:
        """Units that are not done."""
        return len(self._takers)

    @property
    def slots(self) -> int:
        return self._pool.slots

    @property
    def room(self) -> bool:
        return self._pool.room

    def submit(self, taker: Taker, function: Callable[[Any], Any], unit: Any, **how: Any) -> int:
        """Have a unit done, as `Engine.submit`; its number."""
        number = next(self._numbers)
        self._takers[number] = taker
        self._pool.submit(number, function, unit, **how)
        return number

    def hand_over(self, number: int, taker: Taker) -> None:
        """Somebody else takes what still becomes of a unit."""
        self._takers[number] = taker

    def wait(self) -> None:
        """Wait until something is done, and have it taken."""
        with self.tally.time("wait"):
            found = list(self._pool.done())
        for done in found:
            (self._takers.pop if done.last else self._takers.__getitem__)(done.number)(done)
