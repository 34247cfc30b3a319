"""The samples of one subset of a corpus on their way into output shards, and where that can go on."""

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from millstream.formats.shards import Rows, Shape, ShardWriter, write_remainder
from millstream.records import Cursor, TokenBatch
from millstream.stream.pack import Packed, Packer


@dataclass(frozen=True)
class Mark:
    """The state of the reading side before a unit: what a resumed run goes on with.

    `ordinal`: documents read so far; `line`: of the input shard at `cursor`; `text_ids`, `special_ids`: as in the
    ledger; `fault_bytes`: how long faults.jsonl is; `bytes`: of input.
    """

    cursor: Cursor = field(default_factory=Cursor)
    ordinal: int = 0
    line: int = 0
    text_ids: int = 0
    special_ids: int = 0
    fault_bytes: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    bytes: int = 0

    @classmethod
    def load(cls, found: dict[str, Any]) -> "Mark":
        return cls(**{**found, "cursor": Cursor(*found["cursor"])})


class Subset:
    """The samples of one subset (train, validation): its packer, its shards, and where it can go on.

    `resume` = (ordinal, used): the first document not wholly in a sealed shard and how many of its ids are in one.
    `mark` is the reading side's state before that document.
    """

    def __init__(self, name: str, folder: str, shape: Shape, packer: Packer, found: dict[str, Any] | None) -> None:
        self.name, self.folder, self.shape, self.packer = name, folder, shape, packer
        self.shards: list[dict[str, Any]] = found["shards"] if found else []
        self.resume: tuple[int, int] = (0, 0)
        self.mark = Mark()
        if found:
            self.resume = (found["resume"]["ordinal"], found["resume"]["used"])
            self.mark = Mark.load(found["resume"]["mark"])
        self.trim = self.resume
        self.base = len(self.shards) * shape.per_shard  # samples sealed before this run
        self.writer: ShardWriter | None = None
        self.remainder: dict[str, Any] | None = None

    def add(self, batch: TokenBatch, begin: Mark, end: Mark, ordinal: int) -> bool:
        """Pack a batch; whether a shard was sealed.

        Its documents are read from the mark `begin` on, those of the next batch from `end` on; `ordinal` is the next
        document's.
        """
        batch = batch.after(*self.trim)
        if not len(batch):
            return False
        packed = self.packer.feed(batch)
        ended = len(batch) - batch.open
        per_shard, sealed = self.shape.per_shard, False
        samples = self.packer.samples - len(packed.ids)  # samples and rows written so far
        rows = 0
        while True:
            number = len(self.shards)
            bound = (number + 1) * per_shard - self.base
            upto = min(bound, self.packer.samples)
            self._write_samples(packed, samples, upto, number * per_shard - self.base)
            samples = upto
            last = int(np.searchsorted(packed.last_sample[:ended], bound))
            self._write_rows(batch, packed, rows, last)
            rows = last
            if self.packer.samples < bound:
                return sealed
            self._seal()
            sealed = True
            done = rows == len(batch)
            self.resume = (ordinal, 0) if done else self._resume_at(int(batch.ordinal[rows]), packed, bound)
            self.mark = end if done else begin

    @staticmethod
    def _resume_at(ordinal: int, packed: Packed, bound: int) -> tuple[int, int]:
        """Where to go on with document `ordinal`, of which samples before `bound` hold some ids or none."""
        segments = packed.segments
        here = segments[(segments["document"] == ordinal) & (segments["sample"] < bound)]
        return ordinal, int(here[-1]["start"] + here[-1]["length"]) if len(here) else 0

    def _open(self) -> ShardWriter:
        if self.writer is None:
            self.writer = ShardWriter(self.folder, self.name, len(self.shards), self.shape)
        return self.writer

    def _write_samples(self, packed: Packed, low: int, high: int, first: int) -> None:
        if high <= low:
            return
        offset = self.packer.samples - len(packed.ids)
        bounds = np.searchsorted(packed.segments["sample"], [low, high])
        segments = packed.segments[bounds[0] : bounds[1]].copy()
        segments["sample"] = segments["sample"].astype(np.int64) - first
        rows = packed.ids[low - offset : high - offset]
        padding = rows.size - int(segments["length"].sum())
        self._open().write(rows, segments, padding)

    def _write_rows(self, batch: TokenBatch, packed: Packed, low: int, high: int) -> None:
        if high > low:
            part = slice(low, high)
            length = (batch.start + batch.length)[part]
            split = packed.split[part] & (length > 0)
            rows = (batch.ordinal[part], batch.doc_ids[part], batch.source[part], batch.offset[part])
            self._open().write_documents(Rows(*rows, length, split))

    def _seal(self) -> None:
        assert self.writer
        self.shards.append(self.writer.seal())
        self.writer = None

    def finish(self, remainder: str, pad_id: int, pad_side: str) -> None:
        """Seal what is left; the ids that fill no sample are kept, padded or dropped."""
        rest = self.packer.finish()
        n = self.shape.seq_len
        self.remainder = {"policy": remainder, "ids": len(rest.ids)}
        if len(rest.ids):
            segments = rest.segments.copy()
            local = self.packer.samples - (len(self.shards) * self.shape.per_shard - self.base)
            segments["sample"] = local
            if remainder == "pad":
                row = np.full((1, n), pad_id, rest.ids.dtype)
                left = n - len(rest.ids) if pad_side == "left" else 0
                row[0, left : left + len(rest.ids)] = rest.ids
                self._open().write(row, segments, n - len(rest.ids))
            elif remainder == "keep":
                self._open().write_segments(segments)
                self.remainder |= write_remainder(self.folder, self.name, rest.ids)
        if self.writer:
            self._seal()

    def close(self) -> None:
        if self.writer:
            self.writer.close()

    def entry(self, complete: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"shards": self.shards}
        if complete:
            return {**found, "remainder": self.remainder}
        mark = {**asdict(self.mark), "cursor": list(self.mark.cursor)}
        return {**found, "resume": {"ordinal": self.resume[0], "used": self.resume[1], "mark": mark}}
