"""Outcomes on their way to the reader: as they come, or each in its turn."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

from millstream.aio.outcomes import Outcome, Returned


class Kept(NamedTuple):
    outcome: Any
    at: float
    bytes: int


class Outbox:
    """Outcomes that are not handed out yet, and how many bytes `weigh` says that they hold.

    >>> box = Outbox(in_order=True, weigh=None)
    >>> box.put(Returned(1, "second", 0.5, 1), now=1.0)
    >>> box.done, box.early
    (deque([]), True)
    >>> box.put(Returned(0, "first", 2.0, 1), now=2.0)
    >>> box.take().outcome.value, box.take().outcome.value
    ('first', 'second')
    """

    def __init__(self, *, in_order: bool, weigh: Callable[[Any], int] | None) -> None:
        self.done: deque[Kept] = deque()  # to be handed out
        self.handed = 0
        self.bytes = 0
        self.ready = asyncio.Event()  # something for the reader
        self._in_order, self._weigh = in_order, weigh
        self._early: dict[int, Kept] = {}  # of an ordered flow: not yet their turn
        self._turn = 0  # index of the next outcome to hand out

    @property
    def early(self) -> bool:
        """Whether some wait for their turn."""
        return bool(self._early)

    def put(self, outcome: Outcome[Any], now: float) -> None:
        size = self._weigh(outcome.value) if self._weigh and isinstance(outcome, Returned) else 0
        self.bytes += size
        ended = Kept(outcome, now, size)
        if not self._in_order:
            self.done.append(ended)
        else:
            self._early[outcome.index] = ended
            while (ready := self._early.pop(self._turn, None)) is not None:
                self.done.append(ready)
                self._turn += 1
        if self.done:
            self.ready.set()

    def take(self) -> Kept:
        """The next one; there is one."""
        ended = self.done.popleft()
        self.handed += 1
        self.bytes -= ended.bytes
        return ended
