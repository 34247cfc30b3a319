"""Packers: batches of token ids in, samples of exactly `seq_len` ids out, with at most one remainder.

The strategies differ in what happens to a document:

* `Concat` joins all documents and cuts every `seq_len` ids: the order is kept, nothing is padded, documents are cut.
* `Split` cuts each document every `seq_len` ids and pads the last piece: the baseline packing is compared with.
* `BestFit` (in `bestfit`) cuts only what is longer than a sample, and places the rest so that little is padded.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

from millstream.records import SEGMENT, Ids, TokenBatch

State = dict[str, Any]
Where = Callable[[int], State]
"""`where(row)`: what whoever feeds a batch needs to read on from its row number `row`, or behind its last one."""

CHUNK = 1 << 18
"""Ids that are copied out of a window at once."""
LEAST = 128
"""A shorter document counts as so many ids in a window: what is kept of a document besides its ids costs memory too."""


def nowhere(row: int) -> State:
    return {}


def weight(length: Ids) -> Ids:
    """What documents of so many ids count for in a window.

    >>> weight(np.array([0, 127, 128, 5000])).tolist()
    [128, 128, 128, 5000]
    """
    return np.maximum(length, LEAST)


class HasLengths(Protocol):
    """What decides how documents are packed: their lengths, without the ids. See `TokenBatch`, which is such."""

    length: Ids
    start: Ids
    ordinal: Ids
    open: bool

    def __len__(self) -> int: ...


def continued(where: State, used: int, samples: int, number: int) -> State:
    """The state from which sample `number` comes next: read on from `where` without the first `used` ids, pack with
    `samples` samples before that, and drop those before `number`."""
    return {**where, "used": used, "samples": samples, "drop": number - samples}


@dataclass(slots=True)
class Ended:
    """Documents that have ended, in columns.

    `length` in ids; `last_sample`: the number of the sample with the document's last id (with the next id for an empty
    document); `split`: whether its ids are in more than one sample; `cut_off`: how many more it had than a sample.
    """

    ordinal: Ids
    doc_ids: list[str]
    source: Ids
    offset: Ids
    length: Ids
    last_sample: Ids
    split: Ids
    cut_off: Ids

    def where(self, mask: Ids) -> "Ended":
        """The rows that a mask, or a list of row numbers, chooses."""
        numbers = (self.source, self.offset, self.length, self.last_sample, self.split, self.cut_off)
        return Ended(self.ordinal[mask], take_names(self.doc_ids, mask), *(column[mask] for column in numbers))


def take_names(names: list[str], chosen: Ids) -> list[str]:
    """`names[chosen]`, as numpy would index it."""
    return [names[row] for row in np.arange(len(names))[chosen].tolist()]


@dataclass(slots=True)
class Packed:
    """Samples that became complete, in order, and the documents of which no sample will hold any more.

    `ids` (samples, seq_len), of which the first is sample number `first`; `segments` (of `SEGMENT`, in order of
    `sample`, which counts from `first`). `state(number)`, for first < number <= stop, is the state of the stream before
    sample `number`.
    """

    first: int
    ids: Ids
    segments: Ids
    ended: Ended
    state: Callable[[int], State]

    @property
    def stop(self) -> int:
        """The number of the sample after the last."""
        return self.first + len(self.ids)

    def between(self, low: int, high: int) -> "Packed":
        """The samples with numbers from `low` to before `high`, and the documents whose last one is among these."""
        begin, end = (min(max(number - self.first, 0), len(self.ids)) for number in (low, high))
        last = self.ended.last_sample
        inside = (last >= low) & (last < high)
        if begin == 0 and end == len(self.ids) and inside.all():
            return self
        bounds = np.searchsorted(self.segments["sample"], [begin, end])
        segments = self.segments[bounds[0] : bounds[1]].copy()
        segments["sample"] -= np.uint32(begin)
        return Packed(self.first + begin, self.ids[begin:end], segments, self.ended.where(inside), self.state)


@dataclass(slots=True)
class Remainder:
    """The ids that fill no sample, fewer than `seq_len`, and their segments."""

    ids: Ids
    segments: Ids


class Packer(Protocol):
    """`feed` every batch, `flush` what was held back, `finish` with the remainder; `samples` have come out so far."""

    seq_len: int
    samples: int

    def feed(self, batch: TokenBatch, where: Where = nowhere) -> Iterator[Packed]: ...

    def flush(self) -> Iterator[Packed]: ...

    def finish(self) -> Remainder: ...


class Concat:
    """Join documents, cut every `seq_len` ids.

    All the state there is: fewer than `seq_len` ids and the segments they belong to.

    >>> import numpy as np
    >>> packer, row = Concat(2, np.dtype(np.uint32)), np.arange(3)
    >>> ids, lengths = np.array([1, 2, 3, 4, 5]), np.array([3, 0, 2])
    >>> batch = TokenBatch(ids, lengths, row, row * 0, ["a", "b", "c"], row, row)
    >>> [packed.ids.tolist() for packed in packer.feed(batch)]
    [[[1, 2], [3, 4]]]
    >>> packer.finish().ids.tolist()
    [5]
    """

    def __init__(self, seq_len: int, dtype: "np.dtype[Any]", samples: int = 0) -> None:
        self.seq_len = seq_len
        self.samples = samples
        self._ids = np.empty(seq_len, dtype)
        self._filled = 0
        self._segments = np.empty(0, SEGMENT)
        self._open_first = -1  # the sample in which the document that goes on began; -1: one handed out before

    def feed(self, batch: TokenBatch, where: Where = nowhere) -> Iterator[Packed]:
        n = self.seq_len
        at = SamplePlaces.joined(batch.length, self._filled, n)
        segments = self._with_held(_cut(batch, at, n))
        complete = (self._filled + len(batch.ids)) // n
        done = segments["sample"] < complete
        last = at.last + self.samples
        ended = _ended(batch, last, self._split(batch, at.first + self.samples, last))
        ids, number = self._copy(batch.ids, complete), self.samples
        self._segments = segments[~done]
        self._segments["sample"] = 0
        self.samples += complete
        yield Packed(number, ids, segments[done], ended, states(batch, where, at, number, n))

    def _split(self, batch: TokenBatch, first: Ids, last: Ids) -> Ids:
        if not len(batch):
            return np.zeros(0, bool)
        begin = first.copy()
        if batch.start[0]:
            begin[0] = self._open_first
        self._open_first = int(begin[-1]) if batch.open else -1
        moved: Ids = begin != last
        return moved

    def _copy(self, ids: Ids, complete: int) -> Ids:
        n, held = self.seq_len, self._filled
        out = np.empty((complete, n), self._ids.dtype)
        used = 0
        if complete:
            flat = out.reshape(-1)
            flat[:held] = self._ids[:held]
            used = complete * n - held
            flat[held:] = ids[:used]
            held = 0
        self._filled = held + len(ids) - used
        self._ids[held : self._filled] = ids[used:]
        return out

    def _with_held(self, segments: Ids) -> Ids:
        held = self._segments
        if not len(held) or not len(segments):
            return segments if len(segments) else held
        end, begin = held[-1], segments[0]
        if end["document"] == begin["document"] and begin["sample"] == 0:
            begin["start"] = end["start"]
            begin["length"] += end["length"]
            held = held[:-1]
        return np.concatenate([held, segments])

    def flush(self) -> Iterator[Packed]:
        return iter(())

    def finish(self) -> Remainder:
        return Remainder(self._ids[: self._filled].copy(), self._segments)


class Split:
    """Cut each document every `seq_len` ids; every piece is one sample, padded.

    >>> import numpy as np
    >>> packer, row = Split(2, np.dtype(np.uint32), pad_id=9), np.arange(3)
    >>> ids, lengths = np.array([1, 2, 3, 4, 5]), np.array([3, 0, 2])
    >>> batch = TokenBatch(ids, lengths, row, row * 0, ["a", "b", "c"], row, row)
    >>> [packed.ids.tolist() for packed in packer.feed(batch)]
    [[[1, 2], [3, 9], [4, 5]]]
    """

    def __init__(
        self, seq_len: int, dtype: "np.dtype[Any]", pad_id: int = 0, pad_side: str = "right", samples: int = 0
    ) -> None:
        self.seq_len = seq_len
        self.samples = samples
        self._pad, self._side = pad_id, pad_side
        self._dtype = dtype
        self._held = np.empty(0, dtype)  # the unfinished piece of a document that goes on

    def feed(self, batch: TokenBatch, where: Where = nowhere) -> Iterator[Packed]:
        if not len(batch):
            return
        n = self.seq_len
        flat = joined(self._held, batch)
        at, keep = split_up(flat, n)
        kept = len(flat.ids) - keep
        self._held = flat.ids[kept:].astype(self._dtype)
        segments = _cut(flat, at, n)
        ids = padded(flat.ids[:kept], segments["length"], n, self._pad, self._side)
        ended = _ended(batch, at.last + self.samples, (flat.start > 0) | (flat.length > n))
        number = self.samples
        self.samples += len(ids)
        yield Packed(number, ids, segments, ended, states(flat, where, at, number, n))

    def flush(self) -> Iterator[Packed]:
        return iter(())

    def finish(self) -> Remainder:
        return Remainder(self._held, np.empty(0, SEGMENT))


def joined(held: Ids, batch: TokenBatch) -> TokenBatch:
    """`batch` with the ids `held` back from the document that goes on put before its first row; columns are copies."""
    length, start = with_held(len(held), batch.length, batch.start)
    ids = np.concatenate([held, batch.ids]) if len(held) else batch.ids
    return replace(batch, ids=ids, length=length, start=start)


def with_held(held: int, length: Ids, start: Ids) -> tuple[Ids, Ids]:
    """`length` and `start` of rows, the first of which has so many ids more, as they were held back; copies."""
    length, start = length.copy(), start.copy()
    if held:
        length[0] += held
        start[0] -= held
    return length, start


class SamplePlaces(NamedTuple):
    """Where rows lie in a stream that is cut every n ids: from `starts` to `stops`, in the samples `first` to `last`.

    An empty one is in the sample of the next id.
    """

    starts: Ids
    stops: Ids
    first: Ids
    last: Ids

    @classmethod
    def of(cls, starts: Ids, length: Ids, n: int) -> "SamplePlaces":
        stops = starts + length
        return cls(starts, stops, starts // n, np.maximum(stops - 1, starts) // n)

    @classmethod
    def joined(cls, length: Ids, before: int, n: int) -> "SamplePlaces":
        """Those of rows that lie one behind the other, from `before` on.

        >>> SamplePlaces.joined(np.array([3, 0, 2]), 1, 4).last.tolist()
        [0, 1, 1]
        """
        stops = np.cumsum(length) + before
        return cls.of(stops - length, length, n)


def split_up(rows: HasLengths, n: int) -> tuple[SamplePlaces, int]:
    """(the places of rows of which each begins with a new sample, how many ids of an open one fill none).

    These are taken off its length.

    >>> row = np.arange(2)
    >>> batch = TokenBatch(np.arange(8), np.array([3, 5]), row, row * 0, ["a", "b"], row, row, open=True)
    >>> places, left = split_up(batch, 4)
    >>> places.starts.tolist(), batch.length.tolist(), left
    ([0, 4], [3, 4], 1)
    """
    left = int(rows.length[-1]) % n if rows.open else 0
    rows.length[-1] -= left
    pieces = -(-rows.length // n)
    # A virtual position in which every document begins with a new sample makes this the case of `Concat`.
    return SamplePlaces.of((np.cumsum(pieces) - pieces) * n, rows.length, n), left


def padded(ids: Ids, used: Ids, n: int, pad_id: int, pad_side: str) -> Ids:
    """Samples of n ids, of which number k holds the next `used[k]` of `ids`; the rest is padding.

    >>> padded(np.array([1, 2, 3]), np.array([2, 1]), 2, 0, "left").tolist()
    [[1, 2], [0, 3]]
    """
    if len(ids) == len(used) * n:
        return ids.reshape(-1, n).copy()
    out = np.full((len(used), n), pad_id, ids.dtype)
    column, size = np.arange(n), used.astype(np.int64)[:, None]
    out[column >= n - size if pad_side == "left" else column < size] = ids
    return out


def _ended(batch: TokenBatch, last_sample: Ids, split: Ids) -> Ended:
    """The documents that end in a batch, which are all but an open one."""
    end = len(batch) - batch.open
    names = batch.doc_ids[:end] if batch.open else batch.doc_ids
    length = (batch.start + batch.length)[:end]
    columns = (batch.ordinal[:end], names, batch.source[:end], batch.offset[:end])
    return Ended(*columns, length, last_sample[:end], split[:end], batch.cut_off[:end])


def states(rows: HasLengths, where: Where, at: SamplePlaces, first: int, n: int) -> Callable[[int], State]:
    """`Packed.state` where nothing is held back, and the rows lie `at` these places from sample `first` on."""

    def state(number: int) -> State:
        row = int(np.searchsorted(at.last[: len(rows) - rows.open], number - first))
        used = 0
        if row < len(rows):
            used = int(rows.start[row]) + max(0, (number - first) * n - int(at.starts[row]))
        return continued(where(row), used, number, number)

    return state


def _cut(batch: TokenBatch, at: SamplePlaces, n: int) -> Ids:
    """The segments of documents at these places of a stream that is cut every `n` ids."""
    counts = np.where(batch.length > 0, at.last - at.first + 1, 0)
    row = np.repeat(np.arange(len(counts)), counts)
    sample = at.first[row] + np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
    begin = np.maximum(at.starts[row], sample * n)
    end = np.minimum(at.stops[row], (sample + 1) * n)
    segments = np.empty(len(row), SEGMENT)
    segments["document"] = batch.ordinal[row]
    segments["start"] = batch.start[row] + (begin - at.starts[row])
    segments["length"] = end - begin
    segments["sample"] = sample
    return segments


class IdRuns:
    """Runs of ids that lie one behind the other, to be copied out in another order: the k-th is
    ids[bounds[k]:bounds[k + 1]].

    >>> IdRuns(np.array([1, 2, 3, 4], np.uint16), np.array([0, 2, 3, 4])).take(np.array([2, 0])).tolist()
    [4, 1, 2]
    """

    def __init__(self, ids: Ids, bounds: Ids) -> None:
        import pyarrow as pa

        self._dtype = ids.dtype
        # Binary values are copied whole, several times faster than numpy gathers single ids.
        buffers = [None, pa.py_buffer(bounds.astype(np.int64) * ids.itemsize), pa.py_buffer(np.ascontiguousarray(ids))]
        self._values = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(bounds) - 1, buffers)

    def take(self, chosen: Ids) -> Ids:
        """The ids of the chosen runs, joined; read only."""
        if not len(chosen):
            return np.empty(0, self._dtype)
        _, bounds, data = self._values.take(chosen).buffers()
        size = int(np.frombuffer(bounds, np.int64)[len(chosen)])
        return np.frombuffer(data, self._dtype, size // self._dtype.itemsize)
