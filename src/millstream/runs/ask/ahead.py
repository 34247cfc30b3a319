"""Asking ahead of whoever takes the outcomes, in the order of the requests, each outcome in the journal first."""

import asyncio
import threading
import warnings
from collections import deque
from collections.abc import AsyncIterator, Generator
from contextlib import closing
from typing import Generic, TypeVar

import msgspec

from millstream.aio import Fault, Flow, Returned
from millstream.bridge import Alongside
from millstream.client.client import Client
from millstream.client.requests import Reply, Request, sentence
from millstream.client.tripwire import Tripwire
from millstream.errors import RunError
from millstream.llm.wire import Answer
from millstream.runs.ask.answers import AnswerJournal, is_fault
from millstream.runs.ask.rows import outcome_in, row_of, row_of_none

T = TypeVar("T")
Asked = tuple[Request, T]

_CANARIES = 2
_NOT_ASKED = {"stopped", "cancelled"}
_PATIENCE = 1.0  # seconds that a source has to come to its end, when nobody wants more of it
_encode = msgspec.json.encode


def asked_ahead(
    asked: Generator[Asked[T]], client: Client, journal: AnswerJournal, *, window: int
) -> Generator[tuple[Request, T, Reply | Fault]]:
    """The outcome of each request, beside what came with it.

    `asked` is read in a thread, at most `window` ahead. What the journal has is not asked, and equal keys are asked
    once. Outcomes are made of the journal's rows, so that one that is found again is the same. Raises RunError when
    going on makes no sense; what is not answered then has no outcome. After the end, or `close`, nothing of it runs;
    but for a source that waits for somebody, whose thread ends with its wait.
    """
    line: _Line[T] = _Line(asked, client, journal, window)
    beside = Alongside(line.main(), line.fail)
    reader = threading.Thread(target=line.read, args=(beside,), name="millstream-source", daemon=True)
    reader.start()
    try:
        while (place := line.next()) is not None:
            assert place.row is not None
            outcome = outcome_in(place.row, place.request.index)
            yield place.request, place.beside, outcome if isinstance(outcome, Fault) else client.with_value(outcome)
    finally:
        line.close()
        beside.close()
        if reader is not threading.current_thread():
            reader.join(_PATIENCE)


class _Place(Generic[T]):
    """A request's place in line; `row` is None until its outcome is known."""

    __slots__ = ("beside", "request", "row")

    def __init__(self, request: Request, beside: T) -> None:
        self.request, self.beside = request, beside
        self.row: bytes | None = None


