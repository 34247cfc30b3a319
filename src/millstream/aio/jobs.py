"""A request on its way through a flow: how far it has come, where its time went, and the fault it may end in."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from millstream.aio.outcomes import Fault

T = TypeVar("T")


@dataclass(slots=True)
class Spent:
    """Where the time of all requests went, in seconds, and what was tried.

    queue    from admission to the first attempt: for a rate limit
    backoff  between two attempts, until the next was due
    budget   due, but held back by the retry budget
    slot     due, but no place in flight or no rate was free
    server   attempts in flight
    stall    done, but not handed out: for its turn, or for the reader
    hedges   second attempts at slow requests; `hedges_won` those that were quicker
    wasted   attempts whose end nobody took: they failed, or lost to a hedge
    """

    queue: float = 0.0
    backoff: float = 0.0
    budget: float = 0.0
    slot: float = 0.0
    server: float = 0.0
    stall: float = 0.0
    attempts: int = 0
    retries: int = 0
    hedges: int = 0
    hedges_won: int = 0
    wasted: int = 0


class Job(Generic[T]):
    """A request on its way: its number, what to call the function with, and how far it has come (times in seconds).

    `attempts` are those that were begun. `counted`, `alone` and `alone_since` are for whoever decides on the next (a
    `Delay`), to keep in what it needs. `before` is when the attempt before this one failed, or when the first began.
    """

    __slots__ = (
        *(
            "alarm",
            "alone",
            "alone_since",
            "attempts",
            "before",
            "began",
            "counted",
            "due",
            "held_back",
            "index",
            "item",
            "last",
        ),
        *("scarcity", "settled", "since", "tasks", "tokens", "until"),
    )

    def __init__(self, index: int, item: T, began: float, until: float | None) -> None:
        self.index, self.item, self.began, self.until = index, item, began, until
        self.since = self.due = began  # when it began to wait or to be attempted; when the next attempt may begin
        self.before = self.alone_since = began
        self.attempts = self.counted = self.alone = 0
        self.tokens = 0  # of the retry budget, taken by its retries
        self.held_back = self.scarcity = 0.0  # by the retry budget; how long that held back any, when it began to wait
        self.last: Exception | None = None  # what its last attempt failed with
        self.settled = False
        self.tasks: list[asyncio.Task[Any]] = []
        self.alarm: asyncio.TimerHandle | None = None  # for a hedge while it runs, for its deadline while it waits

    def forget_alarm(self) -> None:
        if self.alarm is not None:
            self.alarm.cancel()
            self.alarm = None


Delay: TypeAlias = Callable[[Exception, Job[Any]], float | None]
"""(what an attempt raised, its request) -> seconds to wait before the next one, or None to give up.

Infinite: not before another request has succeeded that began later.
"""


def never(error: Exception, job: Job[Any]) -> None:
    """The `Delay` of calls that are not repeated."""


class Stretches:
    """How much of the time something lasted that comes and goes.

    >>> rain = Stretches()
    >>> rain.begin(10.0)
    >>> rain.until(12.0)
    2.0
    >>> rain.end(15.0)
    >>> rain.until(100.0)
    5.0
    """

    __slots__ = ("_before", "_since")

    def __init__(self) -> None:
        self._before, self._since = 0.0, -1.0  # seconds that are over; the beginning of what lasts, below 0: nothing

    def begin(self, now: float) -> None:
        if self._since < 0:
            self._since = now

    def end(self, now: float) -> None:
        if self._since >= 0:
            self._before, self._since = self.until(now), -1.0

    def until(self, now: float) -> float:
        return self._before + (now - self._since if self._since >= 0 else 0.0)


class Attempt(NamedTuple, Generic[T]):
    job: Job[T]
    began: float
    ticket: int
    permit: Any
    is_hedge: bool


def fault_of(job: Job[Any], error: Exception, seconds: float, *, late: bool, held: bool = False) -> Fault:
    """What a request has come to that failed; `late`: its deadline came."""
    kind = getattr(error, "kind", None)
    if isinstance(error, TimeoutError) and (late or not kind):
        return Fault(job.index, "timeout", _no_answer(job, seconds), seconds, job.attempts, error)
    kind, message = kind if isinstance(kind, str) else "error", _words(error)
    return Fault(job.index, kind, message, seconds, job.attempts, error, held=held)


def _no_answer(job: Job[Any], seconds: float) -> str:
    took = f"{seconds:.2g}" if seconds < 10 else f"{seconds:.0f}"
    message = f"no answer within {took} s in {job.attempts} attempt{'' if job.attempts == 1 else 's'}"
    if job.last is not None and not isinstance(job.last, TimeoutError):
        message += f"; last: {getattr(job.last, 'brief', None) or _words(job.last)}"
    if job.held_back >= 0.05:
        message += f"; held back {job.held_back:.1f} s by the retry budget"
    return message


def _words(error: Exception) -> str:
    name = type(error).__name__
    try:
        return f"{name}: {error}"
    except Exception:  # of its `__str__`, which is no better than the rest of it
        return name
