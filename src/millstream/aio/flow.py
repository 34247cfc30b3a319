"""Many calls of an async function at once: a bounded number in flight, exactly one outcome each.

`gather` returns the outcomes in source order, `as_completed` and `ordered` hand them out as a block that leaves nothing
alive behind it, and `race` returns the first that succeeds. None of them knows what it awaits.

Two limits, and they are not the same: `in_flight` bounds the attempts that run; `window` bounds the requests that are
admitted and not yet handed out, whatever they wait for (their turn, a retry, a slow reader). So one slow request at the
head of an ordered stream stalls nothing until the window is full.
"""

import asyncio
import heapq
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Callable,
    Generator,
    Iterable,
    Iterator,
)
from typing import Any, Generic, TypeVar

from millstream.aio.outcomes import Fault, Outcome, Reply

T = TypeVar("T")
R = TypeVar("R")
Function = Callable[[T], Awaitable[R]]
Items = Iterable[T] | AsyncIterable[T]
Delay = Callable[[Exception, int], float | None]
"""(what an attempt raised, attempts so far) -> seconds to wait before the next one, or None to give up."""


def never(error: Exception, attempts: int) -> None:
    """The `Delay` of calls that are not repeated."""


def default_window(in_flight: int) -> int:
    """Requests admitted and not handed out: enough that a slow head stalls nothing soon, in bounded memory."""
    return max(4 * in_flight, 256)


class Flow(AsyncIterator[Outcome[R]], Generic[T, R]):
    """The outcomes of `function` over `items`, as an async iterator inside ``async with``.

    Source items are pulled one at a time, each when there is room for it. `timeout` bounds one attempt, `deadline` a
    request over all attempts and waits, in seconds (None: no bound); running out of either is a `Fault`, never an
    exception. After the block no task of this flow is alive, however it was left, and the source is closed.

    An exception of the *source* is raised to the reader, after the outcomes of what was admitted before it.
    """

    def __init__(
        self,
        function: Function[T, R],
        items: Items[T],
        *,
        in_flight: int = 64,
        window: int | None = None,
        in_order: bool = False,
        timeout: float | None = None,
        deadline: float | None = None,
        delay: Delay = never,
    ) -> None:
        if in_flight < 1:
            raise ValueError(f"in_flight must be at least 1, not {in_flight}")
        self._function, self._items = function, items
        self._in_flight, self._in_order = in_flight, in_order
        self._window = max(in_flight, default_window(in_flight) if window is None else window)
        self._timeout, self._deadline, self._delay = timeout, deadline, delay
        self._source: Iterator[T] | AsyncIterator[T] | None = None
        self._pulling: asyncio.Task[T] | None = None
        self._pump: asyncio.Task[None] | None = None
        self._running: dict[asyncio.Task[R], _Job[T]] = {}
        self._waiting: list[tuple[float, int, _Job[T]]] = []  # a heap of retries by the time they are due
        self._done: deque[Outcome[R]] = deque()  # to be handed out
        self._early: dict[int, Outcome[R]] = {}  # of an ordered flow: not yet their turn
        self._next = 0  # index of the next item to admit
        self._turn = 0  # of an ordered flow: index of the next outcome to hand out
        self._handed = 0
        self._exhausted = False
        self._failure: BaseException | None = None
        self._changed = asyncio.Event()  # something for the pump
        self._ready = asyncio.Event()  # something for the reader

    # The reader's side ----------------------------------------------------------------------------------------------

    async def __aenter__(self) -> "Flow[T, R]":
        items = self._items
        self._source = aiter(items) if isinstance(items, AsyncIterable) else iter(items)
        self._pump = asyncio.create_task(self._work())
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [task for task in (self._pump, self._pulling, *self._running) if task]
        for task in tasks:
            task.cancel()
        cancelled: asyncio.CancelledError | None = None
        while pending := [task for task in tasks if not task.done()]:
            try:
                await asyncio.wait(pending)
            except asyncio.CancelledError as error:
                cancelled = error  # whoever is cancelled while closing still leaves nothing behind
        if isinstance(self._source, AsyncGenerator):
            await self._source.aclose()
        elif isinstance(self._source, Generator):
            self._source.close()
        if cancelled:
            raise cancelled

    def __aiter__(self) -> "Flow[T, R]":
        return self

    async def __anext__(self) -> Outcome[R]:
        while not self._done:
            if self._exhausted and self._handed == self._next:
                if self._failure:
                    failure, self._failure = self._failure, None
                    raise failure
                raise StopAsyncIteration
            self._ready.clear()
            await self._ready.wait()
        self._handed += 1
        self._changed.set()  # there is room in the window
        return self._done.popleft()

    # The working side -----------------------------------------------------------------------------------------------

    async def _work(self) -> None:
        """Start what may be started; sleep until something ends, is handed out, comes in or is due again."""
        loop = asyncio.get_running_loop()
        while not (self._exhausted and not self._running and not self._waiting):
            self._changed.clear()
            while len(self._running) < self._in_flight:
                job = self._due(loop.time()) or self._admit(loop.time())
                if job is None:
                    break
                self._start(job)
            if self._waiting and len(self._running) < self._in_flight:
                alarm = loop.call_at(self._waiting[0][0], self._changed.set)
                await self._changed.wait()
                alarm.cancel()
            else:
                await self._changed.wait()
        self._ready.set()

    def _due(self, now: float) -> "_Job[T] | None":
        return heapq.heappop(self._waiting)[2] if self._waiting and self._waiting[0][0] <= now else None

    def _admit(self, now: float) -> "_Job[T] | None":
        """The next item as a job; None if there is no room, or none yet."""
        if self._exhausted or self._next - self._handed >= self._window:
            return None
        try:
            if isinstance(self._source, AsyncIterator):
                if self._pulling is None:
                    self._pulling = asyncio.ensure_future(_pull(self._source))
                    self._pulling.add_done_callback(lambda _: self._changed.set())
                if not self._pulling.done():
                    return None
                pulled, self._pulling = self._pulling, None
                item = pulled.result()
            else:
                assert self._source is not None
                item = next(self._source)
        except (StopIteration, _End):
            self._end(None)
            return None
        except Exception as error:
            self._end(error)
            return None
        self._next += 1
        return _Job(self._next - 1, item, now)

    def _end(self, failure: BaseException | None) -> None:
        self._exhausted, self._failure = True, failure
        self._changed.set()
        self._ready.set()

    def _start(self, job: "_Job[T]") -> None:
        job.attempts += 1
        task = asyncio.ensure_future(self._attempt(job))
        self._running[task] = job
        task.add_done_callback(self._ended)

    async def _attempt(self, job: "_Job[T]") -> R:
        loop = asyncio.get_running_loop()
        limits = [loop.time() + self._timeout] if self._timeout is not None else []
        if self._deadline is not None:
            limits.append(job.began + self._deadline)
        async with asyncio.timeout_at(min(limits, default=None)):
            return await self._function(job.item)

    def _ended(self, task: "asyncio.Task[R]") -> None:
        job = self._running.pop(task)
        self._changed.set()
        now = asyncio.get_running_loop().time()
        seconds = now - job.began
        if task.cancelled():
            self._deliver(Fault(job.index, "cancelled", "the call was cancelled", seconds, job.attempts))
            return
        error = task.exception()
        if error is None:
            self._deliver(Reply(job.index, task.result(), seconds, job.attempts))
            return
        if not isinstance(error, Exception):
            self._end(error)  # KeyboardInterrupt and the like are nobody's fault
            return
        late = self._deadline is not None and now >= job.began + self._deadline
        wait = None if late else self._delay(error, job.attempts)
        if wait is not None and (self._deadline is None or now + wait < job.began + self._deadline):
            heapq.heappush(self._waiting, (now + wait, job.index, job))
            return
        self._deliver(_fault(job, error, seconds, late))

    def _deliver(self, outcome: Outcome[R]) -> None:
        if not self._in_order:
            self._done.append(outcome)
        else:
            self._early[outcome.index] = outcome
            while self._turn in self._early:
                self._done.append(self._early.pop(self._turn))
                self._turn += 1
        if self._done:
            self._ready.set()


