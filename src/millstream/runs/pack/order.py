"""The parts of a run in the order of the corpus, and what their counts come to, for all who join it: arithmetic alone,
so that each of them comes to the same."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from millstream.records import DocumentFault, Part, Ref
from millstream.runs.pack.counts import Counts, ShardTask, placed
from millstream.runs.pack.course import Course, Start
from millstream.runs.pack.spill import refs_of
from millstream.runs.pack.subset import Mark
from millstream.runs.pack.wanted import Wanted


class InOrder:
    """`take` the counts of the first part there is, one after the other, until it is `over`; `mark` is how far that is.

    Parts begin at a `mark`, and the subsets as `starts` say. `write_faults` is told of faults as they are in the run,
    and says how long all of them are by then. `unwanted` are pieces that no task will list which is not given yet.
    """

    def __init__(
        self,
        parts: Iterator[Part],
        starts: dict[str, Start],
        limit: int | None,
        write_faults: Callable[[Iterable[DocumentFault]], int],
        mark: Mark | None = None,
    ) -> None:
        self._plan, self._wanted, self._write_faults = parts, Wanted(limit), write_faults
        self._course = Course(starts)
        self.mark = self._start = mark or Mark()  # where we are, and where the first part began
        self._planned: deque[Part] = deque()
        self._taken = self._skip = 0  # counts of the first part, and those of them that are known already
        self._unwanted: list[Ref] = []
        self._end_at_limit()

    def ahead(self) -> Iterator[Part]:
        """The parts that have not had their turn, planned as they are looked at; until something is taken. Whether
        anything behind the limit is wanted, its own part will tell."""
        number = 0
        while number < len(self._planned) or self._plan_one():
            yield self._planned[number]
            if self._planned[number].limit is not None:
                return
            number += 1

    def _plan_one(self) -> bool:
        for part in self._plan:
            if not self._wanted.is_over(part):
                self._planned.append(part)
                return True
        return False

    @property
    def first(self) -> Part | None:
        """The part whose turn it is; None: there is none left."""
        return next(self.ahead(), None)

    def take(self, counts: Counts) -> list[ShardTask]:
        """The next counts of the first part; the shard tasks that became possible."""
        part, before, tasks = self._planned[0], self.mark, []
        self._taken += 1
        if self._taken <= self._skip:
            self._unwanted += refs_of(counts)
        elif self._wanted.is_too_much(part, counts, before):
            self._unwanted += refs_of(counts)
            self._planned[0] = self._wanted.of(part, self._start)  # which is done again
            self._taken, self._skip = 0, self._taken - 1
            return []
        else:
            size = self._write_faults(placed(counts.faults, before))
            counts.mark = replace(counts.mark, fault_bytes=size - before.fault_bytes)
            self.mark = before.plus(counts.mark)
            self._wanted.count(counts, self.mark)
            tasks = self._course.add(counts, before)
        if counts.last:
            self._planned.popleft()
            self._taken, self._skip, self._start = 0, 0, self.mark
        if counts.ends:
            self._leave_out(0 if counts.last else 1)
        self._end_at_limit()
        return tasks

    def has(self, part: Part) -> bool:
        """Whether a part is planned, and has not had its turn."""
        return part in self._planned

    @property
    def unpacked(self) -> int:
        """How many parts are planned that were unpacked."""
        return sum(part.data is not None for part in self._planned)

    def put_before(self, packed: Part, found: Part | None) -> None:
        """What follows of a packed part, whose turn is before that of the rest; None: there is no rest."""
        if not self.has(packed):
            return  # it is damaged, or behind the limit
        place = self._planned.index(packed)
        if found:
            self._planned.insert(place, found)
        else:
            del self._planned[place]

    def finish(self) -> list[ShardTask]:
        """The tasks for what is left, once no part is."""
        return self._course.finish()

    def unwanted(self) -> list[Ref]:
        """Each is named once."""
        found, self._unwanted = [*self._unwanted, *self._course.droppable()], []
        return found

    def _leave_out(self, keep: int) -> None:
        """An input is damaged from here on: but for the first `keep`, its parts hold nothing."""
        planned = list(self._planned)
        rest = (part for part in planned[keep:] if not self._wanted.is_over(part))
        self._planned = deque([*planned[:keep], *rest])

    @property
    def at_limit(self) -> bool:
        return self._wanted.is_enough(self.mark)

    def _end_at_limit(self) -> None:
        if self.at_limit:
            self._planned.clear()
            self._plan = iter(())
