"""Which source each place of a mixture takes from: weights kept at every point, and nothing remembered."""

import heapq
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from millstream.errors import RequestError
from millstream.options import are_weights
from millstream.records import Ids
from millstream.sampling.permutation import key_of, mixed

BLOCK = 1 << 16
"""Places that are laid out together. Every block has the same number of places for each source."""

_PASSES = 16


def shares(weights: Sequence[float]) -> tuple[int, ...]:
    """How many places of a block each weight gets: by largest remainder, but at least one.

    Raises RequestError if a weight is not a number above 0, or if there are more of them than places.

    >>> shares([0.7, 0.2, 0.1]), shares([1, 1e-9])
    ((45875, 13107, 6554), (65535, 1))
    """
    if not are_weights(weights):
        raise RequestError(f"weights {weights!r} do not work: give each a number above 0")
    if len(weights) > BLOCK:
        raise RequestError(f"{len(weights):,} weights do not work: give at most {BLOCK:,}")
    total = sum(weights)
    quotas = [weight * BLOCK / total for weight in weights]
    counts = [max(1, int(quota)) for quota in quotas]
    # The rest goes to those who have least of what is due to them; what is given too much comes from those with most.
    while missing := BLOCK - sum(counts):
        owed = [quota - count for quota, count in zip(quotas, counts, strict=True)]
        if missing > 0:
            counts[owed.index(max(owed))] += 1
        else:
            counts[min((number for number in range(len(counts)) if counts[number] > 1), key=owed.__getitem__)] -= 1
    return tuple(counts)


class Laid(NamedTuple):
    """A block's places: from which source each takes, and how many places before it in the block do too; i64."""

    source: Ids
    nth: Ids


class Mixture:
    """Sources by weight: after any number of places, each has had its share to within one.

    The places are dealt in blocks of `BLOCK`. Within that bound the seed decides their order: two sources of one weight
    don't simply take turns, or the first of two ranks would see one of them and the second the other.

    >>> source, number = Mixture([2, 1, 1], seed=7)(np.arange(8))
    >>> source.tolist(), number.tolist()
    ([2, 0, 1, 0, 0, 1, 2, 0], [0, 0, 0, 1, 2, 1, 1, 3])
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        self.counts = shares(weights)
        self._key = key_of("mixture", seed)
        self._last: tuple[int, Laid] | None = None

    def __call__(self, places: Ids) -> tuple[Ids, Ids]:
        """For each place its source, and how many places of that source come before it, over all blocks."""
        blocks, inside = np.divmod(places, BLOCK)
        source, number = np.empty((2, len(places)), np.int64)
        for block in np.unique(blocks).tolist():
            here = np.flatnonzero(blocks == block)
            laid = self._block(block)
            source[here], number[here] = laid.source[inside[here]], laid.nth[inside[here]]
        return source, number + np.array(self.counts, np.int64)[source] * blocks

    def _block(self, number: int) -> Laid:
        if self._last is None or self._last[0] != number:
            dealt = _dealt(self.counts)
            key = np.frombuffer(key_of(self._key.hex(), number), "<u8")[:1]
            coins = mixed(np.arange(BLOCK, dtype=np.uint64), key)
            self._last = number, _shuffled(Laid(dealt.source.copy(), dealt.nth.copy()), self.counts, coins)
        return self._last[1]


@lru_cache(maxsize=4)
def _dealt(counts: tuple[int, ...]) -> Laid:
    """A block in which each source has had its share to within one after every place.

    A source's next place has a first and a last time at which it may come, and of those whose time has come, the one
    with the earliest end is next. That this always works out is a theorem (Tijdeman, the chairman assignment problem).
    """
    source, nth = np.empty((2, BLOCK), np.int64)
    waiting = [(0, number, 0) for number in range(len(counts))]  # (may come from, source, how many it has had)
    ready: list[tuple[int, int, int]] = []  # (must come before, source, how many it has had)
    for place in range(BLOCK):
        while waiting and waiting[0][0] <= place:
            _, number, had = heapq.heappop(waiting)
            heapq.heappush(ready, (-(-BLOCK * (had + 1) // counts[number]), number, had))
        _, number, had = heapq.heappop(ready)
        source[place], nth[place] = number, had
        if had + 1 < counts[number]:
            heapq.heappush(waiting, (BLOCK * (had + 1) // counts[number], number, had + 1))
    return Laid(source, nth)


def _shuffled(laid: Laid, counts: tuple[int, ...], coins: Ids) -> Laid:
    """Neighbours change places where a bit of `coins` says so, if both sources stay within one of their shares."""
    count = np.array(counts, np.int64)
    for number in range(_PASSES):
        # Only what was dealt before the second of a pair changes with the pair, so that pairs don't meddle.
        first = np.arange(number % 2, BLOCK - 1, 2)
        here, there = (Laid(laid.source[at], laid.nth[at]) for at in (first, first + 1))
        falls_behind = BLOCK * (here.nth + 1) <= count[here.source] * (first + 1)
        runs_ahead = BLOCK * there.nth >= count[there.source] * (first + 1)
        heads = (coins[first] >> np.uint64(number)) & np.uint64(1) == 1
        swapped = first[heads & (here.source != there.source) & ~falls_behind & ~runs_ahead]
        for column in laid:
            column[swapped], column[swapped + 1] = column[swapped + 1], column[swapped]
    return laid
