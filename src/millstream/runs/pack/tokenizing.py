"""A part becomes pieces: what a worker does that reads the corpus itself."""

import contextlib
import hashlib
import platform
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import msgspec
import numpy as np

from millstream.corpus.limits import Manner
from millstream.corpus.parts import slices_of
from millstream.corpus.slices import surely, units
from millstream.corpus.sources import InputShard
from millstream.errors import RunError
from millstream.records import Cursor, DocumentFault, Part, Seen, Slice, TokenBatch
from millstream.runs.pack.counts import Checks, Counts, SubsetCounts
from millstream.runs.pack.encode import CHECK_FIRST, Encode, Encoded
from millstream.runs.pack.numbering import Numbered, Numbering
from millstream.runs.pack.pieces import PieceLost, Pieces, as_chunks
from millstream.runs.pack.subset import Mark

T = TypeVar("T")

PIECE = 16 << 20
"""Bytes of text in a piece, of a part that has more."""
LARGE_PIECE = 4 * PIECE
"""The same on a cluster, where each answer takes the driver some ms."""
AHEAD = 2
"""Pieces that a part may put before anybody looks at the first."""
LONG = 4 << 20
"""Bytes of a unit that only one worker at once tokenizes, as `memory` counts one long document."""


class PartTask(NamedTuple):
    """A part, and the input shards that it is of, by number: a corpus may have a million of them. `sizes`: the bytes
    that these had, as far as that is known."""

    part: Part
    shards: dict[int, InputShard]
    sizes: dict[int, int]


@dataclass(frozen=True)
class TokenizePart:
    """`TokenizePart(...)(task)`: the counts of its pieces, one after the other; picklable, the same in every worker.

    Each piece is put before its counts are handed out. The numbers in them begin from zero with the piece, whatever
    comes before it; pieces are named by what is in them, so that doing a part twice leaves them there once. `used` is
    how far an earlier run has read: raises ResumeRefused where that is in what can only be read from its beginning, and
    is not the same. What is `shared` is read as `surely` does.
    """

    manner: Manner
    encode: Encode
    numbering: Numbering
    pieces: Pieces
    size: int = PIECE
    used: Cursor | None = None
    shared: bool = False

    def __call__(self, task: PartTask) -> Iterator[Counts]:
        part = task.part
        numbering = self.numbering.anew(part.limit, {number: shard.name for number, shard in task.shards.items()})
        first = part.ranges[0]
        mark = Mark(Cursor(first.source, first.start))
        number, piece, seen = 0, _Piece(), _before(task)
        for unit, seconds in _timed(units(self._slices(task), self.manner.block)):
            if piece.size >= self.size:
                yield self._put(part, number, piece, mark, last=False)
                number, piece, mark = number + 1, _Piece(), numbering.restart(mark)
            encoded = self._encoded(unit, seen < CHECK_FIRST)
            seen += encoded.size
            found = numbering.number(encoded, mark, unit[-1].after)
            mark = found.mark
            piece.checks = piece.checks.plus(encoded.checks).plus(Checks(seconds={"read": seconds}))
            piece.add(unit, found, encoded.opened)
            if part.limit is not None and numbering.left(mark) == 0 and not found.open:
                break
        yield self._put(part, number, piece, mark, last=True)

    def _encoded(self, unit: tuple[Slice, ...], check_all: bool) -> Encoded:
        """Of a long document many copies are held, so workers take turns with them."""
        long = sum(piece.size for piece in unit) > LONG
        with self.pieces.turn() if long else contextlib.nullcontext():
            return self.encode((unit, check_all))

    def _slices(self, task: PartTask) -> Iterator[Slice]:
        part, shards, _ = task
        if self.shared:
            _check_sizes(task)
        data = None
        if part.data:
            try:
                data = self.pieces.get(part.data)
            except PieceLost:  # then all that is before it is unpacked once more
                if shards[part.ranges[0].source].uri == "-":
                    raise
        pieces = slices_of(part, shards, self.manner, data=data, used=self.used)
        return surely(pieces) if self.shared else pieces

    def _put(self, part: Part, number: int, piece: "_Piece", mark: Mark, *, last: bool) -> Counts:
        name = f"{_name_of(part)}-{number}"
        return Counts(
            part=part,
            piece=number,
            last=last,
            mark=mark,
            subsets={subset: self._put_subset(f"{name}-{subset}", rows) for subset, rows in self._split(piece)},
            faults=piece.faults,
            opened=piece.opened,
            open=piece.open,
            ends=piece.ends,
            seen=list(piece.seen.values()),
            checks=piece.checks,
        )

    def _split(self, piece: "_Piece") -> Iterator[tuple[str, list[TokenBatch]]]:
        """The rows of each subset."""
        if not self.encode.validation:
            yield "train", [found.batch for found in piece.found]
            return
        for subset, wanted in (("train", False), ("validation", True)):
            yield subset, [found.batch.where(found.in_validation == wanted) for found in piece.found]

    def _put_subset(self, name: str, batches: list[TokenBatch]) -> SubsetCounts:
        filled = [batch for batch in batches if len(batch)]
        if not filled:
            return SubsetCounts(0, b"")
        rows, chunks = as_chunks(filled)
        ref = self.pieces.put(name, chunks)
        ordinal = rows.ordinal.astype(np.int64)
        return SubsetCounts.of(rows.length, ordinal, start=int(rows.start[0]), open=rows.open, ref=ref)


