"""The plain data that flows through millstream: documents, batches, faults.

Data moves in columns: one object a batch, never one a document or a token, on the hot path. `Document`, and `Sample` in
samples.py, are the faces that the Python API shows of one row.
"""

from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[Any]

SEGMENT = np.dtype([("document", "<u8"), ("start", "<u8"), ("length", "<u4"), ("sample", "<u4")])
"""One segment: `length` ids of `document` (its ordinal), from the document's id number `start`, in `sample`."""


LEARNED = 1 << 31
"""In fine-tuning data, the bit of an id (u32) that is set if it is to be learned: it goes wherever its id goes."""


def ids_and_learned(ids: Ids, dtype: "np.dtype[Any]") -> tuple[Ids, Ids]:
    """(the ids themselves, whether each is to be learned).

    >>> ids_and_learned(np.array([7, 8 | LEARNED], np.uint32), np.dtype(np.uint16))
    (array([7, 8], dtype=uint16), array([False,  True]))
    """
    return (ids & np.uint32(LEARNED - 1)).astype(dtype), ids >= LEARNED


class LearnedIds(np.ndarray[Any, Any]):
    """Ids of one conversation, with `learned` (bool): which of them are to be learned.

    Whatever is made of it, as a part or a copy, does not know that: there `learned` is None.

    >>> ids = LearnedIds.of(np.array([7, 8], np.uint16), np.array([False, True]))
    >>> ids.tolist(), ids.learned.tolist(), ids[:1].learned
    ([7, 8], [False, True], None)
    """

    learned: Ids | None

    @classmethod
    def of(cls, ids: Ids, learned: Ids) -> "LearnedIds":
        found = ids.view(cls)
        found.learned = learned
        return found

    def __array_finalize__(self, made_of: object) -> None:
        self.learned = None

    def __reduce__(self) -> Any:
        return (LearnedIds.of, (np.asarray(self), self.learned)) if self.learned is not None else super().__reduce__()


def with_learned(ids: Ids, learned: Ids) -> Ids:
    """Ids that `ids_and_learned` takes apart.

    >>> with_learned(np.array([7, 8], np.uint16), np.array([False, True])).tolist() == [7, 8 | LEARNED]
    True
    """
    return np.asarray(ids).astype(np.uint32) | (learned.astype(np.uint32) << np.uint32(31))


class Document(NamedTuple):
    """One text with its id, as read."""

    id: str
    text: str


class DocumentFault(NamedTuple):
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


class Cursor(NamedTuple):
    """Where reading goes on: input shard number `source`, decompressed byte (or row) `offset`.

    `prefix` identifies what lies before `offset` in a shard that cannot be sought: SHA-256 of those bytes.
    """

    source: int = 0
    offset: int = 0
    prefix: str | None = None


class Seen(NamedTuple):
    """What a run has read of input shard number `source`: the SHA-256 of its content from `start` to `stop`, which are
    decompressed bytes, or rows."""

    source: int
    start: int
    stop: int
    sha256: str


class Range(msgspec.Struct, frozen=True):
    """What begins from `start` to before `stop` (None: to the end) in input shard number `source`: lines or cuts of a
    text, by decompressed bytes, or rows of a Parquet file. From 0 to 0 a text is only checked."""

    source: int
    start: int = 0
    stop: int | None = None


class Ref(msgspec.Struct, frozen=True):
    """A piece where pieces are kept: its name, how many bytes it has, and their CRC-32."""

    name: str
    size: int
    crc: int


