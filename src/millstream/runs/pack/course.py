"""What a run has to write, told from counts: they come in by piece, in the order of the corpus, and tasks go out."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from millstream.records import Ref
from millstream.runs.pack.counts import Counts, ShardTask, SubsetCounts, TaskPiece
from millstream.runs.pack.subset import Mark
from millstream.stream.lengths import Lengths, LineOfLengths, Span
from millstream.stream.line import Strategy
from millstream.stream.pack import State


@dataclass(frozen=True)
class Start:
    """How a subset is packed into output shards of `per_shard` samples, and where that begins.

    `state` is the one before shard number `first`: of that and of later ones, those in `sealed` are written already.
    """

    strategy: Strategy
    per_shard: int
    first: int = 0
    state: State | None = None
    sealed: frozenset[int] = frozenset()


class Course:
    """The shard tasks of a run, subset by subset: pure arithmetic on counts.

    `add` gives the tasks that became possible, `finish` the last ones, at the end of the input. `droppable` names
    pieces that no later task will list: they can go once those are done that were given before.

    Output shards that begin in one piece, or in one window, are one task: packing each by itself would pack what lies
    before it in the window again. Memory: a few numbers for each piece that is not droppable yet.
    """

    def __init__(self, starts: dict[str, Start]) -> None:
        self._subsets = {name: _Subset(name, start) for name, start in starts.items()}
        self._begin: Mark | None = None  # from where the document that goes on is read
        self._had: dict[str, int] = {}  # ids of it that came, of the subset that it is in

    def add(self, counts: Counts, before: Mark) -> list[ShardTask]:
        """The piece that follows the mark `before`."""
        if counts.empty:
            return []
        after = before.plus(counts.mark)
        # A document that goes on is read again from its beginning: no mark lies inside one.
        begin = self._begin if counts.opened and self._begin else before
        same = counts.opened and not counts.mark.ordinal  # no other one begins here
        end = (begin if same else before) if counts.open else after
        self._begin = end
        tasks: list[ShardTask] = []
        for name, found in counts.subsets.items():
            if found.ref is not None:
                rows = self._with_start(name, counts, found)
                piece = TaskPiece(found.ref, before, after, begin, end, start=rows.start, open=counts.open)
                tasks += self._subsets[name].add(piece, rows)
        return tasks

    def _with_start(self, name: str, counts: Counts, found: SubsetCounts) -> SubsetCounts:
        """The rows of a subset, with all ids that the document of the first one has had: a piece knows of those alone
        that came in its own part."""
        lengths = found.lengths()
        goes_on = counts.opened and int(found.ordinals(0)[0]) == -1
        start = self._had.get(name, 0) if goes_on else 0
        had = int(lengths[-1]) + (start if len(lengths) == 1 else 0)
        self._had[name] = had if found.open else 0
        return msgspec.structs.replace(found, start=start) if start else found

    def finish(self) -> list[ShardTask]:
        """The tasks for what is left; one of them is each subset's `final` one, unless that is sealed."""
        return [task for subset in self._subsets.values() for task in subset.finish()]

    def complete(self) -> list[ShardTask]:
        """The tasks of what has all of its samples by now, which else waits for what is like them: for a run that
        ends before its input does."""
        return [task for subset in self._subsets.values() for task in subset.given()]

    def droppable(self) -> list[Ref]:
        """Pieces that no later task will list; each is named once."""
        return [ref for subset in self._subsets.values() for ref in subset.droppable()]


@dataclass
class _Group:
    """Output shards that begin in the same piece, number `at`, and are complete with piece number `upto`, or with the
    `over` of the input."""

    first: int
    state: State
    at: int
    count: int = 0
    upto: int = 0
    over: bool = False


