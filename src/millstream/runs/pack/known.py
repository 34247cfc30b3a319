"""Parts that earlier calls of a run have tokenized, and whose pieces lie there: they are not done again."""

from collections import deque
from dataclasses import dataclass

import msgspec

from millstream.corpus.parquet import group_sizes
from millstream.corpus.slices import content_hash
from millstream.folder.journal import FileState
from millstream.folder.records import (
    PartInput,
    PartRecord,
    forget_part,
    part_name,
    read_parts,
    record_part,
    this_version,
)
from millstream.records import Part, Range, Seen
from millstream.runs.pack.counts import Counts, SubsetCounts
from millstream.runs.pack.folder import Found
from millstream.runs.pack.inputs import state_of
from millstream.runs.pack.pieces import Pieces
from millstream.runs.pack.run import Run
from millstream.runs.pack.settings import columns_of
from millstream.runs.pack.spill import Spill, refs_of
from millstream.runs.pack.subset import Mark
from millstream.store import at


@dataclass(frozen=True)
class _Known:
    ranges: tuple[Range, ...]
    inputs: list[PartInput]
    counts: list[Counts]

    @property
    def place(self) -> tuple[int, int]:
        return _place(self.ranges)

    @property
    def end(self) -> tuple[int, int]:
        return _end(self.ranges)


