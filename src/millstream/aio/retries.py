"""What waits for its next attempt: until that is due, for the retry budget, or for somebody to get through."""

import heapq
import math
from collections.abc import Iterator
from typing import Generic, TypeVar

from millstream.aio.jobs import Job, Stretches
from millstream.aio.rates import RetryBudget

T = TypeVar("T")


class Retries(Generic[T]):
    """Requests that wait for their next attempt; times are in seconds.

    One whose wait is infinite, or above `longest_wait`, is held: the first until a request succeeds that began later,
    the second for its time.
    """

    def __init__(self, budget: RetryBudget | None, longest_wait: float) -> None:
        self._budget, self._longest_wait = budget, longest_wait
        self._due: list[tuple[float, int, Job[T]]] = []  # a heap by the time they are due
        self._held: dict[Job[T], None] = {}
        self._succeeded_at = -math.inf  # when anything did last
        self._scarcity = Stretches()  # when some that were due waited for the budget

    def __iter__(self) -> Iterator[Job[T]]:
        """All that wait, some of them twice."""
        yield from (job for _, _, job in self._due)
        yield from self._held

    def clear(self) -> None:
        self._due.clear()
        self._held.clear()

    @property
    def any_held(self) -> bool:
        return bool(self._held)

    def put(self, job: Job[T], wait: float, now: float) -> None:
        job.since, job.due, job.scarcity = now, now + wait, self._scarcity.until(now)
        if wait > self._longest_wait or wait == math.inf:
            self._held[job] = None
        if wait != math.inf:
            heapq.heappush(self._due, (job.due, job.index, job))

    def next(self, now: float) -> tuple[Job[T] | None, float | None, bool]:
        """The next one, if it is due and the budget allows it; or when to look, and whether the budget is why not."""
        while self._due and self._due[0][2].settled:
            heapq.heappop(self._due)  # its deadline came first
        if not self._due or self._due[0][0] > now:
            self._scarcity.end(now)
            return None, self._due[0][0] if self._due else None, False
        wait = self._budget.wait(now) if self._budget else 0.0
        if wait > 0.0:
            self._scarcity.begin(now)
            return None, now + wait, True
        job = heapq.heappop(self._due)[2]
        self._held.pop(job, None)
        if self._budget:
            self._budget.take(now)
            job.tokens += 1
        return job, None, False

    def no_place(self, now: float) -> None:
        """From now on, what is due waits for a place, and not for the budget."""
        self._scarcity.end(now)

    def held_back(self, job: Job[T], due: float, now: float) -> float:
        """How long the budget held back a request that was due."""
        return min(now - due, self._scarcity.until(now) - job.scarcity)

    def forget(self, job: Job[T]) -> None:
        """It waits no more: its deadline came."""
        self._held.pop(job, None)

    def succeeded(self, job: Job[T], began: float, now: float) -> None:
        """An attempt that `began` then: its retries give back what they took, and who waited for it may try again."""
        if job.tokens and self._budget:
            self._budget.give_back(job.tokens, now)
        self._succeeded_at = now
        if self._held:
            self._release([held for held in self._held if held.since <= began], now)

    @property
    def all_held(self) -> bool:
        return all(job in self._held for _, _, job in self._due if not job.settled)

    def given_up(self, now: float) -> list[Job[T]]:
        """The held ones, where nothing else is left; none if they may try once more, as something has succeeded."""
        hopeful = [job for job in self._held if job.since < self._succeeded_at and job.due == math.inf]
        if hopeful:
            self._release(hopeful, now)
            return []
        held = list(self._held)
        self.clear()
        return held

    def _release(self, jobs: list[Job[T]], now: float) -> None:
        """These may try again, if a success is all that they wait for. The budget spreads them."""
        for job in jobs:
            if job.due == math.inf:
                del self._held[job]
                job.due = now
                heapq.heappush(self._due, (now, job.index, job))
