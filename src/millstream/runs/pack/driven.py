"""A run whose parts and shards somebody else has done, elsewhere: what there is to do is handed out, and what was
done comes back."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

from millstream.corpus.sources import rough_total
from millstream.errors import RequestError, RunError
from millstream.exports.out import Place
from millstream.exports.tasks import Export
from millstream.folder.entries import SubsetEntry
from millstream.folder.journal import Journal, Spilled
from millstream.folder.records import forget_parts
from millstream.folder.samples import Samples
from millstream.records import Part
from millstream.runs.pack.counts import Counts, ShardTask
from millstream.runs.pack.exporting import export_all
from millstream.runs.pack.faults import Faults
from millstream.runs.pack.folder import Found
from millstream.runs.pack.order import InOrder
from millstream.runs.pack.planning import part_size
from millstream.runs.pack.run import Run
from millstream.runs.pack.shards import Shards, starts_of
from millstream.runs.pack.spill import Spill, make_room, pieces_of, refs_of
from millstream.runs.pack.subset import Mark
from millstream.runs.pack.tokenizing import PartTask, TokenizePart
from millstream.runs.pack.writing import Written
from millstream.store import at


@dataclass(frozen=True)
class TokenizeWhole:
    """`TokenizeWhole(...)(task)`: all counts of a part in a list, for who cannot be answered several times."""

    tokenize: TokenizePart

    def __call__(self, task: PartTask) -> list[Counts]:
        return list(self.tokenize(task))


class PackJob:
    """What there is to do for a run, and what was done of it.

    `tokenize_part` each of the `parts`, and `count` what that gives, in the order of the parts. `write_shard` each of
    the shard tasks which that makes possible, and those that `finish` gives behind the last part; `wrote` is told of
    each. Both functions can be pickled, do the same wherever they run, and may be called twice; the run folder, the
    inputs and `--spill` have to be there under the same names. Parts that are not counted yet leave pieces there: hand
    out as many as may lie about.
    """

    def __init__(self, run: Run, found: Found | None, mark: Mark, *, faults: Faults, journal: Journal) -> None:
        self._run, self._journal = run, journal
        pieces = pieces_of(run)
        if run.spill:
            journal.write(Spilled(folder=pieces.store.url))
            journal.flush()
        make_room(pieces.store, 0, needed=True)
        pieces.sweep()
        forget_parts(at(run.out))
        read = found.read if found else None
        self.tokenize_part = TokenizeWhole(run.reading.tokenize_part(pieces, read, shared=True))
        self.write_shard = run.write_shards(pieces)
        self._spill = Spill(pieces, 0)
        self._shards = Shards(run, found, faults=faults, journal=journal)
        self._handed = _Handed()
        self._finished = False
        self._order = InOrder(self._handed, starts_of(run.forms, found), run.settings.limit, faults.write, mark)
        self._begin, self._left = mark, 0

    @property
    def mark(self) -> Mark:
        """How far the parts are counted."""
        return self._order.mark

    @property
    def sealed(self) -> bool:
        """Whether any output shard is written."""
        return self._shards.any

    def parts(self) -> Iterator[PartTask]:
        """Each is planned when it is asked for, and none any more once the limit is reached."""
        size = part_size(rough_total(self._run.shards))
        for part in self._run.reading.parts(self._begin.cursor, size):
            if self._order.at_limit:
                return
            for each in part.ranges:
                self._run.inputs.state(each.source)
            self._handed.append(part)
            yield self._run.part_task(part)

    def count(self, counts: Iterable[Counts]) -> list[ShardTask]:
        """The tasks that became possible. Raises DataError at a bad document, if the run stops there."""
        tasks: list[ShardTask] = []
        for each in counts:
            self._spill.add(each)
            part = self._order.first
            if part is None or part != each.part:  # behind the limit, or behind the end of a damaged input
                self._spill.let_go(refs_of(each))
                continue
            self._run.count(each.checks, self._journal)
            self._run.inputs.use(self._run.inputs.used(each.seen))
            tasks += self._order.take(each)
            again = self._order.first
            if again is not None and again.limit is not None and part.limit is None:
                self._spill.let_go(self._order.unwanted())
                return tasks + self.count(self.tokenize_part(self._run.part_task(again)))
        return self._given(tasks)

    def finish(self) -> list[ShardTask]:
        """Those for what is left, once all parts are counted."""
        self._finished = True
        return self._given(self._order.finish())

    def _given(self, tasks: list[ShardTask]) -> list[ShardTask]:
        for task in tasks:
            self._spill.lend(task)
        self._spill.let_go(self._order.unwanted())
        self._left += len(tasks)
        self._run.show(self.mark, self._begin, queue=self._left, spilled=self._spill.bytes)
        return tasks

    def wrote(self, task: ShardTask, written: Written) -> None:
        """A task is done: its shards are recorded, so that no later call does it again."""
        self._left -= 1
        self._run.tally.seconds["pack and write"] += written.seconds
        self._shards.add(task, written, self.mark)
        self._spill.take_back(task)

    def entries(self) -> dict[str, SubsetEntry]:
        """What the manifest says of each subset. Raises RunError if something is still to be done."""
        if self._left or not self._finished or self._order.first is not None:
            raise RunError(
                "the run is not done: all parts have to be counted, all tasks written, those of finish() among them"
            )
        return self._shards.entries()


class _Handed:
    """Parts that were handed out and did not have their turn. It ends, and goes on once there are more."""

    def __init__(self) -> None:
        self._parts: deque[Part] = deque()

    def append(self, part: Part) -> None:
        self._parts.append(part)

    def __iter__(self) -> "_Handed":
        return self

    def __next__(self) -> Part:
        if not self._parts:
            raise StopIteration
        return self._parts.popleft()


class Driven:
    """The loop of a run of which `drive` has all done that its `PackJob` tells of."""

    def __init__(
        self, drive: Callable[[PackJob], None], run: Run, found: Found | None, *, faults: Faults, journal: Journal
    ) -> None:
        if any(shard.uri == "-" for shard in run.shards):
            raise RequestError("standard input cannot be read elsewhere: give files that all can read")
        self._drive, self._run = drive, run
        self._job = PackJob(run, found, found.mark if found else Mark(), faults=faults, journal=journal)

    @property
    def sealed(self) -> bool:
        return self._job.sealed

    def pack(self, mark: Mark) -> Mark:
        self._drive(self._job)
        self._entries = self._job.entries()
        return self._job.mark

    def finish(self) -> dict[str, SubsetEntry]:
        return self._entries

    def export(self, subsets: Sequence[Samples]) -> Generator[tuple[Export, Place]]:
        return export_all(self._run.identity.exports or [], subsets, at(self._run.out), workers=1)

    def close(self) -> None:
        """Whoever was at work is ended by who began it."""