class KnownParts:
    """The parts of a `run` that have records, which goes on from what was `found`; `piece` is the size of pieces.

    A record stands until all shards before the end of its part are sealed. It is of use to another call where the
    part's pieces lie there, and where all that is made of them is sealed, so that only their counts are wanted.
    """

    def __init__(self, run: Run, found: Found | None, piece: int) -> None:
        self._run, self._read = run, found.read if found else None
        subsets = found.subsets if found else {}
        self._sealed = {
            name: [(begin.cursor[:2], end.cursor[:2]) for begin, end in shards.stretches]
            for name, shards in subsets.items()
        }
        self._store = at(run.out)
        self._made_by = (this_version(), run.settings.block, piece)
        self._waiting: deque[_Known] = deque()  # in the order of the corpus
        self._recorded: dict[str, tuple[int, int]] = {}  # where they end, by the names of their records

    def load(self, pieces: Pieces, spill: Spill) -> None:
        """Find what there is, and delete all pieces that are of no known part."""
        found = []
        for name, record in read_parts(self._store):
            known = self._usable(record, pieces) if record else None
            if known is None:
                forget_part(self._store, name)
            else:
                found.append(known)
                self._recorded[name] = known.end
        pieces.sweep({ref.name for known in found for counts in known.counts for ref in refs_of(counts)})
        self._waiting.extend(sorted(found, key=lambda known: known.place))
        for known in self._waiting:
            for counts in known.counts:
                spill.recall(counts)

    def take(self, part: Part, spill: Spill) -> list[Counts]:
        """What is known of a part, if anything is; parts are taken in the order of the corpus."""
        found: list[Counts] = []
        while self._waiting and self._waiting[0].place <= _place(part.ranges):
            known = self._waiting.popleft()
            if known.ranges == part.ranges and part.data is None and self._fits(known):
                found = [msgspec.structs.replace(counts, part=part) for counts in known.counts]
            else:  # its inputs are others now, or cut elsewhere, or the run goes on behind its beginning
                self._forget(part_name(known.ranges))
                for counts in known.counts:
                    spill.let_go(refs_of(counts))
        return found

    def look_at(self, part: Part) -> None:
        """Take the states of a part's files, before it is read: if they are another way later, nobody knows when it
        became so."""
        for each in part.ranges:
            self._run.inputs.state(each.source)

    def record(self, part: Part, counts: list[Counts]) -> None:
        """All pieces of a part lie there. What is unpacked for it, or cut at a limit, is not met again as it is, and
        what could not be read may be readable next time."""
        unreadable = any(fault.reason == "unreadable" for each in counts for fault in each.faults)
        if part.data or part.limit is not None or part.fault or unreadable or not any(map(refs_of, counts)):
            return
        inputs = []
        for each in part.ranges:
            shard, state = self._run.shards[each.source], self._run.inputs.state(each.source)
            if state is None:
                return
            inputs.append(PartInput(each.source, shard.name, shard.kind, state))
        try:
            made = [msgspec.Raw(msgspec.msgpack.encode(each)) for each in counts]
            record = PartRecord(made_by=self._made_by, ranges=part.ranges, inputs=inputs, counts=made)
            record_part(self._store, record)
        except UnicodeEncodeError:  # a file's name that is no text
            return
        self._recorded[record.name] = _end(part.ranges)

    def forget_before(self, mark: Mark) -> None:
        """No call goes on before this mark."""
        for name in [name for name, end in self._recorded.items() if end <= mark.cursor[:2]]:
            self._forget(name)

    def _forget(self, name: str) -> None:
        del self._recorded[name]
        forget_part(self._store, name)

    def _usable(self, record: PartRecord, pieces: Pieces) -> _Known | None:
        """A record, unless it can be of no part of this run."""
        if record.made_by != self._made_by:
            return None
        for each in record.inputs:
            shard = self._run.shards[each.number] if each.number < len(self._run.shards) else None
            if shard is None or (shard.name, shard.kind) != (each.name, each.kind):
                return None
        try:
            counts = [msgspec.msgpack.decode(each, type=Counts) for each in record.counts]
        except msgspec.MsgspecError:
            return None
        there = (self._has(pieces, record.ranges, *rows) for each in counts for rows in each.subsets.items())
        if not all(there):
            return None
        if self._run.settings.engine == "reference" and any(each.checks.not_compared for each in counts):
            return None  # it cannot encode some of that
        for piece in counts:  # not what this call does
            piece.checks = msgspec.structs.replace(piece.checks, seconds={}, compared=0)
        return _Known(record.ranges, record.inputs, counts)

    def _has(self, pieces: Pieces, ranges: tuple[Range, ...], subset: str, rows: SubsetCounts) -> bool:
        """Whether a piece lies there, or nothing more is to be made of it: else it is better to do the part again."""
        if rows.ref is None or pieces.has(rows.ref):
            return True
        # What begins in the same piece as the first of the shards is of the shard before, too.
        stretches = self._sealed.get(subset, [])
        return any(low < _place(ranges) and _end(ranges) <= high for low, high in stretches)

    def _fits(self, known: _Known) -> bool:
        """Whether the inputs of a part are what they were when it was read."""
        seen: dict[tuple[int, int], Seen] = {}  # the last of each stretch, which is the longest
        for counts in known.counts:
            seen |= {(each.source, each.start): each for each in counts.seen}
        for wanted, then in zip(known.ranges, known.inputs, strict=True):
            here = [each for each in seen.values() if each.source == wanted.source and each.start <= wanted.start]
            if not self._is_same(wanted, then.file, here[-1] if here else None):
                return False
        return True

    def _is_same(self, wanted: Range, then: FileState, seen: Seen | None) -> bool:
        shard = self._run.shards[wanted.source]
        now = state_of(shard)
        if now is None:
            return False
        if then.size == now.size == 0:
            return True
        if seen is None:
            return False
        if not shard.seekable and self._read and self._read.source == wanted.source:
            return False  # it has to be read again, to be compared with what output shards were made of
        if then.is_that_of(now):
            return True
        # Of other sizes, what was the end may go on now; and what is packed may be damaged, or mended, behind `seen`.
        if not shard.seekable or then.size != now.size:
            return False
        stop = wanted.stop or (sum(rows for rows, _ in group_sizes(shard)) if shard.kind == "parquet" else now.size)
        try:
            hashed = content_hash(shard, columns_of(self._run.settings), seen.start, seen.stop)
        except OSError:
            return False
        return seen.stop >= stop and hashed == seen.sha256


def _place(ranges: tuple[Range, ...]) -> tuple[int, int]:
    return ranges[0].source, ranges[0].start


def _end(ranges: tuple[Range, ...]) -> tuple[int, int]:
    last = ranges[-1]
    return (last.source + 1, 0) if last.stop is None else (last.source, last.stop)
