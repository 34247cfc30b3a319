"""Output shards on their way: counts become tasks, which wait for a writer, are done by workers, and get records."""

from collections import deque
from collections.abc import Callable, Iterable
from functools import partial

from millstream.engines import Done
from millstream.folder.entries import ShardEntry
from millstream.runs.pack.counts import Counts, ShardTask
from millstream.runs.pack.course import Course
from millstream.runs.pack.folder import Found
from millstream.runs.pack.pieces import PieceLost
from millstream.runs.pack.remaking import Remaking
from millstream.runs.pack.shards import Shards, starts_of
from millstream.runs.pack.shop import Shop
from millstream.runs.pack.subset import Mark


class Sealing:
    """The output shards of the run in a `shop`, behind those that were `found`: `count` pieces in the order of the
    corpus, and `finish` at its end. `sealed` is told of a subset's shards as they are.
    """

    def __init__(self, shop: Shop, found: Found | None, sealed: Callable[[str, Iterable[ShardEntry]], None]) -> None:
        run = self._run = shop.run
        self._shop, self._spill, self._traffic, self._sealed = shop, shop.spill, shop.traffic, sealed
        self._write = run.write_shards(shop.pieces)
        self._course = Course(starts_of(run.forms, found))
        self.shards = Shards(run, found, faults=shop.faults, journal=shop.journal)
        self._read = Mark()
        self._ready: deque[ShardTask] = deque()
        self._writing = 0
        self._remaking = Remaking(run, shop.tokenize, shop.traffic, shop.spill, journal=shop.journal)

    @property
    def waiting(self) -> int:
        """Tasks that wait for a writer."""
        return len(self._ready)

    @property
    def left(self) -> bool:
        """Whether there are tasks that are not done."""
        return bool(self._ready or self._writing)

    def count(self, counts: Counts, before: Mark, after: Mark) -> None:
        """A piece has had its turn."""
        self._read = after
        self._add(self._course.add(counts, before))

    def finish(self) -> None:
        """The input is over: have all written that is left, while others wait until there is nothing `left`."""
        self._add(self._course.finish())

    def write_complete(self) -> None:
        """Write all shards that have their samples, and wait for them, as the run ends with an error."""
        self._add(self._course.complete())
        while self.left:
            self._traffic.wait()

    def _add(self, tasks: Iterable[ShardTask]) -> None:
        for task in tasks:
            self._spill.lend(task)
            self._ready.append(task)
        self._spill.let_go(self._course.droppable())
        self._begin()

    def _begin(self) -> None:
        while self._ready and self._writing < self._run.writers:
            task = self._ready.popleft()
            self._writing += 1
            needs = [piece.ref.name for piece in task.pieces]
            self._traffic.submit(partial(self._wrote, task), self._write, task, urgent=True, needs=needs)

    def _wrote(self, task: ShardTask, done: Done) -> None:
        if isinstance(done.error, PieceLost):
            self._make_again(task, done.error)
            return
        self._writing -= 1
        if done.error:
            raise done.error
        self._run.tally.seconds["pack and write"] += done.result.seconds
        self._sealed(task.subset, (sealed.entry for sealed in done.result.shards))
        if self.shards.add(task, done.result, self._read):
            self._shop.parts.forget_before(self.shards.front)
        self._spill.take_back(task)
        self._begin()

    def _make_again(self, task: ShardTask, lost: PieceLost) -> None:
        """Have the part done again that a lost piece is of, and then the task."""
        if self._spill.part_of(lost.name).data:
            raise lost  # what was unpacked for it is gone, too

        def then() -> None:
            self._writing -= 1  # not before: who waits for all shards waits for this one too
            self._ready.appendleft(task)
            self._begin()

        self._remaking.make(lost, then)
