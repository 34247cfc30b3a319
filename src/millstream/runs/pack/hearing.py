"""What those who join a run have told of it, and what that comes to: each hears the same, and counts it by itself."""

import sys
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field
from itertools import islice

import msgspec

from millstream.corpus.objects import AT_ONCE, side_by_side
from millstream.errors import RunError, setting
from millstream.folder.entries import InputEntry, RemainderEntry, ShardEntry, SubsetEntry
from millstream.folder.records import Joint
from millstream.folder.told import InputTold, T, ToldCounts, ToldShards, ToldUnpacked, part_label, told
from millstream.records import DocumentFault, Part
from millstream.runs.pack.counts import Counts, ShardTask
from millstream.runs.pack.order import InOrder
from millstream.runs.pack.planning import is_large
from millstream.runs.pack.run import Run
from millstream.runs.pack.shards import starts_of
from millstream.runs.pack.spill import Spill, refs_of
from millstream.runs.pack.subset import Mark
from millstream.store import at, is_far

_TAKEN = 256
"""Parts that were unpacked and are taken before those before them are counted: all workers have something to do, and
who comes late to a file of a terabyte does not look through all of them for each."""


@dataclass
class _Heard:
    """What was told of a part that has not had its turn: so many sections; whether it is `whole`."""

    counts: deque[Counts] = field(default_factory=deque)
    sections: int = 0
    whole: bool = False


@dataclass
class Did:
    """What one of those that join has done, of how much; pieces that were lost are made `again`."""

    parts: int = 0
    shards: int = 0
    again: int = 0
    mark: Mark = field(default_factory=Mark)


