"""The plain data that flows through millstream: documents, batches, samples, faults.

Data moves in columns: one object a batch, never one a document or a token, on the hot path. `Document` and `Sample` are
the faces that the Python API shows of one row.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[Any]

SEGMENT = np.dtype([("document", "<u8"), ("start", "<u8"), ("length", "<u4"), ("sample", "<u4")])
"""One segment: `length` ids of `document` (its ordinal), from the document's id number `start`, in `sample`."""


class Document(NamedTuple):
    """One text with its id, as read."""

    id: str
    text: str


class Fault(NamedTuple):
    """One document that could not be used, as data.

    `ordinal` counts documents in source order, `offset` is in decompressed bytes or rows, `line` from 1 (0: unknown).
    `shard` numbers the input shards, of which `source` is the name.
    """

    ordinal: int
    reason: str
    message: str
    source: str
    offset: int
    line: int
    id: str | None = None
    shard: int = 0

    @property
    def place(self) -> str:
        if self.line:
            return f"{self.source}, line {self.line}"
        return f"{self.source}, row {self.offset}" if self.offset else self.source


class Cursor(NamedTuple):
    """Where reading goes on: input shard number `source`, decompressed byte (or row) `offset`.

    `prefix` identifies what lies before `offset` in a shard that cannot be sought: SHA-256 of those bytes.
    """

    source: int = 0
    offset: int = 0
    prefix: str | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """A piece of one input shard that is decoded without its neighbours.

    `start` and `stop` are decompressed bytes, or rows of a Parquet file. `data` is None where a worker can read the
    bytes itself. `begins` and `ends` tell whether the document of a plain text file begins or ends here. `fault` stands
    in for what could not be read: (reason, message), one faulty document. `after` is where reading goes on.
    """

    source: int
    uri: str
    name: str
    kind: str
    start: int
    stop: int
    data: bytes | None = None
    begins: bool = True
    ends: bool = True
    fault: tuple[str, str] | None = None
    after: "Cursor" = field(default_factory=lambda: Cursor())

    @property
    def size(self) -> int:
        return self.stop - self.start if self.data is None else len(self.data)


@dataclass(slots=True)
class TextBatch:
    """Documents as read, in columns; exactly one of `texts` and `ids` is filled.

    `position` numbers documents and faults together, from 0 in this batch; `opened` tells that the first row goes on
    with the document before it (then its position is -1), `open` that the last row goes on in the next batch. `lines`
    has (source, lines read) for each slice.
    """

    texts: list[str] = field(default_factory=list)
    ids: list[Ids] = field(default_factory=list)
    doc_ids: list[str] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    count: int = 0
    lines: list[tuple[int, int]] = field(default_factory=list)
    opened: bool = False
    open: bool = False


@dataclass(slots=True)
class TokenBatch:
    """Documents as token ids: one flat array `ids` and, per row, how many of them are its own.

    `ordinal` u64 (rows,), `length` i64 (rows,), `start` i64 (rows,): how many ids of the document came before this row
    (not 0 where a long document is handed over in several batches, or where a resumed run dropped some). `open`: the
    last row's document goes on in the next batch. `doc_ids` has the documents' ids, `source` and `offset` their places.
    """

    ids: Ids
    length: Ids
    ordinal: Ids
    start: Ids
    doc_ids: list[str]
    source: Ids
    offset: Ids
    open: bool = False

    def __len__(self) -> int:
        return len(self.length)

    def rows(self, low: int, high: int) -> "TokenBatch":
        """Rows low..high, as views."""
        begin, end = int(self.length[:low].sum()), int(self.length[:high].sum())
        part = slice(low, high)
        return TokenBatch(
            self.ids[begin:end],
            self.length[part],
            self.ordinal[part],
            self.start[part],
            self.doc_ids[part],
            self.source[part],
            self.offset[part],
            self.open and high == len(self),
        )

    def where(self, mask: npt.NDArray[np.bool_]) -> "TokenBatch":
        """The rows for which `mask` is true; copies."""
        return TokenBatch(
            self.ids[np.repeat(mask, self.length)],
            self.length[mask],
            self.ordinal[mask],
            self.start[mask],
            [name for name, keep in zip(self.doc_ids, mask.tolist(), strict=True) if keep],
            self.source[mask],
            self.offset[mask],
            self.open and len(mask) > 0 and bool(mask[-1]),
        )

    def after(self, ordinal: int, used: int) -> "TokenBatch":
        """What follows the first `used` ids of document `ordinal`: the rest of that one and all later ones.

        >>> import numpy as np
        >>> row = np.arange(2)
        >>> batch = TokenBatch(np.arange(6), np.array([4, 2]), row, row * 0, ["a", "b"], row, row)
        >>> late = batch.after(0, 3)
        >>> late.ids.tolist(), late.length.tolist(), late.start.tolist()
        ([3, 4, 5], [1, 2], [3, 0])
        """
        if len(self) == 0 or (int(self.ordinal[0]) >= ordinal and not used):
            return self
        low = int(np.searchsorted(self.ordinal, np.uint64(ordinal)))
        rest = self.rows(low, len(self))
        if not used or not len(rest) or int(rest.ordinal[0]) != ordinal:
            return rest
        drop = min(max(used - int(rest.start[0]), 0), int(rest.length[0]))
        length, start = rest.length.copy(), rest.start.copy()
        length[0] -= drop
        start[0] += drop
        rest.ids, rest.length, rest.start = rest.ids[drop:], length, start
        return rest


class Segment(NamedTuple):
    """One document's run inside one sample: `length` ids from the document's id number `start`."""

    document: int
    start: int
    length: int


@dataclass(frozen=True)
class Sample:
    """One training item of `seq_len` token ids (fewer only in a kept remainder: then `complete` is False).

    `segments` lists whose ids these are, in order; padding belongs to no segment. Three views of their lengths follow.

    >>> import numpy as np
    >>> s = Sample(np.array([7, 8, 9, 0]), (Segment(0, 5, 2), Segment(1, 0, 1)))
    >>> s.segment_ids.tolist(), s.position_ids.tolist(), s.cu_seqlens.tolist()
    ([1, 1, 2, 0], [0, 1, 0, 0], [0, 2, 3, 4])
    """

    token_ids: Ids
    segments: tuple[Segment, ...]
    complete: bool = True
    pad_left: int = 0

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def _runs(self) -> list[tuple[int, int]]:
        """(segment number or 0 for padding, length), in order, covering every id."""
        runs = [(0, self.pad_left)] if self.pad_left else []
        runs += [(number, segment.length) for number, segment in enumerate(self.segments, 1)]
        left = len(self.token_ids) - sum(length for _, length in runs)
        return [*runs, (0, left)] if left else runs

    @property
    def segment_ids(self) -> Ids:
        """int32 (N,): 1 for the first document's ids, 2 for the next, 0 for padding."""
        numbers, lengths = [n for n, _ in self._runs], [length for _, length in self._runs]
        return np.repeat(np.array(numbers, np.int32), lengths)

    @property
    def position_ids(self) -> Ids:
        """int32 (N,): from 0 in each segment, and 0 for padding."""
        parts = [np.arange(n, dtype=np.int32) if k else np.zeros(n, np.int32) for k, n in self._runs]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    @property
    def cu_seqlens(self) -> Ids:
        """int32: 0, the end of each segment, ... N; padding is a segment of its own here."""
        return np.concatenate([[0], np.cumsum([n for _, n in self._runs])]).astype(np.int32)
