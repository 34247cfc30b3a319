"""Best-fit packing: documents are put into samples whole, longest first, each where it leaves the least room.

Lengths are whole numbers up to N, and documents of one length are interchangeable, so the plan is made on a histogram:
about two steps for each length, however many documents there are. It is the plan of best-fit-decreasing, item by item.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from millstream.records import SEGMENT, Ids, TokenBatch
from millstream.stream.pack import (
    CHUNK,
    Ended,
    Packed,
    Remainder,
    Runs,
    State,
    Where,
    continued,
    joined,
    nowhere,
    padded,
    weight,
)
from millstream.stream.shuffle import permutation

WINDOW = 32 << 20
"""Ids: samples of 2,048 are then filled to 99.99 % on long-tailed corpora."""


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
    new = Bins(n, min(most or n, n))
    counts = {new: int(histogram.sum())}  # open bins of every kind; of new ones there are always enough
    kinds = [new]  # sorted
    steps = []
    for length in np.flatnonzero(histogram)[::-1].tolist():
        left = int(histogram[length])
        while left:
            at = bisect_left(kinds, (length, 0))
            into = kinds[at]
            each = min(into.free // length, into.room, left)
            step = Step(length, into, each, min(counts[into], left // each))
            steps.append(step)
            left -= each * step.bins
            counts[into] -= step.bins
            if not counts[into]:
                del counts[into], kinds[at]
            if min(step.after):
                if step.after not in counts:
                    counts[step.after] = 0
                    insort(kinds, step.after)
                counts[step.after] += step.bins
    return steps


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
    found[_ordered(length)] = placed
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


def _ordered(values: Ids) -> Ids:
    """The stable order of values below 2^32: they are sorted with their places, three times faster than argsort."""
    keys = (values.astype(np.uint64) << np.uint64(32)) | np.arange(len(values), dtype=np.uint64)
    keys.sort()
    return (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)


def closes_behind(weights: Ids, room: int) -> int:
    """How many documents, of these running totals of `weight`, a window with so much room takes.

    It closes at the end of the one that fills it. One more than there are if none does.

    >>> closes_behind(np.array([200, 400, 600]), 400), closes_behind(np.array([200, 400, 600]), 601)
    (2, 4)
    """
    return int(np.searchsorted(weights, room)) + 1


class BestFit:
    """Put documents into samples whole, by best-fit-decreasing within a window; pad what stays free.

    A document longer than a sample gives full samples at once, and its end is placed like a short document. A window
    closes at the end of the document with which it has `window` ids, by `weight`; its samples come in an order that
    depends on `seed` and the window's first document, as the plan leaves them sorted by length. In a sample the
    documents are in the order of the stream. At most `max_segments` of them are in one.

    >>> import numpy as np
    >>> packer, row = BestFit(4, np.dtype(np.uint32), pad_id=9), np.arange(4)
    >>> ids, lengths = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9]), np.array([3, 1, 0, 5])
    >>> batch = TokenBatch(ids, lengths, row, row * 0, ["a", "b", "c", "d"], row, row)
    >>> [packed.ids.tolist() for packed in packer.feed(batch)]
    [[[5, 6, 7, 8]]]
    >>> [sorted(packed.ids.tolist()) for packed in packer.flush()]
    [[[1, 2, 3, 4], [9, 9, 9, 9]]]
    """

    def __init__(
        self,
        seq_len: int,
        dtype: "np.dtype[Any]",
        pad_id: int = 0,
        pad_side: str = "right",
        window: int = WINDOW,
        max_segments: int | None = None,
        seed: int = 0,
        samples: int = 0,
    ) -> None:
        self.seq_len = seq_len
        self.samples = samples
        self._pad, self._side = pad_id, pad_side
        self._window, self._most, self._seed = window, max_segments, seed
        self._held = np.empty(0, dtype)  # the unfinished piece of a document that goes on
        self._pieces = np.empty(window + seq_len, dtype)  # memory that is not written to is not used
        self._begin()

    def _begin(self) -> None:
        self._weight = self._filled = 0
        self._ended: list[Ended] = []  # the documents with a piece in the window
        self._lengths: list[Ids] = []  # of the pieces
        self._first: tuple[int, State, int] | None = None  # document, its state, and samples before the window

    def feed(self, batch: TokenBatch, where: Where = nowhere) -> Iterator[Packed]:
        whole = (batch.start + batch.length)[: len(batch) - batch.open]
        weights = np.cumsum(weight(whole))
        low = counted = 0
        while low < len(batch):
            high = closes_behind(weights, self._window - self._weight + counted)
            closes = high <= len(weights)
            high = high if closes else len(batch)
            if self._first is None:
                self._first = (int(batch.ordinal[low]), where(low), self.samples)
            yield from self._take(batch.rows(low, high))
            upto = int(weights[min(high, len(weights)) - 1]) if len(weights) else 0
            self._weight += upto - counted
            low, counted = high, upto
            if closes:
                yield from self._close(where(high))

    def _take(self, batch: TokenBatch) -> Iterator[Packed]:
        """Take documents into the window; the full samples of long ones."""
        n, first = self.seq_len, self.samples
        flat = joined(self._held, batch)
        full = flat.length // n
        rest = flat.length - full * n
        runs = Runs(flat.ids, np.concatenate([[0], np.cumsum(np.stack([full * n, rest], axis=1))]))
        ends = np.arange(len(batch)) < len(batch) - batch.open
        after = np.cumsum(full) + first
        self._held = runs.take(np.flatnonzero(~ends) * 2 + 1)
        ended = Ended(
            batch.ordinal,
            batch.doc_ids,
            batch.source,
            batch.offset,
            flat.start + flat.length,
            after - (full > 0),
            flat.start + flat.length > n,
        )
        kept = ends & (rest > 0)
        if kept.any():
            self._keep(ended.where(kept), rest[kept], runs.take(np.flatnonzero(kept) * 2 + 1))
        done = ends & (rest == 0)
        if not (full.any() or done.any()):
            return
        self.samples = int(after[-1])
        row = np.repeat(np.arange(len(full)), full)
        number = np.arange(len(row))
        segments = np.empty(len(row), SEGMENT)
        segments["document"] = batch.ordinal[row]
        segments["start"] = flat.start[row] + (number - (after - full - first)[row]) * n
        segments["length"] = n
        segments["sample"] = number
        samples = runs.take(np.flatnonzero(full) * 2).reshape(-1, n).copy()
        yield Packed(first, samples, segments, ended.where(done), self._state())

    def _keep(self, ended: Ended, length: Ids, ids: Ids) -> None:
        self._ended.append(ended)
        self._lengths.append(length)
        self._pieces[self._filled : self._filled + len(ids)] = ids
        self._filled += len(ids)

    def _state(self, end: int = -1, behind: State | None = None) -> Any:
        """`Packed.state` within the window; `behind` it, which is where sample number `end` begins."""
        assert self._first
        _, where, samples = self._first

        def state(number: int) -> State:
            if behind is not None and number == end:
                return continued(behind, 0, number, number)
            return continued(where, 0, samples, number)

        return state

    def _close(self, behind: State | None = None) -> Iterator[Packed]:
        """Place the window's pieces and hand out its samples, a chunk at a time; `behind` is the next one's state."""
        assert self._first
        n, base = self.seq_len, self.samples
        if self._lengths:
            documents, length = _all(self._ended), np.concatenate(self._lengths)
            bins, count = assign(length, n, self._most)
            bins = permutation(count, self._seed, self._first[0], "bins")[bins]
            order = _ordered(bins)
            bounds = np.concatenate([[0], np.cumsum(np.bincount(bins, minlength=count))])
            runs = Runs(self._pieces[: self._filled], np.concatenate([[0], np.cumsum(length)]))
            state = self._state(base + count, behind)
            step = max(1, CHUNK // n)
            for low in range(0, count, step):
                high = min(low + step, count)
                chosen = order[bounds[low] : bounds[high]]
                segments = np.empty(len(chosen), SEGMENT)
                segments["document"] = documents.ordinal[chosen]
                segments["start"] = (documents.length - length)[chosen]
                segments["length"] = length[chosen]
                segments["sample"] = bins[chosen] - low
                used = np.bincount(segments["sample"], segments["length"], high - low).astype(np.int64)
                ids = padded(runs.take(chosen), used, n, self._pad, self._side)
                in_order = np.sort(chosen)
                ended = documents.where(in_order)
                ended.last_sample = bins[in_order] + base
                self.samples = base + high
                yield Packed(base + low, ids, segments, ended, state)
        self._begin()

    def flush(self) -> Iterator[Packed]:
        """The samples of the last window, which the end of the input closes."""
        if self._first:
            yield from self._close()

    def finish(self) -> Remainder:
        return Remainder(np.empty(0, self._pieces.dtype), np.empty(0, SEGMENT))


def _all(parts: list[Ended]) -> Ended:
    names = [name for part in parts for name in part.doc_ids]

    def column(name: str) -> Ids:
        return np.concatenate([getattr(part, name) for part in parts])

    rest = (column(name) for name in ("source", "offset", "length", "last_sample", "split"))
    return Ended(column("ordinal"), names, *rest)