class Hearing:
    """What those who join `run`, as its `joint` says, have told of it: `look` hears it, and counts it in the order of
    the corpus, as far as `mark`. `tasks` are the shard tasks that it came to and that nobody has told of. When all
    `is_done`, `entries` is what the manifest says of each subset, and `inputs` what was read, as it was found then.

    Their pieces go through `spill`; `write_faults` is as in `InOrder`.
    """

    def __init__(
        self, run: Run, joint: Joint, spill: Spill, write_faults: Callable[[Iterable[DocumentFault]], int]
    ) -> None:
        self._run, self._spill = run, spill
        self._store, self._token = at(run.out), joint.token
        planned = run.reading.parts(Mark().cursor, joint.part)
        self._order = InOrder(planned, starts_of(run.forms), run.settings.limit, write_faults)
        self._packed = {number for number, shard in enumerate(run.shards) if joint.unpack and is_large(shard)}
        self._unpacked: Counter[int] = Counter()  # what was told of each of them
        self._unpacked_to: Counter[int] = Counter()  # and how far that is
        self._heard: dict[str, _Heard] = {}  # of parts
        self.tasks: dict[str, ShardTask] = {}
        self._largest = self._waiting = 0  # bytes of the pieces of one part, and of all that have not had their turn
        self._shards: dict[str, dict[int, ShardEntry]] = {name: {} for name in run.forms}
        self._remainders: dict[str, RemainderEntry] = {}
        self.inputs: dict[int, InputEntry] = {}
        self._late = True  # whether much may have been told before we came
        self._all_given = False  # whether the course has no more tasks to give
        self.all = Did()

    @property
    def mark(self) -> Mark:
        return self._order.mark

    @property
    def entries(self) -> dict[str, SubsetEntry]:
        """What the manifest says of each subset."""
        return {
            name: SubsetEntry([shards[number] for number in sorted(shards)], self._remainders[name])
            for name, shards in self._shards.items()
        }

    @property
    def first(self) -> Part | None:
        """The part whose turn it is."""
        return self._order.first

    @property
    def bytes(self) -> int:
        """Of the pieces that lie about, of parts that have not had their turn, too."""
        return self._spill.bytes + self._waiting

    def window(self, most: int, bound: int) -> list[Part]:
        """So many parts, at most, that may be begun: those whose pieces have room in `bound` bytes; the first in any
        case, as all wait for it."""
        found: list[Part] = []
        for part in islice(self._order.ahead(), most):
            if found and self._spill.bytes + (len(found) + 1) * self._largest > bound:
                break
            found.append(part)
        return found

    def look(self, mine: Container[str]) -> bool:
        """Take what was told since, but for what is done here, as `mine` says; whether there was anything."""
        news = False
        while (part := self._order.first) is not None:
            if self._late and not self.is_packed(part) and self.label(part) not in self._heard:
                self._catch_up()
            if not self._take(part):
                break
            news = True
        if not self._all_given and self._order.first is None:
            self._all_given = True
            self._add(self._order.finish())
        others = [label for label in self.tasks if label not in mine]
        for label, record in zip(others, self._told(others, ToldShards), strict=True):
            if record:
                self.take_shards(label, record)
                news = True
        self._run.tally.spilled = self._spill.most
        return news

    def _told(self, names: list[str], type: type[T]) -> list[T | None]:
        """What was told under some names."""

        def ask(name: str) -> T | None:
            return told(self._store, f"{self._token}/{name}", type)

        return side_by_side(ask, names) if is_far(self._run.out) else list(map(ask, names))

    def _catch_up(self) -> None:
        """Who comes late hears of many parts at once, as long as all of them were told of."""
        ahead = [self.label(part) for part in islice(self._order.ahead(), AT_ONCE) if not self.is_packed(part)]
        labels = [label for label in ahead if label not in self._heard]
        records = self._told([f"{label}-{0:04d}" for label in labels], ToldCounts)
        for label, record in zip(labels, records, strict=True):
            if record:
                self._hear_record(self._heard.setdefault(label, _Heard()), record)
        self._late = all(records)

    def _take(self, part: Part) -> bool:
        """Count what was told of the part whose turn it is; whether that was anything."""
        if self.is_packed(part):
            return self._take_packed(part, _TAKEN) > 0
        label, heard = self.label(part), self._hear(part)
        if not heard.counts:
            return False
        while heard.counts and self._order.first is part:
            counts = heard.counts.popleft()
            self._waiting -= _size_of(counts)
            self._spill.add(counts)
            self._run.tally.add(counts.checks)
            self._add(self._order.take(counts))
        if self._order.first is not part:
            self._waiting -= sum(map(_size_of, heard.counts))
            del self._heard[label]
            self.all.parts += 1
            if part.data:
                self._spill.drop_unpacked(part.data)
        return True

    def has_counts(self, part: Part) -> bool:
        """Take what was told of a part; whether that was all of it."""
        return self._hear(part).whole

    def take_counts(self, part: Part, section: int, counts: list[Counts], inputs: list[InputTold]) -> None:
        """Take what was told here, which need not be asked for."""
        heard = self._heard.get(self.label(part))
        if heard and heard.sections == section:
            for found in inputs:
                self._agree(found)
            self._add_section(heard, counts)

    def _hear(self, part: Part) -> _Heard:
        """What was told of a part by now."""
        label = self.label(part)
        heard = self._heard.setdefault(label, _Heard())
        while not heard.whole:
            [record] = self._told([f"{label}-{heard.sections:04d}"], ToldCounts)
            if record is None:
                break
            self._hear_record(heard, record)
        return heard

    def _hear_record(self, heard: _Heard, record: ToldCounts) -> None:
        for each in record.inputs:
            self._agree(each)
        counts = [msgspec.msgpack.decode(each, type=Counts) for each in record.counts]
        for piece in counts:  # not what this process does
            piece.checks = msgspec.structs.replace(piece.checks, seconds={}, compared=0)
        self._add_section(heard, counts)

    def _add_section(self, heard: _Heard, counts: list[Counts]) -> None:
        heard.counts.extend(counts)
        heard.sections += 1
        heard.whole = counts[-1].last
        self._waiting += sum(map(_size_of, counts))
        self._largest = max(self._largest, sum(map(_size_of, heard.counts)))

    # What is unpacked by one for all

    def label(self, part: Part) -> str:
        """The name that what is told of a part begins with."""
        return f"unpack-{part.ranges[0].source}" if self.is_packed(part) else part_label(part)

    def is_packed(self, part: Part) -> bool:
        """Whether a part stands for what of a packed file is not unpacked yet."""
        whole = part.data is None and part.fault is None and part.limit is None
        return whole and len(part.ranges) == 1 and part.ranges[0].source in self._packed

    def may_unpack(self, part: Part, most: int) -> bool:
        """Whether more of a packed part is wanted, where so many parts may be unpacked that nobody has tokenized; the
        one whose turn it is, in any case, as all wait for it."""
        return self._order.has(part) and (self._order.first == part or self._order.unpacked < most)

    def is_ahead(self, part: Part) -> bool:
        """Whether a part has not had its turn."""
        return self._order.has(part)

    def unpacked(self, packed: Part) -> int:
        """What was told of a packed part: so many parts, and its end."""
        return self._unpacked[packed.ranges[0].source]

    def has_unpacked(self, packed: Part) -> bool:
        """Take what was told of a packed part; whether that was all of it."""
        self._take_packed(packed, sys.maxsize)
        return not self._order.has(packed)

    def _take_packed(self, packed: Part, most: int) -> int:
        """Take what was told of a packed part, at most so many parts; how many they were."""
        taken = 0
        while taken < most and self._order.has(packed):
            [record] = self._told([f"{self.label(packed)}-{self.unpacked(packed):04d}"], ToldUnpacked)
            if record is None:
                break
            self._take_unpacked(packed, record)
            taken += 1
        return taken

    def is_next(self, packed: Part, number: int, record: ToldUnpacked) -> bool:
        """Whether nobody has told yet what follows as number so many of a packed part. Raises RunError if it is not
        what follows on what was told."""
        self.has_unpacked(packed)
        if number == self.unpacked(packed):
            self._refuse_gap(packed, record)
        return number == self.unpacked(packed)

    def _refuse_gap(self, packed: Part, record: ToldUnpacked) -> None:
        self._agree(record.read)
        source = packed.ranges[0].source
        if record.found and record.found.range.start != self._unpacked_to[source]:
            raise RunError(differs(self._run, source))

    def _take_unpacked(self, packed: Part, record: ToldUnpacked) -> None:
        self._refuse_gap(packed, record)
        number, source = self.unpacked(packed), packed.ranges[0].source
        self._unpacked[source] += 1
        self._unpacked_to[source] = (record.found.range.stop if record.found else None) or 0
        self._order.put_before(packed, record.found.part(packed.number + number) if record.found else None)

    def _agree(self, found: InputTold) -> None:
        """Raises RunError if an input is not the same for all that join."""
        known = self.inputs.setdefault(found.number, found.entry)
        if known != found.entry:
            raise RunError(differs(self._run, found.number))

    def _add(self, tasks: Iterable[ShardTask]) -> None:
        for task in tasks:
            self._spill.lend(task)
            self.tasks[_label(task)] = task
            self.all.shards += 1
        self._spill.let_go(self._order.unwanted())

    def has_shards(self, label: str) -> bool:
        """Take what was told of a shard task; whether it was."""
        [record] = self._told([label], ToldShards)
        if record:
            self.take_shards(label, record)
        return record is not None

    def take_shards(self, label: str, record: ToldShards) -> None:
        """Take what a shard task has written."""
        task = self.tasks.pop(label)
        self._shards[task.subset] |= {entry.number: entry for entry in record.shards}
        if record.remainder is not None:
            self._remainders[task.subset] = record.remainder
        self._spill.take_back(task)

    @property
    def is_done(self) -> bool:
        """Whether everything is, but for what finishes the run."""
        return self._all_given and not self.tasks


def _size_of(counts: Counts) -> int:
    """Bytes of the pieces that were put for these counts."""
    return sum(ref.size for ref in refs_of(counts))


def _label(task: ShardTask) -> str:
    return f"{task.subset}-{task.first:05d}"


def differs(run: Run, number: int) -> str:
    """That an input is not what another of those that join has read."""
    return (
        f"{run.shards[number].called} is not the same for all that join this run, or was changed since it began: give "
        f"each the same inputs, and delete {run.out}, or give another {setting('out')}, to begin anew"
    )