class _Line(Generic[T]):
    """Requests in line for their outcomes. All of it happens in the loop, but for `next`.

    A fault that may turn out to be everybody's is held until that is known. A request that the servers alone are to
    blame for is asked again, as long as there is anything else to ask: so when the line is full, the flow is told that
    nothing more comes, and another one goes on if it did not stop.
    """

    def __init__(self, asked: Generator[Asked[T]], client: Client, journal: AnswerJournal, window: int) -> None:
        self._asked, self._client, self._journal, self._window = asked, client, journal, window
        self._changed = threading.Condition()
        self._read: deque[Asked[T]] = deque()
        self._line: deque[_Place[T]] = deque()
        self._ahead = 0  # read and not handed out
        self._all_read = self._closed = self._over = False
        self._source_failure: BaseException | None = None
        self._failure: BaseException | None = None
        self._wake = asyncio.Event()
        self._waiting: dict[bytes, list[_Place[T]]] = {}  # by key
        self._sent: dict[int, Request] = {}  # by the number that the flow gives them
        self._held: list[Fault] = []
        self._tripwire = self._new_tripwire(answered=False)
        self._any_on_hold = self._told_to_wait = False
        self._not_asked: Fault | None = None

    def _new_tripwire(self, *, answered: bool) -> Tripwire:
        tripwire = Tripwire(lambda: self._flow.stop())
        tripwire.answered = answered
        return tripwire

    # The source's thread --------------------------------------------------------------------------------------------

    def read(self, beside: Alongside) -> None:
        """Read one after the other, each when there is room for it."""
        try:
            with closing(self._asked):
                while self._wait_for_room(beside) and (found := next(self._asked, None)) is not None:
                    with self._changed:
                        self._ahead += 1
                    self._read.append(found)
                    beside.call(self._wake.set)
        except BaseException as error:  # whoever takes the outcomes is told, in its turn
            self._source_failure = error
        self._all_read = True
        beside.call(self._wake.set)

    def _wait_for_room(self, beside: Alongside) -> bool:
        """False when nobody wants more."""
        if self._full:
            beside.call(self._wake.set)
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self._full)
        return not self._closed

    @property
    def _full(self) -> bool:
        return self._ahead >= self._window

    # Whoever takes the outcomes -------------------------------------------------------------------------------------

    def next(self) -> _Place[T] | None:
        """The next that has its outcome; None after the last. Raises what has ended it."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_next_known or self._over)
            if self._is_next_known:
                self._ahead -= 1
                self._changed.notify_all()
                return self._line.popleft()
        if self._failure is not None:
            raise self._failure
        return None

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @property
    def _is_next_known(self) -> bool:
        return bool(self._line) and self._line[0].row is not None

    def _put(self, place: _Place[T], row: bytes) -> None:
        place.row = row
        with self._changed:
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        self._end(error)

    def _end(self, failure: BaseException | None = None) -> None:
        with self._changed:
            self._over, self._failure = True, failure
            self._changed.notify_all()

    # Asking ---------------------------------------------------------------------------------------------------------

    async def main(self) -> None:
        async with self._client:
            canaries = _CANARIES
            while not (self._all_taken or self._tripwire.reason or self._not_asked):
                await self._ask(canaries)
                canaries = 0
        if self._tripwire.reason:
            raise RunError(f"{self._tripwire.reason}. {self._kept}")
        if self._not_asked:
            raise RunError(f"{sentence(self._not_asked)} {self._kept}")
        self._end(self._source_failure)

    @property
    def _kept(self) -> str:
        return f"What was answered is in {self._journal.path}, and is not asked again"

    @property
    def _all_taken(self) -> bool:
        return self._all_read and not self._read

    async def _ask(self, canaries: int) -> None:
        # A tripwire of its own, as both speak of requests by their number in the flow.
        self._tripwire = self._new_tripwire(answered=self._tripwire.answered)
        self._sent, self._count, self._any_on_hold = {}, 0, False
        self._flow: Flow[Request, Answer] = self._client.flow(
            self._requests(),
            window=self._window,
            canaries=canaries,
            batched=True,
            delay=self._client.holding(self._hold, self._told).delay,
            watch=self._tripwire.seen,
        )
        async with self._flow:
            async for outcome in self._flow:
                self._take(outcome)
            self._settle_held(ended=True)

    async def _requests(self) -> AsyncIterator[list[Request]]:
        """Those that have no outcome yet, in lists of what was read meanwhile."""
        while True:
            self._wake.clear()
            if self._read:
                yield self._stand_in_line([self._read.popleft() for _ in range(len(self._read))])
                continue
            if self._all_taken:
                self._settle_held()
                return
            if self._full:
                self._settle_held()
                if self._any_on_hold:
                    return
            await self._wake.wait()

    def _stand_in_line(self, asked: list[Asked[T]]) -> list[Request]:
        """Those that are to be asked."""
        places = [_Place(*each) for each in asked]
        earlier = self._journal.find_many([place.request.key for place in places]).tolist()
        unknown = [place.request for place, at in zip(places, earlier, strict=True) if self._is_unknown(place, at)]
        for request in unknown:
            self._sent[self._count] = request
            self._count += 1
        return unknown

    def _is_unknown(self, place: _Place[T], at: int) -> bool:
        """Whether it is to be asked; `at` is where the journal has its outcome, or -1."""
        request, row = place.request, None
        if request.fault:
            row = _encode(row_of_none(request))
        elif at >= 0:
            row = self._journal.row(at, request.id, request.index)
            self._tripwire.answered |= not is_fault(at)
        self._line.append(place)
        if row is not None:
            self._put(place, row)
            return False
        alike = self._waiting.setdefault(request.key, [])
        alike.append(place)
        return len(alike) == 1

    def _hold(self, error: Exception) -> None:
        self._any_on_hold = True
        self._tripwire.held(error, asyncio.get_running_loop().time())
        self._wake.set()

    def _told(self, error: Exception) -> None:
        if not self._told_to_wait:
            self._told_to_wait = True
            warnings.warn(f"{error}. What it says so of waits; the others are asked meanwhile", stacklevel=2)

    # Outcomes -------------------------------------------------------------------------------------------------------

    def _take(self, outcome: Returned[Answer] | Fault) -> None:
        if isinstance(outcome, Fault) and outcome.kind in _NOT_ASKED:
            self._not_asked = self._not_asked or outcome
            return
        if isinstance(outcome, Fault) and self._tripwire.doubts(outcome):
            self._held.append(outcome)
        else:
            self._settle(outcome)
        self._settle_held()

    def _settle_held(self, *, ended: bool = False) -> None:
        """Of the faults that were in doubt those that are no more; all, if nothing else is there to tell."""
        if not self._held or self._tripwire.reason or self._closed:
            return
        no_other = ended or ((self._full or self._all_taken) and len(self._held) == len(self._waiting))
        held, self._held = self._held, []
        for fault in held:
            if no_other or not self._tripwire.doubts(fault):
                self._settle(fault)
            else:
                self._held.append(fault)

    def _settle(self, outcome: Returned[Answer] | Fault) -> None:
        request = self._sent.pop(outcome.index)
        row = _encode(row_of(request, outcome))
        self._journal.append(request.key, row, find=True)
        for place in self._waiting.pop(request.key):
            self._put(place, row)
