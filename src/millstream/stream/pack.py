"""Packers: batches of token ids in, samples of exactly `seq_len` ids out, with at most one remainder.

Packing is all the state there is: fewer than `seq_len` ids and the segments they belong to. The strategies differ in
what happens to a document:

* `Concat` joins all documents and cuts every `seq_len` ids: the order is kept, nothing is padded, documents are cut.
* `Split` cuts each document every `seq_len` ids and pads the last piece: the baseline packing is compared with.
"""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from millstream.records import SEGMENT, Ids, TokenBatch


@dataclass(slots=True)
class Packed:
    """Samples that became complete, in order.

    `ids` (samples, seq_len); `segments` (of `SEGMENT`, in order of sample, `sample` counting from the packer's first);
    for each row of the batch that was fed, `last_sample`: the sample of the row's last id (of the next id for an empty
    document), and `split`: whether the document reaches into more than one sample; neither counts for a last row that
    is open. `padding`: ids that are none.
    """

    ids: Ids
    segments: Ids
    last_sample: Ids
    split: Ids
    padding: int = 0


@dataclass(slots=True)
class Remainder:
    """The ids that fill no sample, fewer than `seq_len`, and their segments."""

    ids: Ids
    segments: Ids


class Packer(Protocol):
    seq_len: int
    samples: int

    def feed(self, batch: TokenBatch) -> Packed: ...

    def finish(self) -> Remainder: ...


class Concat:
    """Join documents, cut every `seq_len` ids.

    >>> import numpy as np
    >>> packer, row = Concat(2, np.dtype(np.uint32)), np.arange(3)
    >>> ids, lengths = np.array([1, 2, 3, 4, 5]), np.array([3, 0, 2])
    >>> packer.feed(TokenBatch(ids, lengths, row, row * 0, ["a", "b", "c"], row, row)).ids.tolist()
    [[1, 2], [3, 4]]
    >>> packer.finish().ids.tolist()
    [5]
    """

    def __init__(self, seq_len: int, dtype: "np.dtype[Any]") -> None:
        self.seq_len = seq_len
        self.samples = 0
        self._ids = np.empty(seq_len, dtype)
        self._filled = 0
        self._segments = np.empty(0, SEGMENT)
        self._open_first = -1  # the sample in which the document that goes on began; -1: one handed out before

    def feed(self, batch: TokenBatch) -> Packed:
        n = self.seq_len
        stops = np.cumsum(batch.length) + (self.samples * n + self._filled)
        starts = stops - batch.length
        first, last = starts // n, np.maximum(stops - 1, starts) // n
        segments = self._with_held(_cut(batch, starts, stops, first, n))
        complete = (self._filled + len(batch.ids)) // n
        done = segments["sample"] < self.samples + complete
        split = self._split(batch, first, last)
        packed = Packed(self._copy(batch.ids, complete), segments[done], last, split)
        self._segments = segments[~done]
        self.samples += complete
        return packed

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
        if end["document"] == begin["document"] and end["sample"] == begin["sample"]:
            begin["start"] = end["start"]
            begin["length"] += end["length"]
            held = held[:-1]
        return np.concatenate([held, segments])

    def finish(self) -> Remainder:
        return Remainder(self._ids[: self._filled].copy(), self._segments)


class Split:
    """Cut each document every `seq_len` ids; every piece is one sample, padded.

    >>> import numpy as np
    >>> packer, row = Split(2, np.dtype(np.uint32), pad_id=9), np.arange(3)
    >>> ids, lengths = np.array([1, 2, 3, 4, 5]), np.array([3, 0, 2])
    >>> packer.feed(TokenBatch(ids, lengths, row, row * 0, ["a", "b", "c"], row, row)).ids.tolist()
    [[1, 2], [3, 9], [4, 5]]
    """

    def __init__(self, seq_len: int, dtype: "np.dtype[Any]", pad_id: int = 0, pad_side: str = "right") -> None:
        self.seq_len = seq_len
        self.samples = 0
        self._pad = pad_id
        self._left = pad_side == "left"
        self._dtype = dtype
        self._held = np.empty(0, dtype)  # the unfinished piece of a document that goes on

    def feed(self, batch: TokenBatch) -> Packed:
        n = self.seq_len
        if not len(batch):
            nothing = np.empty((0, n), self._dtype)
            return Packed(nothing, np.empty(0, SEGMENT), np.zeros(0, np.int64), np.zeros(0, bool))
        held = len(self._held)
        ids, lengths, offsets = batch.ids, batch.length.copy(), batch.start.copy()
        if held:
            ids = np.concatenate([self._held, ids])
            lengths[0] += held
            offsets[0] -= held
        keep = int(lengths[-1]) % n if batch.open else 0
        self._held = ids[len(ids) - keep :].astype(self._dtype)
        lengths[-1] -= keep
        pieces = -(-lengths // n)
        # A virtual position in which every document begins with a new sample makes this the case of `Concat`.
        starts = (np.cumsum(pieces) - pieces + self.samples) * n
        flat = TokenBatch(ids, lengths, batch.ordinal, offsets, batch.doc_ids, batch.source, batch.offset, batch.open)
        segments = _cut(flat, starts, starts + lengths, starts // n, n)
        total = int(pieces.sum())
        out = np.full((total, n), self._pad, self._dtype)
        column = np.arange(n)
        size = segments["length"].astype(np.int64)[:, None]
        out[column >= n - size if self._left else column < size] = ids[: len(ids) - keep]
        last = np.maximum(starts + lengths - 1, starts) // n
        split = (offsets > 0) | (pieces > 1)
        packed = Packed(out, segments, last, split, total * n - (len(ids) - keep))
        self.samples += total
        return packed

    def finish(self) -> Remainder:
        return Remainder(self._held, np.empty(0, SEGMENT))


def _cut(batch: TokenBatch, starts: Ids, stops: Ids, first: Ids, n: int) -> Ids:
    """The segments of documents at positions starts..stops of a stream that is cut every `n` ids."""
    counts = np.where(batch.length > 0, (stops - 1) // n - first + 1, 0)
    row = np.repeat(np.arange(len(counts)), counts)
    sample = first[row] + np.arange(len(row)) - (np.cumsum(counts) - counts)[row]
    begin = np.maximum(starts[row], sample * n)
    end = np.minimum(stops[row], (sample + 1) * n)
    segments = np.empty(len(row), SEGMENT)
    segments["document"] = batch.ordinal[row]
    segments["start"] = batch.start[row] + (begin - starts[row])
    segments["length"] = end - begin
    segments["sample"] = sample
    return segments
