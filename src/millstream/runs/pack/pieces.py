"""Pieces: what one task leaves for another, token ids or unpacked bytes, where no driver's hands touch it.

Whoever puts a piece gets a `Ref` of a few bytes, and hands that on. A piece is whole under its name or not there; what
a power cut made of it shows when it is read, and then it is made again.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np

from millstream.errors import RunError
from millstream.records import Ids, Ref, TokenBatch
from millstream.store import Store

_ENDING = ".piece"


class PieceLost(RunError):
    """A piece is missing, or is not what was put: the task that made it has to be done again. `name` is the piece's."""

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"the piece {name} {why}")
        self.name, self._why = name, why

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.name, self._why)


class Pieces(Protocol):
    """Where pieces lie. `put` the same piece twice, even at once, and the same bytes are there once."""

    @property
    def store(self) -> Store:
        """Where those lie that are files."""
        ...

    @property
    def lasting(self) -> "Pieces":
        """Where to put what cannot be made again by itself."""
        ...

    def put(self, name: str, chunks: Iterable[Any]) -> Ref: ...

    def get(self, ref: Ref) -> memoryview:
        """Its bytes. Raises PieceLost if they are not those that were put."""
        ...

    def has(self, ref: Ref) -> bool:
        """Whether a piece of this name and size is there."""
        ...

    def drop(self, ref: Ref) -> None: ...

    def turn(self) -> AbstractContextManager[None]:
        """Wait for one's turn among all workers of a machine, to do what only one of them may at once."""
        ...

    def sweep(self, keep: Collection[str]) -> None:
        """Delete all pieces but those of these names, and what killed writers left."""
        ...


@dataclass(frozen=True)
class StoredPieces:
    """Pieces in a store of their own, which is made when the first one is put.

    They are not made durable: after a power cut some are garbage, which `get` finds.
    """

    store: Store

    @property
    def lasting(self) -> "StoredPieces":
        return self

    def put(self, name: str, chunks: Iterable[Any]) -> Ref:
        from isal import isal_zlib

        size = crc = 0
        self.store.make()
        with self.store.write(name + _ENDING, brief=True) as file:
            for chunk in chunks:
                data = memoryview(chunk).cast("B")
                size, crc = size + len(data), isal_zlib.crc32(data, crc)
                file.write(data)
        return Ref(name, size, crc)

    def get(self, ref: Ref) -> memoryview:
        from isal import isal_zlib

        try:
            data = self.store.map(ref.name + _ENDING)
        except FileNotFoundError:
            raise PieceLost(ref.name, "is missing") from None
        if len(data) != ref.size or isal_zlib.crc32(data) != ref.crc:
            raise PieceLost(ref.name, "is damaged")
        return data

    def has(self, ref: Ref) -> bool:
        try:
            return self.store.size(ref.name + _ENDING) == ref.size
        except FileNotFoundError:
            return False

    def drop(self, ref: Ref) -> None:
        self.store.delete_file(ref.name + _ENDING)

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        self.store.make()
        with self.store.turn("turn"):
            yield

    def sweep(self, keep: Collection[str] = ()) -> None:
        if self.store.exists(""):
            self.store.sweep()
            for name in self.store.list():
                if name.endswith(_ENDING) and name.removesuffix(_ENDING) not in keep:
                    self.store.delete(name)

    def delete(self) -> None:
        """Delete all that is left, with the folder itself."""
        self.store.delete("")


class _Head(msgspec.Struct, array_like=True):
    """What a piece of token ids begins with, in `_HEAD` bytes: how many bytes its columns and its ids have, the ids'
    dtype, and whether the last row's document goes on. The columns, an Arrow stream, come first, and then the ids."""

    columns: int
    ids: int
    dtype: str
    open: bool


_HEAD = 64
_ALIGNED = 64


