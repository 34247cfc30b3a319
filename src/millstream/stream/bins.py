"""The plan of best-fit: which pieces of documents go into one sample together, decided on lengths alone.

Lengths are whole numbers up to N, and documents of one length are interchangeable, so the plan is made on a histogram:
about two steps for each length, however many documents there are. It is the plan of best-fit-decreasing, item by item.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from millstream.records import Ids


class Bins(NamedTuple):
    """Samples that are alike to the plan: so many ids are free, and so many more pieces may go in."""

    free: int
    room: int


class Step(NamedTuple):
    """Put `each` pieces of `length` ids into each of `bins` bins of the kind `into`."""

    length: int
    into: Bins
    each: int
    bins: int

    @property
    def after(self) -> Bins:
        """What the bins are then."""
        return Bins(self.into.free - self.each * self.length, self.into.room - self.each)


def plan(histogram: Ids, n: int, most: int | None = None) -> list[Step]:
    """The steps of best-fit-decreasing for histogram[l] pieces of l ids, with at most `most` pieces in a bin of n ids.

    A piece goes where the fewest ids stay free, of equal bins into the one with room for the fewest pieces, and into a
    new one, of the kind Bins(n, most), if it fits nowhere.

    >>> for step in plan(np.array([0, 0, 3, 0, 1, 0, 2]), 8):
    ...     print(*step)
    6 Bins(free=8, room=8) 1 2
    4 Bins(free=8, room=8) 1 1
    2 Bins(free=2, room=7) 1 2
    2 Bins(free=4, room=7) 1 1
    """
    room = min(most or n, n)
    bits, rooms = room.bit_length(), _rooms(room)
    steps = _steps(histogram, n, room, 1)
    return [Step(length, Bins(into >> bits, into & rooms), each, bins) for length, into, each, bins in steps]


def opened(histogram: Ids, n: int, most: int | None = None) -> int:
    """How many bins `plan` opens.

    >>> opened(np.array([0, 0, 3, 0, 1, 0, 2]), 8), opened(np.array([0, 0, 3, 0, 1, 0, 2]), 8, 1)
    (3, 6)
    """
    # Room decides between equal bins, and so not how many there are, unless it can run out.
    room = min(most or n, n)
    steps, new = _steps(histogram, n, room, 0 if most is None else 1), n << room.bit_length()
    return sum([bins for _, into, _, bins in steps if into >= new])


def _rooms(room: int) -> int:
    """The bits that hold `room` or less."""
    return (1 << room.bit_length()) - 1


def _steps(histogram: Ids, n: int, room: int, piece: int) -> Iterator[tuple[int, int, int, int]]:
    """(length, into, each, bins) of every step, where each piece takes `piece` of a new bin's room.

    Kinds of bins are whole numbers here, `free << bits | room`: that is three times as fast as tuples. With no more
    bits than `room` needs they have one of Python's digits, of 30 bits; with two, all of it takes a quarter longer.
    """
    bits, rooms = room.bit_length(), _rooms(room)
    new = n << bits | room
    counts = {new: int(histogram.sum())}  # open bins of every kind; of new ones there are always enough
    kinds = [new]  # sorted
    lengths = np.flatnonzero(histogram)[::-1]
    for length, left in zip(lengths.tolist(), histogram[lengths].tolist(), strict=True):
        least = length << bits
        one = least | piece
        while left:
            at = bisect_left(kinds, least)
            into = kinds[at]
            each = into // least  # with `min` all of it takes a quarter longer
            if each > left:
                each = left
            if each > 1 and each > into & rooms:
                each = into & rooms
            have = counts[into]
            bins = left // each
            if bins < have:
                counts[into] = have - bins
            else:
                bins = have
                del counts[into], kinds[at]
            yield length, into, each, bins
            left -= each * bins
            after = into - each * one
            if after > rooms and after & rooms:
                if after in counts:
                    counts[after] += bins
                else:
                    counts[after] = bins
                    insort(kinds, after)


def assign(length: Ids, n: int, most: int | None = None) -> tuple[Ids, int]:
    """(the bin of every piece, the number of bins) by `plan`; pieces of one length are taken in order.

    >>> bins, count = assign(np.array([2, 6, 4, 2, 6, 2]), 8)
    >>> bins.tolist(), count
    ([0, 0, 2, 1, 1, 2], 3)
    """
    histogram = np.bincount(length, minlength=n + 1)
    steps = plan(histogram, n, most)
    placed = np.empty(len(length), np.int64)  # the bins of all pieces, shortest first
    next_piece = (np.cumsum(histogram) - histogram).tolist()
    piles: dict[Bins, list[Ids]] = {}
    opened = 0
    for step in steps:
        if step.into.free == n:
            bins = np.arange(opened, opened + step.bins)
            opened += step.bins
        else:
            bins = _off(piles[step.into], step.bins)
        low = next_piece[step.length]
        high = next_piece[step.length] = low + step.each * step.bins
        placed[low:high] = np.repeat(bins, step.each)
        if min(step.after):
            piles.setdefault(step.after, []).append(bins)
    found = np.empty(len(length), np.int64)
    found[ordered(length)] = placed
    return found, opened


def _off(pile: list[Ids], count: int) -> Ids:
    """Take `count` bins off a pile of them."""
    taken = []
    while count:
        bins = pile.pop()
        if len(bins) > count:
            pile.append(bins[count:])
            bins = bins[:count]
        taken.append(bins)
        count -= len(bins)
    return np.concatenate(taken)


def ordered(values: Ids) -> Ids:
    """The stable order of values that leave as many bits of 64 free as it takes to count them.

    They are sorted with their places in these bits, three times faster than argsort.

    >>> ordered(np.array([7, 2, 7, 0])).tolist()
    [3, 1, 0, 2]
    """
    bits = np.uint64(len(values).bit_length())
    keys = values.astype(np.uint64) << bits
    keys |= np.arange(len(values), dtype=np.uint64)
    keys.sort()
    return (keys & ((np.uint64(1) << bits) - np.uint64(1))).astype(np.int64)
