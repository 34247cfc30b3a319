"""The samples of one subset of a corpus on their way into output shards, and where that can go on."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from millstream.formats.shards import Rows, Shape, ShardWriter, write_remainder
from millstream.records import LEARNED, Cursor, TokenBatch
from millstream.stream.line import Line, Strategy
from millstream.stream.pack import Ended, Packed, State


@dataclass(frozen=True)
class Mark:
    """The state of the reading side before a unit: what a resumed run goes on with.

    `ordinal`: documents read so far; `line`: of the input shard at `cursor`; `text_ids`, `special_ids`: as in the
    ledger; `fault_bytes`: how long faults.jsonl is; `bytes`: of input; `learned`: ids that are to be learned, and
    `learned_cut_off`, those of them that documents longer than a sample do not keep.
    """

    cursor: Cursor = field(default_factory=Cursor)
    ordinal: int = 0
    line: int = 0
    text_ids: int = 0
    special_ids: int = 0
    fault_bytes: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    learned: int = 0
    learned_cut_off: int = 0

    @classmethod
    def load(cls, found: dict[str, Any]) -> "Mark":
        return cls(**{**found, "cursor": Cursor(*found["cursor"])})


class Subset:
    """The samples of one subset (train, validation): its packers, its shards, and where it can go on.

    `state` is that of the line before the first sample that is in no sealed shard: `mark`, the reading side's state
    before a unit; `ordinal`, the first document from there on that has to be fed again; and what the line itself needs.
    """

    def __init__(
        self, name: str, folder: str, shape: Shape, strategy: Strategy, found: dict[str, Any] | None = None
    ) -> None:
        self.name, self.folder, self.shape = name, folder, shape
        self.shards: list[dict[str, Any]] = found["shards"] if found else []
        self.state: State = {"mark": Mark(), "ordinal": 0}
        if found:
            self.state = {**found["resume"], "mark": Mark.load(found["resume"]["mark"])}
        self._begin: int = self.state["ordinal"]
        self.line = Line(strategy, np.dtype(np.uint32) if shape.masked else shape.dtype, self.state)
        self.writer: ShardWriter | None = None
        self.remainder: dict[str, Any] | None = None

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
        before = len(self.shards)
        for packed in some:
            left = packed
            while left.stop >= (bound := self._first + self.shape.per_shard):
                self._write_part(left.between(left.first, bound))
                self._seal()
                self.state = packed.state(bound)
                left = left.between(bound, packed.stop + 1)
            self._write_part(left)
        return len(self.shards) > before

    @property
    def _first(self) -> int:
        """The number of the first sample in the shard that is written."""
        return len(self.shards) * self.shape.per_shard

    def _open(self) -> ShardWriter:
        if self.writer is None:
            self.writer = ShardWriter(self.folder, self.name, len(self.shards), self.shape)
        return self.writer

    def _write_part(self, packed: Packed) -> None:
        if len(packed.ids):
            segments = packed.segments.copy()
            segments["sample"] += np.uint32(packed.first - self._first)
            padding = packed.ids.size - int(segments["length"].sum())
            self._open().write(packed.ids, segments, padding)
        if len(packed.ended.ordinal):
            self._open().write_documents(_rows(packed.ended))

    def _seal(self) -> None:
        assert self.writer
        self.shards.append(self.writer.seal())
        self.writer = None

    def finish(self, remainder: str, pad_id: int, pad_side: str) -> None:
        """Seal what is left; the ids that fill no sample are kept, padded or dropped."""
        self._write(self.line.flush())
        rest = self.line.finish()
        n = self.shape.seq_len
        self.remainder = {"policy": remainder, "ids": len(rest.ids)}
        if self.shape.masked:
            self.remainder["learned"] = int((rest.ids >= LEARNED).sum())
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
                self.remainder |= write_remainder(self.folder, self.name, rest.ids, self.shape)
        if self.writer:
            self._seal()

    def close(self) -> None:
        if self.writer:
            self.writer.close()

    def entry(self, complete: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"shards": self.shards}
        if complete:
            return {**found, "remainder": self.remainder}
        mark = {**asdict(self.state["mark"]), "cursor": list(self.state["mark"].cursor)}
        return {**found, "resume": {**self.state, "mark": mark}}


def _rows(ended: Ended) -> Rows:
    columns = (ended.source, ended.offset, ended.length, ended.split, ended.cut_off)
    return Rows(ended.ordinal, ended.doc_ids, *columns)
