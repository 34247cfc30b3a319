"""Whose turn it is to be attempted: what waits at the gate, what has to begin again, retries, and new requests."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from millstream.aio.jobs import Job
from millstream.aio.outbox import Outbox
from millstream.aio.places import Places, default_window
from millstream.aio.retries import Retries
from millstream.aio.supply import Supply

T = TypeVar("T")


@dataclass
class Bounds:
    """What keeps new requests out: a `window` of those that are under way, and the bytes that wait to be handed out.

    Of `canaries` no more are let in until one has succeeded or `head_start` seconds went well. `deadline`: seconds that
    each has, all in all.
    """

    window: int | None
    window_bytes: int | None
    deadline: float | None
    canaries: int
    head_start: float


class Turns(Generic[T]):
    """Requests that wait to be attempted. `waits_for` says in a few words what keeps more from starting."""

    def __init__(self, source: Supply[T], outbox: Outbox, places: Places, retries: Retries[T], bounds: Bounds) -> None:
        self.waits_for = "nothing"
        self.admitted = 0
        self.head: Job[T] | None = None  # it is its turn, but the gate is not open yet
        self.again: deque[Job[T]] = deque()  # whose attempt could not begin
        self.canaries = bounds.canaries
        self._source, self._outbox, self._limit, self._retries = source, outbox, places.limit, retries
        self._bounds = bounds

    def begin(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._others_from = clock() + self._bounds.head_start  # when the canaries' head start ends

    @property
    def all_handed(self) -> bool:
        return self._outbox.handed == self.admitted

    def next(self, *, went_well: bool) -> tuple[Job[T] | None, float | None]:
        """The next to be attempted, or when to look again; `went_well`: no attempt was in vain so far."""
        now = self._clock()
        if self.head is not None:
            return self.head, None
        while self.again:
            if not (again := self.again.popleft()).settled:
                return again, None
        job, wake, scarce = self._retries.next(now)
        if job is not None:
            return job, None
        if now >= self._others_from and went_well:
            self.canaries = 0  # slow is not wrong
        if self.canaries and now < self._others_from:
            wake = self._others_from if wake is None else min(wake, self._others_from)
        new = self._admit()
        if new is None and scarce:
            self.waits_for = "the retry budget"
        return new, wake

    def _admit(self) -> Job[T] | None:
        """The next item as a job; None if there is no room, or none yet."""
        source, bounds = self._source, self._bounds
        if source.over:
            self.waits_for = "the last ones"
            return None
        under_way = self.admitted - self._outbox.handed
        window = default_window(self._limit.now) if bounds.window is None else bounds.window
        full = under_way >= max(window, self._limit.now)
        if full or (bounds.window_bytes is not None and self._outbox.bytes >= bounds.window_bytes):
            self.waits_for = (
                "the reader" if self._outbox.done else "the first in order" if self._outbox.early else "retries"
            )
            return None
        if self.canaries and under_way >= self.canaries:  # whoever reads may want to stop
            self.waits_for = "the first reply"
            return None
        if not source.stock:
            self.pull()
        if not source.stock:
            return None
        self.admitted += 1
        now = self._clock()
        until = None if bounds.deadline is None else now + bounds.deadline
        return Job(self.admitted - 1, source.stock.popleft(), now, until)

    def pull(self) -> None:
        self._source.pull()
        if self._source.waiting:
            self.waits_for = "the source"

    @property
    def waiting(self) -> list[Job[T]]:
        """Admitted, but neither in flight nor settled."""
        found = dict.fromkeys([*([self.head] if self.head else []), *self.again, *self._retries])
        return [job for job in found if not job.settled]

    def clear(self) -> list[Job[T]]:
        """Nothing is to be attempted any more: what waited."""
        waiting, self.head = self.waiting, None
        self._source.stop()
        self._retries.clear()
        self.again.clear()
        return waiting

    @property
    def all_held(self) -> bool:
        """With nothing in flight: whether nothing else is due or can be admitted, whatever time brings."""
        if self.head is not None or self.again or self._outbox.done:
            return False
        # What is pulled may be kept out by a full window.
        return not self._source.waiting and self._retries.all_held
