"""Whose turn it is among sources of items of any size, so that each has given its share: nothing drawn, little kept."""

import heapq
import math
from collections.abc import Sequence

from millstream.errors import RequestError
from millstream.options import are_weights
from millstream.sampling.numbers import seed_of
from millstream.sampling.permutation import key_of

_MULTIPLY = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # those of splitmix64
_MASK = (1 << 64) - 1


class FairTurns:
    """Which of several sources gives the next item. At any point each has given its share, to within one item.

    A source says with `offer` how large its next item is, and `take` tells whose item is next, once each of them has
    one. It remembers two numbers a source; `given`, counted on in place, and `due` are all that is to be kept to go on.

    Think of all sources giving at once, each as fast as its weight. An item may come once that flow has reached its
    first id, and of these items the one that the flow is through with soonest comes next. So no source is ahead by more
    than its last item, nor behind by more than the longest one that others gave: a theorem on packets that share a line
    (Bennett and Zhang, WF2Q). Within that bound the seed decides: of two items that come next, it lets the second come
    first, or not. Then `due` is the source of the other.

    >>> turns, order = FairTurns([2, 1, 1], seed=7), ""
    >>> for source in range(3):
    ...     turns.offer(source, 10)
    >>> for _ in range(8):
    ...     order += "abc"[source := turns.take()]
    ...     turns.offer(source, 10)
    >>> order, turns.given
    ('baaccaab', [40, 20, 20])
    """

    def __init__(
        self, weights: Sequence[float], *, seed: int, given: list[int] | None = None, due: int | None = None
    ) -> None:
        if not are_weights(weights):
            raise RequestError(f"weights {weights!r} do not work: give each a number above 0")
        seed = seed_of(seed)
        self._weights = dict(enumerate(map(float, weights)))  # of those that still give
        self.given = [0] * len(weights) if given is None else given
        self.due = due
        self._coin, *self._keys = (_key(seed, number) for number in range(1 + len(weights)))
        self._size = [0] * len(weights)
        self._waiting: list[tuple[float, int]] = []  # (may come from, source)
        self._ready: list[tuple[float, int, int]] = []  # (is due, a lot, source)
        self._count()

    def _count(self) -> None:
        self._weight = math.fsum(self._weights.values())
        self._total = sum(self.given[source] for source in self._weights)

    def offer(self, source: int, size: int) -> None:
        """The next item of a source. An empty one counts as one id, or a source of nothing else would never end."""
        self._size[source] = max(1, size)
        if source != self.due:
            heapq.heappush(self._waiting, (self.given[source] / self._weights[source], source))

    def take(self) -> int:
        """The source whose item is next; it has given that item now."""
        if self.due is None:
            source = self._next()
        else:
            source, self.due = self.due, None
        self.given[source] += self._size[source]
        self._total += self._size[source]
        return source

    def _next(self) -> int:
        self._ripen(self._total)
        # Somebody is always behind or where he should be, but for how a float is rounded.
        first = heapq.heappop(self._ready)[-1] if self._ready else heapq.heappop(self._waiting)[-1]
        if _lot(self._total ^ self._coin) & 1 and self._may_wait(first):
            self.due, first = first, heapq.heappop(self._ready)[-1]
        return first

    def _ripen(self, total: int) -> None:
        """Those whose items may come once so many ids have been given."""
        while self._waiting and self._waiting[0][0] <= total / self._weight:
            source = heapq.heappop(self._waiting)[1]
            due = (self.given[source] + self._size[source]) / self._weights[source]
            heapq.heappush(self._ready, (due, _lot(self.given[source] ^ self._keys[source]), source))

    def _may_wait(self, first: int) -> bool:
        """Whether the item that would come after this source's may come before it.

        Behind the two of them all is as it would have been. So only in between must nobody be too far ahead or behind.
        """
        size, weight = self._size[first], self._weights[first]
        if (self.given[first] + size) / weight <= (self._total + size) / self._weight:
            return False  # its own next item might come after it
        self._ripen(self._total + size)
        if not self._ready:
            return False
        second = self._ready[0][-1]
        behind = weight / self._weight * (self._total + self._size[second]) - self.given[first]
        ahead = self.given[second] / self._weights[second] > self._total / self._weight
        return not ahead and behind <= max(size, self._size[second])

    def drop(self, source: int) -> None:
        """A source has nothing more to offer: the others share what it had, by their weights."""
        del self._weights[source]
        self._count()
        self.due = None if source == self.due else self.due
        for _, _, other in self._ready:  # whose turn it is has to be found anew, as it is where one goes on
            heapq.heappush(self._waiting, (self.given[other] / self._weights[other], other))
        self._ready.clear()

    def __len__(self) -> int:
        """How many sources still give."""
        return len(self._weights)


def _key(*parts: int) -> int:
    return int.from_bytes(key_of("turns", *parts)[:8], "little")


def _lot(number: int) -> int:
    """A number that looks as if drawn by lot, always the same for the same one."""
    for factor in _MULTIPLY:
        number = number * factor & _MASK
        number ^= number >> 32
    return number


def shares_of(given: Sequence[int]) -> list[float]:
    """What part of all each has given.

    >>> shares_of([3, 1]), shares_of([0, 0])
    ([0.75, 0.25], [0.0, 0.0])
    """
    total = sum(given) or 1
    return [count / total for count in given]