@dataclass
class _Pieces:
    """Pieces of one subset, numbered as they come; `low` is the first that is kept."""

    kept: deque[TaskPiece] = field(default_factory=deque)
    low: int = 0
    ended: list[Ref] = field(default_factory=list)

    @property
    def stop(self) -> int:
        return self.low + len(self.kept)

    def between(self, low: int, high: int) -> tuple[TaskPiece, ...]:
        return tuple(self.kept[number - self.low] for number in range(low, high))

    def drop_before(self, number: int) -> None:
        while self.low < number and self.kept:
            self.ended.append(self.kept.popleft().ref)
            self.low += 1

    def holding(self, ordinal: int, used: int) -> int:
        """The number of the piece with what follows the first `used` ids of a document."""
        number = self.stop
        while number > self.low and self.kept[number - 1 - self.low].after.ordinal > ordinal:
            number -= 1
        while number + 1 < self.stop:
            later = self.kept[number + 1 - self.low]
            if later.before.ordinal != ordinal + 1 or not 0 < later.start <= used:
                break
            number += 1
        return number


class _Subset:
    """The output shards of one subset: number `_number` is the one that is not complete; it begins with `_state`, and
    the piece `_at` is the first that it takes."""

    def __init__(self, name: str, start: Start) -> None:
        self._name, self._per_shard, self._sealed = name, start.per_shard, start.sealed
        self._number = start.first
        self._state: State = start.state or {"mark": Mark(), "ordinal": 0}
        self._first: int = self._state["ordinal"]
        # A shuffle has to see a document that goes on from its beginning.
        self._whole = start.strategy.shuffle is not None
        self._line = LineOfLengths(start.strategy, self._state)
        self._pieces = _Pieces()
        self._at = 0
        self._group: _Group | None = None

    def add(self, piece: TaskPiece, counts: SubsetCounts) -> list[ShardTask]:
        rows = _rows(counts, piece.before.ordinal).after(self._first)
        if not len(rows):
            self._pieces.ended.append(piece.ref)
            return []
        self._pieces.kept.append(piece)

        def where(row: int) -> State:
            if row == len(rows):
                return {"mark": piece.end, "ordinal": piece.next}
            return {"mark": piece.begin, "ordinal": int(rows.ordinal[row])}

        tasks = self._completed(self._line.feed(rows, where))
        self._pieces.drop_before(self._group.at if self._group else self._at)
        return tasks

    def finish(self) -> list[ShardTask]:
        tasks = self._completed(self._line.flush(), over=True)
        final = self._number not in self._sealed
        if final:
            tasks += self._complete(over=True)
        tasks += self.given(final=final)
        self._pieces.drop_before(self._pieces.stop)
        return tasks

    def droppable(self) -> list[Ref]:
        ended, self._pieces.ended = self._pieces.ended, []
        return ended

    def _completed(self, spans: Iterable[Span], *, over: bool = False) -> list[ShardTask]:
        """The tasks of shards that are complete with these samples."""
        tasks = []
        for span in spans:
            while span.stop >= (bound := (self._number + 1) * self._per_shard):
                if self._number not in self._sealed:
                    tasks += self._complete(over=over)
                self._number += 1
                self._state = span.state(bound)
                used = 0 if self._whole else self._state["used"]
                self._at = self._pieces.holding(self._state["ordinal"], used)
                if self._group and self._group.at != self._at:
                    tasks += self.given()
        return tasks

    def _complete(self, *, over: bool) -> list[ShardTask]:
        """Take the shard that has all of its samples into a group; the task of the one before, if there is any."""
        group, tasks = self._group, []
        if group is None or group.at != self._at or group.first + group.count != self._number:
            tasks = self.given()
            group = self._group = _Group(self._number, self._state, self._at)
        group.count += 1
        group.upto, group.over = self._pieces.stop, over
        return tasks

    def given(self, *, final: bool = False) -> list[ShardTask]:
        """The task of the group that there is, if any."""
        group, self._group = self._group, None
        if group is None:
            return []
        pieces = self._pieces.between(group.at, group.upto)
        return [
            ShardTask(self._name, group.first, group.count, group.state, pieces, over=group.over, final=final),
        ]


def _rows(counts: SubsetCounts, first: int) -> Lengths:
    """The rows of a piece whose first document has the ordinal `first`."""
    start = np.zeros(len(counts), np.int64)
    start[0] = counts.start
    return Lengths(counts.lengths(), counts.ordinals(first), start, counts.open)
