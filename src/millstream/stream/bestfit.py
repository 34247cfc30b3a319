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

    A document longer than a sample gives full samples, and its end is placed like a short document. A window closes at
    the end of the document with which it has `window` ids, by `weight`; its samples come in an order that depends on
    `seed`, the window's first document and the lengths in it: as they were made, long documents would come first, and
    the rest sorted by length. What that last document has beyond the window's ids comes before them, as it is read. In
    a sample the documents are in the order of the stream. At most `max_segments` of them are in one.

    >>> import numpy as np
    >>> packer, row = BestFit(4, np.dtype(np.uint32), pad_id=0), np.arange(4)
    >>> ids, lengths = np.array([1, 2, 3, 4, 5, 6, 7, 8, 9]), np.array([3, 1, 0, 5])
    >>> batch = TokenBatch(ids, lengths, row, row * 0, ["a", "b", "c", "d"], row, row)
    >>> list(packer.feed(batch))
    []
    >>> [packed.ids.tolist() for packed in packer.flush()]
    [[[5, 6, 7, 8], [9, 0, 0, 0], [1, 2, 3, 4]]]
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
        self._open_full = 0  # full samples of it that are in the window
        # Ends from the front, full samples from the back; memory that is not written to is not used.
        self._pieces = np.empty(window + seq_len, dtype)
        self._full = self._pieces[len(self._pieces) % seq_len :].reshape(-1, seq_len)[::-1]
        self._begin()

    def _begin(self) -> None:
        self._weight = self._filled = self._samples = 0
        self._parts: list[_Documents] = []
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
            before = (int(weights[high - 2]) if high - low > 1 else counted) - counted
            yield from self._take(batch.rows(low, high), self._window - self._weight - before)
            upto = int(weights[min(high, len(weights)) - 1]) if len(weights) else 0
            self._weight += upto - counted
            low, counted = high, upto
            if closes:
                yield from self._close(where(high))

    def _take(self, batch: TokenBatch, room: int) -> Iterator[Packed]:
        """Take documents into the window, where the last one has `room` ids; its full samples beyond that."""
        n = self.seq_len
        flat = joined(self._held, batch)
        full = flat.length // n
        rest = flat.length - full * n
        runs = Runs(flat.ids, np.concatenate([[0], np.cumsum(np.stack([full * n, rest], axis=1))]))
        samples = runs.take(np.flatnonzero(full) * 2).reshape(-1, n)
        begun = int(flat.start[-1]) // n
        beyond = int(full[-1]) - min(max(0, room // n - begun), int(full[-1]))
        inside = len(samples) - beyond
        self._full[self._samples : self._samples + inside] = samples[:inside]
        self._samples += inside
        full[-1] -= beyond
        first = int(full[-1])  # of those of the last document that are beyond the window
        full[0] += self._open_full
        ended, open_row = len(batch) - batch.open, slice(len(batch) - batch.open, None)
        self._open_full = int(full[open_row].sum())
        self._held = runs.take(np.arange(len(batch))[open_row] * 2 + 1)
        self._keep(runs.take(np.flatnonzero(rest[:ended]) * 2 + 1))
        self._parts.append(
            _Documents(
                Ended(
                    batch.ordinal[:ended],
                    batch.doc_ids[:ended],
                    batch.source[:ended],
                    batch.offset[:ended],
                    (flat.start + flat.length)[:ended],
                    np.zeros(ended, np.int64),
                    (flat.start + flat.length > n)[:ended],
                    batch.cut_off[:ended],
                ),
                full[:ended],
            )
        )
        if beyond:
            segments = np.empty(beyond, SEGMENT)
            segments["document"] = batch.ordinal[-1]
            segments["start"] = int(flat.start[-1]) + (first + np.arange(beyond)) * n
            segments["length"] = n
            segments["sample"] = np.arange(beyond)
            number = self.samples
            self.samples += beyond
            nothing = self._parts[-1].ended.where(np.zeros(ended, bool))
            yield Packed(number, samples[inside:].copy(), segments, nothing, self._state())

    def _keep(self, ids: Ids) -> None:
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
        window = _Window(self._parts, n, self._most, self._seed, self._first[0])
        runs = Runs(self._pieces[: self._filled], np.concatenate([[0], np.cumsum(window.rest)]))
        state = self._state(base + window.count, behind)
        step = max(1, CHUNK // n)
        for low in range(0, max(window.count, 1), step):
            high = min(low + step, window.count)
            segments, pieces = window.segments(low, high)
            is_full = window.at[low:high] < window.full
            used = np.bincount(segments["sample"], segments["length"], high - low).astype(np.int64)
            ids = np.empty((high - low, n), self._pieces.dtype)
            ids[is_full] = self._full[window.at[low:high][is_full]]
            ids[~is_full] = padded(runs.take(pieces), used[~is_full], n, self._pad, self._side)
            self.samples = base + high
            yield Packed(base + low, ids, segments, window.ended(low, high, base), state)
        self._begin()

    def flush(self) -> Iterator[Packed]:
        """The samples of the last window, which the end of the input closes."""
        if self._first:
            yield from self._close()

    def finish(self) -> Remainder:
        return Remainder(np.empty(0, self._pieces.dtype), np.empty(0, SEGMENT))


class _Documents(NamedTuple):
    """Documents that ended in a window, and how many of the full samples of each are in it."""

    ended: Ended
    full: Ids


class _Window:
    """Where a window's documents went: `count` samples, of which number k is full one `at[k]` of those that long
    documents filled, in order, or, from `full` on, one of those that hold the ends; `rest` are the ends' lengths.
    """

    def __init__(self, parts: list[_Documents], n: int, most: int | None, seed: int, ordinal: int) -> None:
        self._n = n
        self._documents = _all([part.ended for part in parts])
        self._full = np.concatenate([part.full for part in parts])
        self._stops = np.cumsum(self._full)  # of each document's full samples
        ends = self._documents.length % n
        self._rows = np.flatnonzero(ends)  # the documents with an end
        self.rest = ends[self._rows]
        bins, opened = assign(self.rest, n, most)
        self._order = _ordered(bins)  # the ends, bin by bin
        self._sizes = np.bincount(bins, minlength=opened)
        self._begins = np.cumsum(self._sizes) - self._sizes
        self.full = int(self._full.sum())
        self.count = self.full + opened
        place = permutation(self.count, seed, ordinal, "bins")
        self.at = np.empty_like(place)
        self.at[place] = np.arange(self.count)
        self._last = self._last_samples(place, bins)
        self._by_last = _ordered(self._last + 1)

    def _last_samples(self, place: Ids, bins: Ids) -> Ids:
        """The last sample that has ids of each document; -1 if they are all before the window, 0 if it has none."""
        length, some = self._documents.length, self._full > 0
        last = np.where(length > 0, -1, 0)
        last[self._rows] = place[self.full + bins]
        if some.any():
            latest = np.maximum.reduceat(place[: self.full], (self._stops - self._full)[some])
            last[some] = np.maximum(last[some], latest)
        return last

    def segments(self, low: int, high: int) -> tuple[Ids, Ids]:
        """(segments of the samples from `low` to before `high`, the ends among them), sample by sample."""
        at = self.at[low:high]
        is_full = at < self.full
        counts = np.ones(len(at), np.int64)
        counts[~is_full] = self._sizes[at[~is_full] - self.full]
        sample = np.repeat(np.arange(len(at)), counts)
        number, full = at[sample], is_full[sample]
        nth = np.arange(len(sample)) - (np.cumsum(counts) - counts)[sample]
        pieces = self._order[self._begins[number[~full] - self.full] + nth[~full]]
        row = np.empty(len(sample), np.int64)
        row[full] = np.searchsorted(self._stops, number[full], side="right")
        row[~full] = self._rows[pieces]
        segments = np.empty(len(sample), SEGMENT)
        segments["document"] = self._documents.ordinal[row]
        rest = self._documents.length[row] % self._n
        in_order = (number - (self._stops - self._full)[row]) * self._n
        segments["start"] = np.where(full, in_order, self._documents.length[row] - rest)
        segments["length"] = np.where(full, self._n, rest)
        segments["sample"] = sample
        return segments, pieces

    def ended(self, low: int, high: int, base: int) -> Ended:
        """The documents of which the samples from `low` to before `high` have the last ids, in their order; `base` is
        the number of the window's first sample."""
        last = self._last[self._by_last]
        bounds = np.searchsorted(last, [low if low else -1, high if high < self.count else self.count + 1])
        rows = self._by_last[bounds[0] : bounds[1]]
        found = self._documents.where(rows)
        found.last_sample = base + np.maximum(self._last[rows], 0)
        return found


def _all(parts: list[Ended]) -> Ended:
    names = [name for part in parts for name in part.doc_ids]

    def column(name: str) -> Ids:
        return np.concatenate([getattr(part, name) for part in parts])

    rest = (column(name) for name in ("source", "offset", "length", "last_sample", "split", "cut_off"))
    return Ended(column("ordinal"), names, *rest)
