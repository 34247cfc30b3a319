"""Many calls of an async function at once: a bounded number in flight, exactly one outcome each.

A `Flow` has two limits, and they are not the same: `in_flight` bounds the attempts that run; `window` bounds the
requests that are admitted and not yet handed out, whatever they wait for (their turn, a retry, a slow reader). So one
slow request at the head of an ordered stream stalls nothing until the window is full.

There is no task that schedules: whatever changes something (an attempt that ends, a reader that takes, a timer) calls
`_pump`, which starts what may be started and says when it wants to be called again.
"""

import asyncio
import math
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Generic, TypeVar

from millstream.aio.hedging import Hedge
from millstream.aio.jobs import Attempt, Delay, Job, Spent, fault_of, never
from millstream.aio.limits import Limit
from millstream.aio.outbox import Outbox
from millstream.aio.outcomes import Fault, Outcome, Returned
from millstream.aio.places import Places
from millstream.aio.rates import Gate, RetryBudget
from millstream.aio.retries import Retries
from millstream.aio.supply import Items, Supply
from millstream.aio.turns import Bounds, Turns

T = TypeVar("T")
R = TypeVar("R")
Function = Callable[[T], Awaitable[R]]

_NO_PLACE = 0.5  # seconds until an attempt for which there was no place, with nobody else running, is made again
_LONG = 0.05  # seconds that starting attempts may keep the loop busy


