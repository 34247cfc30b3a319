"""Limits on how much may begin in a minute: token buckets, first come first served, with debts and refunds.

Pure arithmetic on times in seconds that the caller brings; nothing here waits.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

_NOTHING = 1e-9  # units, and seconds: below it are rounding errors, which no amount of waiting would mend
_SMOOTHING = 0.05  # seconds' worth that may come at once: a timer that fires late must not cost throughput


class Gate(Protocol):
    """What an attempt needs permission from, beside a free place.

    It is asked for one item at a time, and that item begins before the next is asked for: a large one, which waits
    long, is never overtaken. `name` says in a few words what it is that an item waits for.
    """

    @property
    def name(self) -> str: ...

    def wait(self, item: Any, now: float) -> float:
        """Seconds until an attempt at `item` may begin; 0: at once; infinite: not before another attempt has ended."""

    def take(self, item: Any, now: float) -> Any:
        """It begins; what is returned comes back with `settle`."""

    def settle(self, permit: Any, value: Any, now: float) -> None:
        """It ended with `value`, so that what it really used is known; None: it failed."""


class Bucket:
    """`rate` units a second, of which at most `capacity` may be saved up; the time starts at the first `wait`.

    A cost above the capacity is admitted on a full bucket and leaves a debt, which everything after it waits for.

    >>> bucket = Bucket(rate=10.0, capacity=5.0)
    >>> bucket.wait(20.0, now=0.0)  # more than it ever holds: admitted, as the bucket is full
    0.0
    >>> bucket.take(20.0, now=0.0)
    >>> bucket.wait(1.0, now=0.0)  # 15 in debt, and 1 to pay
    1.6
    >>> bucket.give(15.0, now=0.0)  # it used less than that
    >>> bucket.wait(1.0, now=0.0)
    0.1
    """

    def __init__(self, rate: float, capacity: float) -> None:
        if not (rate > 0 and capacity > 0):
            raise ValueError(f"a rate and a capacity are above 0, not {rate:g} and {capacity:g}")
        self.rate, self.capacity = rate, capacity
        self._level, self._at = capacity, -1.0

    def wait(self, cost: float, now: float) -> float:
        """Seconds until `cost` is admitted, if nothing else is taken before."""
        self._fill(now)
        missing = min(cost, self.capacity) - self._level
        wait = missing / self.rate
        return wait if min(missing, wait) > _NOTHING else 0.0

    def take(self, cost: float, now: float) -> None:
        self._fill(now)
        self._level -= cost

    def give(self, amount: float, now: float) -> None:
        """A refund; negative if more was used than taken."""
        self._fill(now)
        self._level = min(self.capacity, self._level + amount)

    def _fill(self, now: float) -> None:
        if self._at >= 0:
            self._level = min(self.capacity, self._level + (now - self._at) * self.rate)
        self._at = now


def per_minute(amount: float) -> Bucket:
    """A bucket that lets at most `amount` begin in any 60 seconds, evenly spread rather than in bursts.

    >>> bucket = per_minute(60)
    >>> bucket.take(1, now=0.0)
    >>> bucket.wait(1, now=0.25)
    0.75
    """
    at_once = max(1.0, amount / 60.0 * _SMOOTHING)
    # A window of 60 s sees what was saved up and what 60 s bring.
    return Bucket(max(amount - (at_once - 1.0), amount / 2) / 60.0, at_once)


class Rate:
    """A `Gate` on one bucket: what an item costs beforehand, and what its reply says that it really used."""

    name = "the rate limit"

    def __init__(
        self,
        bucket: Bucket,
        cost: Callable[[Any], float] = lambda item: 1.0,
        used: Callable[[Any], float | None] = lambda value: None,
    ) -> None:
        self._bucket, self._cost, self._used = bucket, cost, used

    def wait(self, item: Any, now: float) -> float:
        return self._bucket.wait(self._cost(item), now)

    def take(self, item: Any, now: float) -> float:
        cost = self._cost(item)
        self._bucket.take(cost, now)
        return cost

    def settle(self, permit: float, value: Any, now: float) -> None:
        """What a failed attempt used is not known: it counts as it was estimated."""
        if value is not None and (amount := self._used(value)) is not None:
            self._bucket.give(permit - amount, now)


class All:
    """A `Gate` that is open when all of its gates are."""

    def __init__(self, gates: Sequence[Gate]) -> None:
        self._gates = gates
        self.name = ""

    def wait(self, item: Any, now: float) -> float:
        longest = 0.0
        for gate in self._gates:
            if (wait := gate.wait(item, now)) > longest:
                longest, self.name = wait, gate.name
        return longest

    def take(self, item: Any, now: float) -> list[Any]:
        return [gate.take(item, now) for gate in self._gates]

    def settle(self, permit: list[Any], value: Any, now: float) -> None:
        for gate, its in zip(self._gates, permit, strict=True):
            gate.settle(its, value, now)


class RetryBudget:
    """Retries as a share of first attempts, and some a second besides: a storm of them is delayed, never failed.

    The idea of a share is that of Finagle's retry budgets; there, retries over it are given up. A request that succeeds
    gives back what its retries took: those helped, and only retries in vain make a storm.

    >>> budget = RetryBudget(share=0.2, per_second=10.0, saved=2.0)
    >>> [budget.take(0.0), budget.take(0.0), budget.wait(0.0)]
    [None, None, 0.1]
    >>> for _ in range(5):
    ...     budget.earn(0.0)
    >>> budget.wait(0.0)
    0.0
    """

    def __init__(self, share: float = 0.2, per_second: float = 10.0, saved: float = 100.0) -> None:
        self._share, self._bucket = share, Bucket(per_second, saved)

    def earn(self, now: float) -> None:
        """A first attempt began."""
        self._bucket.give(self._share, now)

    def give_back(self, tokens: int, now: float) -> None:
        """A request succeeded whose retries took so many."""
        self._bucket.give(tokens, now)

    def wait(self, now: float) -> float:
        return self._bucket.wait(1.0, now)

    def take(self, now: float) -> None:
        self._bucket.take(1.0, now)