@dataclass
class _Piece:
    """What units became, until it is put; `size` in bytes of text."""

    found: list[Numbered] = field(default_factory=list)
    faults: list[DocumentFault] = field(default_factory=list)
    checks: Checks = field(default_factory=Checks)
    seen: dict[tuple[int, int], Seen] = field(default_factory=dict)
    size: int = 0
    opened: bool = False
    open: bool = False
    ends: bool = False

    def add(self, unit: tuple[Slice, ...], found: Numbered, opened: bool) -> None:
        if not self.found:
            self.opened = opened
        self.found.append(found)
        self.faults += found.faults
        self.open = found.open
        for each in unit:
            self.size += each.size
            if each.seen:
                self.seen[each.seen.source, each.seen.start] = each.seen
        last = unit[-1]
        self.ends = last.fault is not None and last.after.source > last.source


def _timed(items: Iterable[T]) -> Iterator[tuple[T, float]]:
    """Each with the seconds that it took to come."""
    start = time.perf_counter()
    for item in items:
        yield item, time.perf_counter() - start
        start = time.perf_counter()


def _check_sizes(task: PartTask) -> None:
    """Raises RunError where a file ends earlier here than for whoever has handed out the part: nothing would tell that
    lines behind that are missed. It may have grown; what is far away is known by more than its size."""
    for source, size in task.sizes.items():
        shard = task.shards[source]
        if shard.far:
            continue
        with contextlib.suppress(OSError):  # which is told when it is read
            found = shard.size()
            if found < size:
                raise RunError(
                    f"{shard.called} has {found:,} bytes on {platform.node()} and {size:,} where its parts are handed "
                    "out: see that all machines have the same inputs, and run the same command again"
                )


def _before(task: PartTask) -> int:
    """Bytes that a run has read before a part, as far as it matters for what is compared at its beginning."""
    first = task.part.ranges[0]
    if task.part.number == 0:
        return 0
    return first.start if first.source == 0 and task.shards[0].kind != "parquet" else CHECK_FIRST


def _name_of(part: Part) -> str:
    """A name for what a part has, wherever it comes in a run."""
    first = part.ranges[0]
    digest = hashlib.blake2b(msgspec.json.encode((part.ranges, part.data, part.limit)), digest_size=6)
    return f"{first.source}-{first.start}-{digest.hexdigest()}"