@dataclass(frozen=True)
class Part:
    """What one worker tokenizes at once: the documents that begin in `ranges`, or the first `limit` of them.

    Parts are numbered in the order of the corpus. `data` is a piece that has their bytes, unpacked. `fault` stands in
    for a document that was found to be unusable when its neighbours were unpacked: (reason, message). `prefix` is that
    of a cursor at the end of the range, where others have unpacked it.
    """

    number: int
    ranges: tuple[Range, ...]
    data: Ref | None = None
    limit: int | None = None
    fault: tuple[str, str] | None = None
    prefix: str | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """A piece of one input shard that is decoded without its neighbours.

    `start` and `stop` are decompressed bytes, or rows of a Parquet file. `data`: the bytes, or the rows in a record
    batch or in Arrow's stream of one; None where a worker can read the bytes itself. `begins` and `ends` tell whether
    the document of a plain text file begins or ends here. `fault` stands in for what could not be read: (reason,
    message), one faulty document. `after` is where reading goes on, `seen` what has been read of the input shard by
    then.
    """

    source: int
    uri: str
    name: str
    kind: str
    start: int
    stop: int
    data: Any = None
    begins: bool = True
    ends: bool = True
    fault: tuple[str, str] | None = None
    after: "Cursor" = field(default_factory=lambda: Cursor())
    seen: Seen | None = None

    @property
    def size(self) -> int:
        if self.data is None:
            return self.stop - self.start
        return len(self.data) if isinstance(self.data, bytes) else int(self.data.nbytes)


@dataclass(slots=True)
class TextBatch:
    """Documents as read, in columns; exactly one of `texts` (or what was made of rows instead) and `ids` is filled.

    `position` numbers documents and faults together, from 0 in this batch; `opened` tells that the first row goes on
    with the document before it (then its position is -1), `open` that the last row goes on in the next batch. `lines`
    has (source, lines read) for each slice.
    """

    texts: list[Any] = field(default_factory=list)
    ids: list[Ids] = field(default_factory=list)
    doc_ids: list[str] = field(default_factory=list)
    position: list[int] = field(default_factory=list)
    source: list[int] = field(default_factory=list)
    offset: list[int] = field(default_factory=list)
    faults: list[DocumentFault] = field(default_factory=list)
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
    `cut_off` i64 (rows,): how many ids of the document are left out, since it has more than a sample.
    """

    ids: Ids
    length: Ids
    ordinal: Ids
    start: Ids
    doc_ids: list[str]
    source: Ids
    offset: Ids
    open: bool = False
    cut_off: Ids = field(default_factory=lambda: np.zeros(0, np.int64))

    def __post_init__(self) -> None:
        if not len(self.cut_off):
            self.cut_off = np.zeros(len(self.length), np.int64)

    def __len__(self) -> int:
        return len(self.length)

    def rows(self, low: int, high: int) -> "TokenBatch":
        """Rows low..high, as views."""
        begin, end = int(self.length[:low].sum()), int(self.length[:high].sum())
        part = slice(low, high)
        return TokenBatch(
            ids=self.ids[begin:end],
            length=self.length[part],
            ordinal=self.ordinal[part],
            start=self.start[part],
            doc_ids=self.doc_ids[part],
            source=self.source[part],
            offset=self.offset[part],
            open=self.open and high == len(self),
            cut_off=self.cut_off[part],
        )

    def where(self, mask: npt.NDArray[np.bool_]) -> "TokenBatch":
        """The rows for which `mask` is true; copies."""
        return TokenBatch(
            ids=self.ids[np.repeat(mask, self.length)],
            length=self.length[mask],
            ordinal=self.ordinal[mask],
            start=self.start[mask],
            doc_ids=[name for name, keep in zip(self.doc_ids, mask.tolist(), strict=True) if keep],
            source=self.source[mask],
            offset=self.offset[mask],
            open=self.open and len(mask) > 0 and bool(mask[-1]),
            cut_off=self.cut_off[mask],
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
        return rest.without(used)

    def without(self, used: int) -> "TokenBatch":
        """All but those of the first row's ids that are among its document's first `used`."""
        length, start = not_used(used, self.length, self.start)
        return replace(self, ids=self.ids[int(start[0]) - int(self.start[0]) :], length=length, start=start)


def not_used(used: int, length: Ids, start: Ids) -> tuple[Ids, Ids]:
    """`length` and `start` of rows without those of the first one's ids that are among its document's first `used`.

    >>> not_used(5, np.array([4, 9]), np.array([3, 0]))
    (array([2, 9]), array([5, 0]))
    """
    drop = min(max(used - int(start[0]), 0), int(length[0]))
    length, start = length.copy(), start.copy()
    length[0] -= drop
    start[0] += drop
    return length, start
