"""The samples of one subset of a corpus on their way into output shards, and where that can go on."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from millstream.folder.documents import DocumentTable
from millstream.folder.entries import RemainderEntry, ShardEntry, SubsetEntry
from millstream.folder.records import Mark as Mark
from millstream.folder.records import Resume, SealedShards
from millstream.folder.shards import Shape, ShardWriter, write_remainder
from millstream.records import LEARNED, TokenBatch
from millstream.stream.line import Line, Strategy
from millstream.stream.pack import Ended, Packed, State


class Sealed(NamedTuple):
    """An output shard that is written: its manifest entry, and the states from which it, and what follows it, is made;
    nothing follows where the subset ends with it."""

    entry: ShardEntry
    begin: State
    end: State | None


class Subset:
    """The samples of one subset (train, validation): its packers, its shards, and where it can go on.

    `state` is that of the line before the first sample that is in no sealed shard: `mark`, the reading side's state
    before a unit; `ordinal`, the first document from there on that has to be fed again; and what the line itself needs.

    It goes on behind the shards that an earlier run `found`, or from the `state` before shard number `first`; it is
    `full` once `count` shards are sealed, unless the last of these is the `final` one, which takes what is left.
    Several can write the same shards at once.
    """

    def __init__(
        self,
        name: str,
        folder: str,
        shape: Shape,
        strategy: Strategy,
        found: SealedShards | None = None,
        *,
        state: State | None = None,
        first: int = 0,
        count: int | None = None,
        final: bool = False,
    ) -> None:
        self.name, self.folder, self.shape = name, folder, shape
        self._earlier = found.entries if found else []
        self._number = first + len(self._earlier)
        self._stop = None if count is None else first + count
        self._final = self._stop - 1 if final and self._stop is not None else None
        self.sealed: list[Sealed] = []
        self.recorded = 0  # how many of them have a record
        self.state: State = state or (found.resume if found else Resume()).state
        self._begin: int = self.state["ordinal"]
        self.line = Line(strategy, np.dtype(np.uint32) if shape.masked else shape.dtype, self.state)
        self.writer: ShardWriter | None = None
        self.remainder: RemainderEntry | None = None
        self.rest: int | None = None  # about how many ids are still to come, where somebody can tell

    @property
    def shards(self) -> list[ShardEntry]:
        """The manifest entries of all that are sealed."""
        return [*self._earlier, *(sealed.entry for sealed in self.sealed)]

    @property
    def full(self) -> bool:
        return self._stop is not None and self._final is None and self._number >= self._stop

    def add(self, batch: TokenBatch, begin: Mark, end: Mark, ordinal: int) -> bool:
        """Pack a batch; whether a shard was sealed.

        Its documents are read from the mark `begin` on, those of the next batch from `end` on; `ordinal` is the next
        document's.
        """
        batch = batch.after(self._begin, 0)
        if not len(batch):
            return False

        def where(row: int) -> State:
            if row == len(batch):
                return {"mark": end, "ordinal": ordinal}
            return {"mark": begin, "ordinal": int(batch.ordinal[row])}

        return self._write(self.line.feed(batch, where))

    def _write(self, some: Iterable[Packed]) -> bool:
        """Write samples and documents, sealing shards as they fill; whether one was sealed."""
        before = len(self.sealed)
        for packed in some:
            left = packed
            while left.stop >= (bound := self._first + self.shape.per_shard):
                self._write_part(left.between(left.first, bound))
                self._seal(packed.state(bound))
                if self.full:
                    return True
                left = left.between(bound, packed.stop + 1)
            self._write_part(left)
        return len(self.sealed) > before

    @property
    def _first(self) -> int:
        """The number of the first sample in the shard that is written."""
        return self._number * self.shape.per_shard

    def _open(self) -> ShardWriter:
        if self.writer is None:
            fills = self._number != self._final
            if self.rest is not None:
                fills = self.rest >= self.shape.per_shard * self.shape.seq_len
            self.writer = ShardWriter(self.folder, self.name, self._number, self.shape, fills=fills)
        return self.writer

    def _write_part(self, packed: Packed) -> None:
        if len(packed.ids):
            segments = packed.segments.copy()
            segments["sample"] += np.uint32(packed.first - self._first)
            padding = packed.ids.size - int(segments["length"].sum())
            self._open().write(packed.ids, segments, padding)
        if len(packed.ended.ordinal):
            self._open().write_documents(_rows(packed.ended))

    def _seal(self, end: State | None) -> None:
        assert self.writer
        self.sealed.append(Sealed(self.writer.seal(), self.state, end))
        self.writer = None
        self._number += 1
        self.state = end or self.state

    def flush(self) -> None:
        """Write what was held back, at the end of the input."""
        self._write(self.line.flush())

    def finish(self, remainder: str, pad_id: int, pad_side: str) -> None:
        """Seal what is left; the ids that fill no sample are kept, padded or dropped."""
        self.flush()
        rest = self.line.finish()
        n = self.shape.seq_len
        learned = int((rest.ids >= LEARNED).sum()) if self.shape.masked else None
        self.remainder = RemainderEntry(remainder, len(rest.ids), learned)
        if len(rest.ids):
            segments = rest.segments.copy()
            segments["sample"] = self.line.packer.samples - self._first
            if remainder == "pad":
                row = np.full((1, n), pad_id, rest.ids.dtype)
                left = n - len(rest.ids) if pad_side == "left" else 0
                row[0, left : left + len(rest.ids)] = rest.ids
                self._open().write(row, segments, n - len(rest.ids))
            elif remainder == "keep":
                self._open().write_segments(segments)
                self.remainder = write_remainder(self.folder, self.name, self.remainder, rest.ids, self.shape)
        if self.writer:
            self._seal(None)

    def close(self) -> None:
        if self.writer:
            self.writer.close()

    def entry(self) -> SubsetEntry:
        """For the manifest, once it is finished."""
        assert self.remainder
        return SubsetEntry(self.shards, self.remainder)


def _rows(ended: Ended) -> DocumentTable:
    columns = (ended.source, ended.offset, ended.length, ended.split, ended.cut_off)
    return DocumentTable(ended.ordinal, ended.doc_ids, *columns)