class _Job(Generic[T]):
    """A request on its way: its number, what to call the function with, when it was admitted, attempts so far."""

    __slots__ = ("attempts", "began", "index", "item")

    def __init__(self, index: int, item: T, began: float) -> None:
        self.index, self.item, self.began, self.attempts = index, item, began, 0


class _End(Exception):
    """StopAsyncIteration cannot be the result of a task."""


async def _pull(source: AsyncIterator[T]) -> T:
    try:
        return await anext(source)
    except StopAsyncIteration:
        raise _End from None


def _fault(job: _Job[Any], error: Exception, seconds: float, late: bool) -> Fault:
    if isinstance(error, TimeoutError) and (late or not getattr(error, "kind", None)):
        kind = "timeout"
        message = f"no answer within {seconds:.3g} s, in {job.attempts} attempt{'s' if job.attempts > 1 else ''}"
    else:
        kind, message = getattr(error, "kind", "error"), f"{type(error).__name__}: {error}"
    return Fault(job.index, kind, message, seconds, job.attempts, error)


def as_completed(function: Function[T, R], items: Items[T], **options: Any) -> Flow[T, R]:
    """Outcomes as they finish: ``async with as_completed(f, items) as outcomes: async for outcome in outcomes``.

    `options` are those of `Flow`.
    """
    return Flow(function, items, in_order=False, **options)


def ordered(function: Function[T, R], items: Items[T], **options: Any) -> Flow[T, R]:
    """Outcomes in source order, each as soon as its turn has come; `options` are those of `Flow`."""
    return Flow(function, items, in_order=True, **options)


async def gather(function: Function[T, R], items: Items[T], **options: Any) -> list[Outcome[R]]:
    """All outcomes in source order.

    >>> async def double(number):
    ...     return 2 * number
    >>> [reply.value for reply in asyncio.run(gather(double, [1, 2, 3]))]
    [2, 4, 6]
    """
    async with ordered(function, items, **options) as outcomes:
        return [outcome async for outcome in outcomes]


async def race(function: Function[T, R], items: Iterable[T], **options: Any) -> Outcome[R]:
    """The first *success* over all items at once; the losers are cancelled and awaited before it is returned.

    A fast failure does not win. If all fail: one Fault of kind ``race`` with all of theirs in `faults`.
    """
    contenders = list(items)
    if not contenders:
        raise ValueError("a race needs somebody to run it")
    faults: list[Fault] = []
    async with as_completed(function, contenders, **{"in_flight": len(contenders), **options}) as outcomes:
        async for outcome in outcomes:
            if isinstance(outcome, Reply):
                return outcome
            faults.append(outcome)
    last = faults[-1]
    message = f"all {len(faults)} failed, the last with {last.message}"
    return Fault(last.index, "race", message, last.seconds, last.attempts, last.error, tuple(faults))