class Flow(AsyncIterator[Outcome[R]], Generic[T, R]):
    """The outcomes of `function` over `items`, as an async iterator inside ``async with``.

    Supply items are pulled one at a time, each when there is room for it. `timeout` bounds one attempt, `deadline` a
    request over all attempts and waits, in seconds (None: no bound); running out of either is a `Fault`, never an
    exception. After the block no task of this flow is alive, however it was left, and the source is closed.

    `in_flight` is a number, a `Limit` that changes, or `Places` that several flows share. `gate` is asked before each
    attempt, in strict order. `budget` delays retries, `hedge` makes second attempts at slow requests. `canaries`
    requests go first: the others follow with the first reply, or after `head_start` seconds in which no attempt failed.
    `weigh` says how many bytes a reply holds; from `window_bytes` of replies that wait to be handed out, nothing more
    is admitted. A `batched` source is an async one of lists of items, pulled a list at a time.

    `delay` says how long to wait after a failure. A request whose wait is infinite, or above `longest_wait`, is held:
    the first until one succeeds that began later, the second for its time, both only while anything else is left to do.
    Then they end in faults that are marked `held`. `watch` is told every outcome at once, in the order of completion,
    with the times (s) when its last attempt began and ended.

    An attempt that could not begin because this machine has no more of what each takes (its error's `no_place` is true)
    is none: it is made again as soon as another one ends, and fewer run at once.

    An exception of the *source* is raised to the reader, after the outcomes of what was admitted before it.
    """

    def __init__(
        self,
        function: Function[T, R],
        items: Items[T],
        *,
        in_flight: int | Limit | Places = 64,
        window: int | None = None,
        window_bytes: int | None = None,
        weigh: Callable[[R], int] | None = None,
        in_order: bool = False,
        timeout: float | None = None,
        deadline: float | None = None,
        delay: Delay = never,
        gate: Gate | None = None,
        budget: RetryBudget | None = None,
        hedge: Hedge | None = None,
        canaries: int = 0,
        head_start: float = 5.0,
        longest_wait: float = math.inf,
        watch: Callable[[Outcome[R], float, float], None] | None = None,
        batched: bool = False,
    ) -> None:
        self._places = in_flight if isinstance(in_flight, Places) else Places(in_flight)
        self._limit = self._places.limit
        self._function, self._timeout, self._delay = function, timeout, delay
        self._gate, self._budget, self._hedge = gate, budget, hedge
        self.watch = watch
        self.spent = Spent()
        self._outbox = Outbox(in_order=in_order, weigh=weigh)
        self._source: Supply[T] = Supply(items, batched=batched, pulled=self._pump, ended=self._outbox.ready.set)
        self._retries: Retries[T] = Retries(budget, longest_wait)
        bounds = Bounds(window, window_bytes, deadline, canaries, head_start)
        self._turns = Turns(self._source, self._outbox, self._places, self._retries, bounds)
        self._running: dict[asyncio.Task[R], Attempt[T]] = {}
        self._slow: deque[tuple[Job[T], int]] = deque()  # to be hedged, and the attempts they had then
        self._stopped = self._closed = False
        self._broken: BaseException | None = None  # nobody's fault: to be raised at once
        self._alarm: asyncio.TimerHandle | None = None

    # The reader's side ----------------------------------------------------------------------------------------------

    async def __aenter__(self) -> "Flow[T, R]":
        self._loop = asyncio.get_running_loop()
        self._source.begin()
        self._turns.begin(self._loop.time)
        self._pump()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._closed = True
        self._set_alarm(None)
        self._places.forget(self._pump)
        pending: list[asyncio.Task[Any]] = [*self._running, *filter(None, [self._source.pulling])]
        for job in [*(attempt.job for attempt in self._running.values()), *self._turns.waiting]:
            job.forget_alarm()
        for task in pending:
            task.cancel()
        cancelled: asyncio.CancelledError | None = None
        while pending:
            try:
                await asyncio.wait(pending)
            except asyncio.CancelledError as error:
                cancelled = error  # whoever is cancelled while closing still leaves nothing behind
            # One that is done may still be among the running: then its place is not given back yet.
            pending = [task for task in pending if task in self._running or not task.done()]
        await self._source.close()
        if cancelled is not None:
            raise cancelled

    def __aiter__(self) -> "Flow[T, R]":
        return self

    async def __anext__(self) -> Outcome[R]:
        if not self._source.begun or self._closed:
            raise RuntimeError("outcomes are read inside their block: async with ... as outcomes")
        box, source = self._outbox, self._source
        while not box.done:
            if self._broken is not None:
                raise self._broken
            if source.over and self._turns.all_handed:
                if source.failure is not None:
                    failure, source.failure = source.failure, None
                    raise failure
                raise StopAsyncIteration
            box.ready.clear()
            await box.ready.wait()
        now = self._loop.time()
        ended = box.take()
        self.spent.stall += now - ended.at
        self._pump()  # there is room in the window
        outcome: Outcome[R] = ended.outcome
        return outcome

    @property
    def in_flight(self) -> int:
        """Attempts that run now."""
        return len(self._running)

    @property
    def waits_for(self) -> str:
        """What keeps it from starting more, in a few words."""
        return self._turns.waits_for

    def stop(self) -> None:
        """Start no more: attempts in flight still end and are handed out, all else is a Fault of kind ``stopped``."""
        self._stopped = True
        for job in self._turns.clear():
            self._turn_away(job, self._loop.time())
        self._outbox.ready.set()

    # Starting -------------------------------------------------------------------------------------------------------

    def _pump(self) -> None:
        """Start what may be started; be called again when something changes, or when time alone will change it."""
        if self._closed or self._broken is not None:
            return
        if self._alarm is not None and self._alarm.when() <= self._loop.time():
            return  # it rings within a turn of the loop, and until then a slow source lets others have theirs
        try:
            self._set_alarm(self._start_what_may())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a callback would only have it logged
            self._break(error)

    def _break(self, error: BaseException) -> None:
        """What no request is to blame for is told to the reader, who would wait forever if a callback kept it."""
        self._broken = error
        self._outbox.ready.set()

    def _start_what_may(self) -> float | None:
        """Returns when to look again, if nothing changes before."""
        turns, wake = self._turns, None
        began = now = self._loop.time()
        while not self._places.full(self._pump):
            if self._slow:
                self._hedge_it(*self._slow.popleft())
                continue
            job, wake = turns.next(went_well=not self.spent.wasted)
            now = self._loop.time()  # pulling an item took its time
            if job is None:
                if self._retries.any_held and not self._running:
                    turns.waits_for = "the servers"
                if not self._retries.any_held or self._running or not turns.all_held:
                    return wake
                self._give_up_held(now)
                continue
            turns.head = None
            if job.until is not None and now >= job.until:
                self._give_up(job, now)
                continue
            wait = self._gate.wait(job.item, now) if self._gate else 0.0
            if wait <= 0.0:
                self._start(job, now)
                if now - began > _LONG:
                    turns.waits_for = "the source"
                    return now  # the source is slow, and nothing of what it gave has begun yet
            elif wait == math.inf and not self._running:
                assert self._gate
                self._turn_away(job, now, f"not asked: {self._gate.name} is reached")  # nothing will ever open it
                self.stop()
            else:
                assert self._gate
                turns.head, turns.waits_for = job, self._gate.name
                self._mind_deadline(job)
                return now + wait if wait != math.inf else None
        self._retries.no_place(now)
        turns.waits_for = "places in flight" if self._places.taken >= self._limit.now else "open files (ulimit -n)"
        if turns.all_handed and not self._source.stock and not self._source.over:
            turns.pull()  # if nothing is left, the reader must not wait for a place to learn it
        return None

    def _set_alarm(self, when: float | None) -> None:
        if self._alarm is not None:
            if self._alarm.when() == when:
                return
            self._alarm.cancel()
        self._alarm = self._loop.call_at(when, self._rung) if when is not None else None

    def _rung(self) -> None:
        self._alarm = None
        self._pump()

    def _mind_deadline(self, job: "Job[T]") -> None:
        """It waits; its deadline comes even if nothing else happens."""
        if job.until is not None and job.alarm is None:
            job.alarm = self._loop.call_at(job.until, self._late, job)

    def _late(self, job: "Job[T]") -> None:
        if self._turns.head is job:
            self._turns.head = None
        self._give_up(job, self._loop.time())
        self._pump()

    def _start(self, job: "Job[T]", now: float) -> None:
        self._waited(job, now)
        if job.attempts:
            self.spent.retries += 1
        else:
            job.before = now
            if self._budget:
                self._budget.earn(now)
        self._attempt(job, now, self._function)
        if self._hedge is not None:
            self._hedge.count()
            after = self._hedge.after
            if after is not None and self._hedge.allowed:
                job.alarm = self._loop.call_later(after, self._is_slow, job)

    def _waited(self, job: "Job[T]", now: float) -> None:
        """It waits no more: it is attempted, or it is settled."""
        job.forget_alarm()
        due = min(job.due, now)
        if job.attempts == 0:
            self.spent.queue += now - job.since
        else:
            held_back = self._retries.held_back(job, due, now)
            job.held_back += held_back
            self.spent.backoff += due - job.since
            self.spent.budget += held_back
            self.spent.slot += now - due - held_back
        job.since = now

    def _is_slow(self, job: "Job[T]") -> None:
        """It gets a second attempt with the next place that is free, ahead of new requests."""
        job.alarm = None
        self._slow.append((job, job.attempts))
        self._pump()

    def _hedge_it(self, job: "Job[T]", attempts: int) -> None:
        """A second attempt, if the first still runs, and the share, the gate and the server's state allow it."""
        hedge, now = self._hedge, self._loop.time()
        assert hedge is not None
        still_runs = job.attempts == attempts and job.tasks and not job.tasks[0].done()
        if not still_runs or self._stopped or not hedge.allowed or self._limit.cut:
            return
        if self._gate and (self._turns.head is not None or self._gate.wait(job.item, now) > 0.0):
            return
        hedge.made += 1
        self.spent.hedges += 1
        self._attempt(job, now, hedge.function, is_hedge=True)

    def _attempt(self, job: "Job[T]", now: float, function: Function[T, R], is_hedge: bool = False) -> None:
        permit = self._gate.take(job.item, now) if self._gate else None
        job.attempts += 1
        self._places.taken += 1
        self.spent.attempts += 1
        until = job.until
        if self._timeout is not None and (until is None or now + self._timeout < until):
            until = now + self._timeout
        task: asyncio.Task[R] = self._loop.create_task(_within(until, function, job.item))
        self._running[task] = Attempt(job, now, self._limit.started(now), permit, is_hedge)
        job.tasks.append(task)
        task.add_done_callback(self._attempt_ended)

    # Ending ---------------------------------------------------------------------------------------------------------

    def _attempt_ended(self, task: "asyncio.Task[R]") -> None:
        attempt = self._running.pop(task)
        attempt.job.tasks.remove(task)
        try:
            self._settle(task, attempt, self._loop.time())
        except Exception as error:
            self._break(error)
        self._places.give_back(went_well=not task.cancelled() and task.exception() is None)
        self._pump()

    def _settle(self, task: "asyncio.Task[R]", attempt: "Attempt[T]", now: float) -> None:
        job = attempt.job
        self.spent.server += now - attempt.began
        error = None if task.cancelled() else task.exception()
        value = None if task.cancelled() or error is not None else task.result()
        if self._gate:
            self._gate.settle(attempt.permit, value, now)
        no_place = error is not None and getattr(error, "no_place", False)
        untold = task.cancelled() or no_place  # it says nothing about the server
        self._limit.ended(attempt.ticket, now, value, asyncio.CancelledError() if untold else error)
        if not job.tasks:
            job.forget_alarm()
        if no_place:
            self._begin_again(attempt, now)
            return
        if error is not None and not isinstance(error, Exception):
            self._break(error)
        elif job.settled or self._closed:
            self.spent.wasted += 1  # the loser of a hedge, or nobody reads any more
        elif error is None and not task.cancelled():
            self._succeeded(attempt, value, now)  # type: ignore[arg-type]
        else:
            self.spent.wasted += 1
            self._failed(job, error, now)

    def _succeeded(self, attempt: "Attempt[T]", value: R, now: float) -> None:
        job = attempt.job
        job.settled = True
        self._turns.canaries = 0
        job.forget_alarm()
        for loser in job.tasks:
            loser.cancel()
        self.spent.hedges_won += attempt.is_hedge
        if self._hedge is not None:
            # A hedge that won says of the first attempt only that it would have taken longer.
            self._hedge.learn(now - job.since)
        self._retries.succeeded(job, attempt.began, now)
        self._deliver(Returned(job.index, value, now - job.began, job.attempts), now, attempt.began)

    def _begin_again(self, attempt: "Attempt[T]", now: float) -> None:
        """An attempt was none: there was no place for it after all, though nobody could know."""
        job, alone = attempt.job, self._places.taken <= 1
        self._places.ran_out()
        job.attempts -= 1
        self.spent.attempts -= 1
        if job.tasks or job.settled or self._closed:
            return  # the other one of a hedged pair may still succeed
        self.spent.retries -= job.attempts > 0
        job.since = job.due = now
        if self._stopped:
            self._turn_away(job, now)
        elif alone:  # somebody else has them, and nothing of ours will tell when they are free
            self._wait(job, _NO_PLACE, now)
        else:
            self._turns.again.append(job)
            self._mind_deadline(job)

    def _failed(self, job: "Job[T]", error: Exception | None, now: float) -> None:
        """One attempt failed (error None: it was cancelled from outside)."""
        if job.tasks:
            return  # the other one of a hedged pair may still succeed
        late = job.until is not None and now >= job.until
        wait = None if late or error is None else self._delay(error, job)
        if wait is not None and (job.until is None or wait == math.inf or now + wait < job.until):
            job.last, job.before = error, now
            self._wait(job, wait, now)
            return
        job.settled = True
        seconds = now - job.began
        if error is None:
            fault = Fault(job.index, "cancelled", "the call was cancelled", seconds, job.attempts)
        else:
            fault = fault_of(job, error, seconds, late=late)
        self._deliver(fault, now)

    def _wait(self, job: "Job[T]", wait: float, now: float) -> None:
        """Until its next attempt is due, or it is known that there is none."""
        if self._stopped:
            job.since = job.due = now
            self._turn_away(job, now)
            return
        self._retries.put(job, wait, now)
        self._mind_deadline(job)

    def _give_up_held(self, now: float) -> None:
        """All that is left is held: it is given up, or tried once more if anything has succeeded meanwhile."""
        for job in self._retries.given_up(now):
            job.settled = True
            self._waited(job, now)
            assert job.last is not None
            self._deliver(fault_of(job, job.last, now - job.began, late=False, held=True), now)

    def _give_up(self, job: "Job[T]", now: float) -> None:
        """The deadline came while it waits."""
        job.settled = True
        self._retries.forget(job)
        self._waited(job, now)
        self._deliver(fault_of(job, TimeoutError(), now - job.began, late=True), now)

    def _turn_away(self, job: "Job[T]", now: float, message: str = "not asked: the run was stopped before") -> None:
        """It is not going to be tried (again): the flow was stopped."""
        job.settled = True
        self._waited(job, now)
        self._deliver(Fault(job.index, "stopped", message, now - job.began, job.attempts), now)

    def _deliver(self, outcome: Outcome[R], now: float, began: float | None = None) -> None:
        if self.watch is not None:
            self.watch(outcome, now if began is None else began, now)
        self._outbox.put(outcome, now)


async def _within(until: float | None, function: Function[T, R], item: T) -> R:
    async with asyncio.timeout_at(until):
        return await function(item)
