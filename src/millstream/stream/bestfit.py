"""Best-fit packing: documents are put into samples whole, longest first, each where it leaves the least room."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from millstream.records import SEGMENT, Ids, TokenBatch
from millstream.stream.bins import assign, ordered
from millstream.stream.pack import (
    CHUNK,
    Ended,
    HasLengths,
    IdRuns,
    Packed,
    Remainder,
    State,
    Where,
    continued,
    nowhere,
    padded,
    weight,
    with_held,
)
from millstream.stream.shuffle import permutation

WINDOW = 32 << 20
"""Ids: samples of 2,048 are then filled to 99.99 % on long-tailed corpora."""


class Taken(NamedTuple):
    """Rows `low` to before `high` of a batch, as a window takes them; it `closes` behind them, or goes on.

    `length` and `start` of each row, with the ids that were held back of the document that goes on. Of its ids `full`
    samples are filled, of the last row's `beyond` more that are not the window's, and `rest` are left; those of an
    open document are held back.
    """

    low: int
    high: int
    closes: bool
    length: Ids
    start: Ids
    full: Ids
    rest: Ids
    beyond: int


class Windows:
    """Where best-fit's windows close, and which full samples long documents fill: told from lengths alone.

    A window closes at the end of the document with which it has `window` ids, by `weight`. What that document has
    beyond the window's ids is not the window's.

    >>> row = np.arange(3)
    >>> batch = TokenBatch(np.arange(900), np.array([200, 150, 550]), row, row * 0, [*"abc"], row, row)
    >>> for taken in Windows(100, 300).take(batch):
    ...     print(taken.low, taken.high, taken.closes, taken.full, taken.rest, taken.beyond)
    0 2 True [2 1] [ 0 50] 0
    2 3 True [3] [50] 2
    """

    def __init__(self, seq_len: int, window: int) -> None:
        self._n, self._window = seq_len, window
        self._weight = 0
        self._held = 0  # ids of the unfinished piece of a document that goes on

    def take(self, batch: HasLengths) -> Iterator[Taken]:
        """The batch in pieces, each for the window that is open then."""
        whole = (batch.start + batch.length)[: len(batch) - batch.open]
        weights = np.cumsum(weight(whole))
        low = counted = 0
        while low < len(batch):
            high = int(np.searchsorted(weights, self._window - self._weight + counted)) + 1
            closes = high <= len(weights)
            high = high if closes else len(batch)
            before = (int(weights[high - 2]) if high - low > 1 else counted) - counted
            yield self._taken(batch, low, high, closes=closes, room=self._window - self._weight - before)
            upto = int(weights[min(high, len(weights)) - 1]) if len(weights) else 0
            self._weight = 0 if closes else self._weight + upto - counted
            low, counted = high, upto

    def _taken(self, batch: HasLengths, low: int, high: int, *, closes: bool, room: int) -> Taken:
        """These rows, of which the last one has `room` ids in the window."""
        n = self._n
        length, start = with_held(self._held, batch.length[low:high], batch.start[low:high])
        full = length // n
        rest = length - full * n
        begun = int(start[-1]) // n
        beyond = int(full[-1]) - min(max(0, room // n - begun), int(full[-1]))
        full[-1] -= beyond
        self._held = int(rest[-1]) if batch.open and high == len(batch) else 0
        return Taken(low=low, high=high, closes=closes, length=length, start=start, full=full, rest=rest, beyond=beyond)


def states_within(where: State, samples: int, end: int = -1, behind: State | None = None) -> Callable[[int], State]:
    """`Packed.state` in a window that began at `where` with so many samples before it; `behind` it, which is where
    sample number `end` begins."""

    def state(number: int) -> State:
        if behind is not None and number == end:
            return continued(behind, 0, number, number)
        return continued(where, 0, samples, number)

    return state


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
        self._windows, self._most, self._seed = Windows(seq_len, window), max_segments, seed
        self._held = np.empty(0, dtype)  # the unfinished piece of a document that goes on
        self._open_full = 0  # full samples of it that are in the window
        # Ends from the front, full samples from the back; memory that is not written to is not used.
        self._pieces = np.empty(window + seq_len, dtype)
        self._full = self._pieces[len(self._pieces) % seq_len :].reshape(-1, seq_len)[::-1]
        self._begin()

    def _begin(self) -> None:
        self._filled = self._samples = 0
        self._parts: list[_Documents] = []
        self._first: tuple[int, State, int] | None = None  # document, its state, and samples before the window

    def feed(self, batch: TokenBatch, where: Where = nowhere) -> Iterator[Packed]:
        for taken in self._windows.take(batch):
            if self._first is None:
                self._first = (int(batch.ordinal[taken.low]), where(taken.low), self.samples)
            yield from self._take(batch.rows(taken.low, taken.high), taken)
            if taken.closes:
                yield from self._close(where(taken.high))

    def _take(self, batch: TokenBatch, taken: Taken) -> Iterator[Packed]:
        """Take documents into the window; the last one's full samples beyond that."""
        assert self._first
        n, beyond, rest, full = self.seq_len, taken.beyond, taken.rest, taken.full
        ended, open_row = len(batch) - batch.open, slice(len(batch) - batch.open, None)
        all_full = taken.length // n
        ids = np.concatenate([self._held, batch.ids]) if len(self._held) else batch.ids
        runs = IdRuns(ids, np.concatenate([[0], np.cumsum(np.stack([all_full * n, rest], axis=1))]))
        samples = runs.take(np.flatnonzero(all_full) * 2).reshape(-1, n)
        inside = len(samples) - beyond
        self._full[self._samples : self._samples + inside] = samples[:inside]
        self._samples += inside
        first = int(full[-1])  # of those of the last document that are beyond the window
        full[0] += self._open_full
        self._open_full = int(full[open_row].sum())
        self._held = runs.take(np.arange(len(batch))[open_row] * 2 + 1)
        self._keep(runs.take(np.flatnonzero(rest[:ended]) * 2 + 1))
        self._parts.append(
            _Documents(
                Ended(
                    ordinal=batch.ordinal[:ended],
                    doc_ids=batch.doc_ids[:ended],
                    source=batch.source[:ended],
                    offset=batch.offset[:ended],
                    length=(taken.start + taken.length)[:ended],
                    last_sample=np.zeros(ended, np.int64),
                    split=(taken.start + taken.length > n)[:ended],
                    cut_off=batch.cut_off[:ended],
                ),
                full[:ended],
            )
        )
        if beyond:
            segments = np.empty(beyond, SEGMENT)
            segments["document"] = batch.ordinal[-1]
            segments["start"] = int(taken.start[-1]) + (first + np.arange(beyond)) * n
            segments["length"] = n
            segments["sample"] = np.arange(beyond)
            number = self.samples
            self.samples += beyond
            nothing = self._parts[-1].ended.where(np.zeros(ended, bool))
            yield Packed(number, samples[inside:].copy(), segments, nothing, states_within(*self._first[1:]))

    def _keep(self, ids: Ids) -> None:
        self._pieces[self._filled : self._filled + len(ids)] = ids
        self._filled += len(ids)

    def _close(self, behind: State | None = None) -> Iterator[Packed]:
        """Place the window's pieces and hand out its samples, a chunk at a time; `behind` is the next one's state."""
        assert self._first
        n, base = self.seq_len, self.samples
        window = _Window(self._parts, n, self._most, self._seed, self._first[0])
        runs = IdRuns(self._pieces[: self._filled], np.concatenate([[0], np.cumsum(window.rest)]))
        state = states_within(*self._first[1:], base + window.count, behind)
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
        self._order = ordered(bins)  # the ends, bin by bin
        self._sizes = np.bincount(bins, minlength=opened)
        self._begins = np.cumsum(self._sizes) - self._sizes
        self.full = int(self._full.sum())
        self.count = self.full + opened
        place = permutation(self.count, seed, ordinal, "bins")
        self.at = np.empty_like(place)
        self.at[place] = np.arange(self.count)
        self._last = self._last_samples(place, bins)
        self._by_last = ordered(self._last + 1)

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
