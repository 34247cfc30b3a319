"""What the driver of a run sees of the data: counts of pieces come in, and tasks for output shards go out.

All of it is small and picklable, whatever the pieces hold; `Counts` can be kept as JSON too.
"""

from dataclasses import dataclass

import msgspec
import numpy as np

from millstream.records import DocumentFault, Ids, Part, Ref, Seen
from millstream.runs.pack.subset import Mark
from millstream.stream.pack import State


class SubsetCounts(msgspec.Struct):
    """What a piece has of one subset: rows, each a document or a part of one, as in a TokenBatch.

    `ids` in all of them; `length` of each, u32; `ordinal` of each, i32, relative to the piece's first document, or None
    where they are consecutive. `start`: how many ids of the first row's document came in earlier pieces; that document
    is number -1 then. `open`: the last row's document goes on in the next piece. `ref`: where the ids are; None without
    rows.

    >>> some = SubsetCounts.of(np.array([3, 0, 4]), np.array([-1, 0, 1]), start=9)
    >>> some.ids, some.ordinal, some.lengths().tolist(), some.ordinals(100).tolist()
    (7, None, [3, 0, 4], [99, 100, 101])
    """

    ids: int
    length: bytes
    ordinal: bytes | None = None
    start: int = 0
    open: bool = False
    ref: Ref | None = None

    @classmethod
    def of(
        cls, length: Ids, ordinal: Ids, *, start: int = 0, open: bool = False, ref: Ref | None = None
    ) -> "SubsetCounts":
        """Rows of these lengths and relative ordinals."""
        first = -1 if start else 0
        consecutive = np.array_equal(ordinal, np.arange(first, first + len(ordinal)))
        ordinals = None if consecutive else ordinal.astype("<i4").tobytes()
        return cls(int(length.sum()), length.astype("<u4").tobytes(), ordinals, start, open, ref)

    def __len__(self) -> int:
        return len(self.length) // 4

    def lengths(self) -> Ids:
        return np.frombuffer(self.length, "<u4").astype(np.int64)

    def ordinals(self, first: int) -> Ids:
        """The rows' ordinals in the run, where the piece's first document has the ordinal `first`."""
        if self.ordinal is None:
            begin = first - bool(self.start)
            return np.arange(begin, begin + len(self))
        return np.frombuffer(self.ordinal, "<i4") + first


class Checks(msgspec.Struct):
    """What was seen beside the ids, and seconds by stage.

    `compared` bytes were compared with the reference; `not_compared` has the ids of documents that it could not encode,
    and what it said. Of conversations, `taught` have something that is to be learned and `unlearned` have not; `twice`
    counts ready ids that had BOS or EOS already; `lost` bytes of text have no id, and `unknown` ids stand for any text.
    """

    compared: int = 0
    not_compared: dict[str, str] = {}
    taught: int = 0
    unlearned: int = 0
    twice: int = 0
    lost: int = 0
    unknown: int = 0
    seconds: dict[str, float] = {}

    def plus(self, more: "Checks") -> "Checks":
        """Both together.

        >>> both = Checks(compared=3, seconds={"decode": 1.0}).plus(Checks(compared=4, seconds={"decode": 0.5}))
        >>> both.compared, both.seconds
        (7, {'decode': 1.5})
        """
        stages = {**self.seconds, **more.seconds}
        return Checks(
            compared=self.compared + more.compared,
            not_compared=self.not_compared | more.not_compared,
            taught=self.taught + more.taught,
            unlearned=self.unlearned + more.unlearned,
            twice=self.twice + more.twice,
            lost=self.lost + more.lost,
            unknown=self.unknown + more.unknown,
            seconds={stage: self.seconds.get(stage, 0.0) + more.seconds.get(stage, 0.0) for stage in stages},
        )


class Counts(msgspec.Struct):
    """All that the driver sees of piece number `piece` of a part; `last`: the part has no other one.

    `mark` is what the piece adds to the mark before it (`Mark.plus`), and `faults` are relative to that (`placed`).
    `opened`: its first row, whatever its subset, goes on with the document before; `open`: its last one goes on.
    `ends`: the input shard is over for good, as it is damaged from there on. `subsets` has the rows by subset, `seen`
    what was read of input shards.
    """

    part: Part
    piece: int
    last: bool
    mark: Mark
    subsets: dict[str, SubsetCounts]
    faults: list[DocumentFault] = []
    opened: bool = False
    open: bool = False
    ends: bool = False
    seen: list[Seen] = []
    checks: Checks = msgspec.field(default_factory=Checks)

    @property
    def empty(self) -> bool:
        """Whether no document begins here, goes on or ends: one that was open before the piece still is, as where a
        text has no place to cut it in a whole part."""
        return not self.opened and not self.mark.ordinal


def placed(faults: list[DocumentFault], mark: Mark) -> list[DocumentFault]:
    """Faults with ordinals and lines that are relative to `mark`, as they are in the run.

    >>> from millstream.records import Cursor
    >>> first = DocumentFault(2, "not_json", "", "a.jsonl", 90, 3, shard=4)
    >>> some = [first, DocumentFault(5, "not_json", "", "b.jsonl", 0, 1, shard=5)]
    >>> [(fault.ordinal, fault.line) for fault in placed(some, Mark(Cursor(4, 50), ordinal=10, line=20))]
    [(12, 23), (15, 1)]
    """
    return [
        fault._replace(
            ordinal=mark.ordinal + fault.ordinal,
            line=fault.line and fault.line + (mark.line if fault.shard == mark.cursor.source else 0),
        )
        for fault in faults
    ]


@dataclass(frozen=True)
class TaskPiece:
    """A piece as a shard task takes it: what is behind `ref` lies between the marks `before` and `after`.

    Documents of it are read from `begin` on, those behind it from `end` on: other marks than `before` and `after` where
    a document goes on over several pieces, as no run can go on within one. `start`: how many ids of the first row's
    document are in earlier pieces; `open`: a document, of this subset or another, goes on behind it.
    """

    ref: Ref
    before: Mark
    after: Mark
    begin: Mark
    end: Mark
    start: int = 0
    open: bool = False

    @property
    def next(self) -> int:
        """The ordinal of the first document that later pieces have something of."""
        return self.after.ordinal - self.open


@dataclass(frozen=True)
class ShardTask:
    """Write `count` output shards of a subset, from number `first` on: a resume state, and how far to go.

    `state` is that of the subset's line before the first of them: feed it the `pieces`. `over`: the input ends behind
    these, so what the line holds back comes out. `final`: these are the subset's last shards, the very last one with
    fewer samples or none; then the remainder is written too.
    """

    subset: str
    first: int
    count: int
    state: State
    pieces: tuple[TaskPiece, ...]
    over: bool = False
    final: bool = False