def as_chunks(batches: Sequence[TokenBatch]) -> tuple[TokenBatch, list[Any]]:
    """Batches that follow one another as one piece: (its rows, without their ids; the chunks to put).

    The ids are those of the batches as they lie, not copied. A document that goes on from one batch to the next is one
    row. Ordinals count from the piece's first document, and -1 is the one before it. `start` is not kept, as only
    whoever knows what comes before a piece can tell it.
    """
    import pyarrow as pa

    rows = joined(batches)
    columns = {
        "length": pa.array(rows.length, pa.uint32()),
        "ordinal": pa.array(rows.ordinal.astype(np.int64), pa.int32()),
        "id": pa.array(rows.doc_ids, pa.string()),
        "source": pa.array(rows.source, pa.uint32()),
        "offset": pa.array(rows.offset, pa.uint64()),
        "cut_off": pa.array(rows.cut_off, pa.int64()) if rows.cut_off.any() else pa.nulls(len(rows), pa.int64()),
    }
    made = pa.record_batch(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, made.schema) as writer:
        writer.write_batch(made)
    stream = sink.getvalue()
    ids = [np.ascontiguousarray(batch.ids) for batch in batches]
    head = _Head(len(stream), sum(each.nbytes for each in ids), ids[0].dtype.str, rows.open)
    padding = bytes(-len(stream) % _ALIGNED)
    return rows, [msgspec.msgpack.encode(head).ljust(_HEAD, b"\0"), stream, padding, *(each.data for each in ids)]


def batch_of(data: memoryview, first: int = 0, start: int = 0) -> TokenBatch:
    """The batch that `as_chunks` made `data` of, where the piece's first document has the ordinal `first` and `start`
    ids of the first row's document came before it; the ids are not copied.

    >>> row = np.arange(2)
    >>> batch = TokenBatch(np.arange(5, dtype=np.uint16), row + 2, row, row * 0, ["a", "b"], row, row, open=True)
    >>> _, chunks = as_chunks([batch])
    >>> found = batch_of(memoryview(b"".join(chunks)), first=7)
    >>> found.ids.tolist(), found.length.tolist(), found.doc_ids, found.ordinal.tolist(), found.open
    ([0, 1, 2, 3, 4], [2, 3], ['a', 'b'], [7, 8], True)
    """
    import pyarrow as pa

    head = msgspec.msgpack.decode(bytes(data[:_HEAD]).rstrip(b"\0"), type=_Head)
    with pa.ipc.open_stream(pa.py_buffer(data[_HEAD : _HEAD + head.columns])) as reader:
        made = reader.read_next_batch()

    def column(name: str) -> Ids:
        return made[name].to_numpy(zero_copy_only=False)  # type: ignore[no-any-return]

    starts = np.zeros(len(made), np.int64)
    starts[:1] = start
    return TokenBatch(
        ids=np.frombuffer(data[len(data) - head.ids :], head.dtype),
        length=column("length").astype(np.int64),
        ordinal=(column("ordinal") + np.int64(first)).astype(np.uint64),
        start=starts,
        doc_ids=made["id"].to_pylist(),
        source=column("source"),
        offset=column("offset"),
        open=head.open,
        cut_off=np.zeros(len(made), np.int64) if made["cut_off"].null_count else column("cut_off"),
    )


def joined(batches: Sequence[TokenBatch]) -> TokenBatch:
    """The rows of batches that follow one another, without their ids; a document that goes on is one row.

    >>> row = np.arange(2)
    >>> first = TokenBatch(np.arange(5), row + 2, row, row * 0, ["a", "b"], row, row, open=True)
    >>> more = TokenBatch(np.arange(4), row + 1, row + 1, np.array([3, 0]), ["b", "c"], row, row)
    >>> both = joined([first, more])
    >>> both.length.tolist(), both.doc_ids, both.ordinal.tolist(), both.start.tolist(), both.open
    ([2, 4, 2], ['a', 'b', 'c'], [0, 1, 2], [0, 0, 0], False)
    """
    goes_on = [False, *(before.open for before in batches[:-1])]
    first = np.cumsum([0, *(len(batch) for batch in batches)])[:-1]  # the row that each begins with
    keep = np.ones(sum(map(len, batches)), bool)
    keep[first[goes_on]] = False

    def column(name: str) -> Ids:
        whole: Ids = np.concatenate([getattr(batch, name) for batch in batches])
        return whole[keep]

    length = np.concatenate([batch.length for batch in batches])
    return TokenBatch(
        ids=batches[0].ids[:0],
        length=np.add.reduceat(length, np.flatnonzero(keep)),
        ordinal=column("ordinal"),
        start=column("start"),
        doc_ids=[name for batch, more in zip(batches, goes_on, strict=True) for name in batch.doc_ids[more:]],
        source=column("source"),
        offset=column("offset"),
        open=batches[-1].open,
        cut_off=column("cut_off"),
    )
