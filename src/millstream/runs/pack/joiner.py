"""One of those that join a run: it takes parts and shard tasks by leases, and what it has done it tells the others.

All of them count all parts in the order of the corpus, and so come to the same shard tasks. Nothing of that needs a
message, or any of them in particular.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial

import msgspec

from millstream.corpus.slices import not_read
from millstream.corpus.unpacked import Unpacked
from millstream.engines import Done, engine
from millstream.errors import RunError
from millstream.folder.journal import Journal, NotCompared, WorkerReplaced
from millstream.folder.manifest import MANIFEST
from millstream.folder.records import Joint
from millstream.folder.told import InputTold, ToldCounts, ToldShards, ToldUnpacked, tell
from millstream.records import DocumentFault, Part, Ref
from millstream.runs.pack.counts import Counts, ShardTask
from millstream.runs.pack.hearing import Did, Hearing, differs
from millstream.runs.pack.inputs import state_of
from millstream.runs.pack.pieces import PieceLost, StoredPieces
from millstream.runs.pack.planning import PART
from millstream.runs.pack.remaking import Remaking
from millstream.runs.pack.run import Run
from millstream.runs.pack.spill import Spill, most_of, refs_of, shared_pieces
from millstream.runs.pack.subset import Mark
from millstream.runs.pack.tokenizing import AHEAD
from millstream.runs.pack.traffic import Traffic
from millstream.runs.pack.words import ADVICE, named
from millstream.store import at
from millstream.store.lease import Leases

FINISH = "finish"
"""The lease of whoever writes the manifest."""
SECTION = 4
"""Pieces of a part whose counts are told together: of a large packed file others go on with what is there."""
UNPACKED = 2
"""Parts for each worker of all that join that may be unpacked before anybody has tokenized them."""
LISTS = 6
"""How often a minute the others are counted, at most."""
_SHORTEST, _LONGEST = 0.02, 5.0  # seconds between two looks, where there is nothing to do


@dataclass
class _Part:
    """A part that is tokenized here, as a `unit`: its counts that are not told yet, and how many sections were; for so
    many `more` answers it waits to be let on."""

    part: Part
    unit: int = -1
    counts: list[Counts] = field(default_factory=list)
    sections: int = 0
    more: int = 0


@dataclass
class _Packed:
    """A packed part that is unpacked here, as a `unit`, of which so many parts are `told`; for so many `more` answers
    it waits to be let on."""

    part: Part
    told: int
    unit: int = -1
    more: int = 0


class _OwnPieces:
    """Deletes those pieces that this process has put, or was the last to use: all need not delete all of them."""

    def __init__(self, pieces: StoredPieces) -> None:
        self._pieces = pieces
        self._own: set[str] = set()

    def add(self, refs: Iterable[Ref]) -> None:
        self._own.update(ref.name for ref in refs)

    def has(self, ref: Ref) -> bool:
        return self._pieces.has(ref)

    def drop(self, ref: Ref) -> None:
        if ref.name in self._own:
            self._own.discard(ref.name)
            self._pieces.drop(ref)


class Joiner:
    """One of those that join `run`, as its `joint` says, by `leases`. `steps` does what there is to do, until all of it
    is done by somebody: `hearing` has what it comes to. Its workers end with `close`.

    `write_faults` is as in `InOrder`.
    """

    def __init__(
        self,
        run: Run,
        joint: Joint,
        leases: Leases,
        *,
        journal: Journal,
        write_faults: Callable[[Iterable[DocumentFault]], int],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._leases, self._journal, self._clock = run, leases, journal, clock
        self._store, self._token = at(run.out), joint.token
        self._pieces = shared_pieces(run, joint.token)
        self._own = _OwnPieces(self._pieces)
        self._spill = Spill(self._own, 0)
        self.hearing = Hearing(run, joint, self._spill, write_faults)
        self._tokenize = run.reading.tokenize_part(self._pieces, None, joint.piece, shared=True)
        self._write = run.write_shards(self._pieces)
        self._unpack = run.reading.unpack(self._pieces, None, PART, shared=True)
        self._mine: set[str] = set()  # parts and tasks that are done here now, and what is unpacked
        self._parts: dict[str, _Part] = {}  # those of them that are parts
        self._packed: dict[str, _Packed] = {}  # those of them that are unpacked
        self._later: dict[str, float] = {}  # when to ask again for those that others have
        self._bound = 0  # for the pieces that lie about
        self._writing = 0
        self._workers, self._counted = run.workers, float("-inf")
        self.did = Did()
        pool = engine("local")(
            run.workers,
            depth=1,
            named=partial(named, shards=run.shards),
            on_death=lambda why: journal.write(WorkerReplaced(why=why)),
            advice=ADVICE,
        )
        self._traffic = Traffic(pool, run.tally)
        self._remaking = Remaking(
            run,
            self._tokenize,
            self._traffic,
            self._spill,
            journal=journal,
            put=lambda counts: self._own.add(refs_of(counts)),
        )
        self.close = self._traffic.close

    def is_finished(self) -> bool:
        """Whether somebody has written the manifest."""
        try:  # not `exists`, which lists a bucket for what is not there
            return bool(self._store.size(MANIFEST))
        except FileNotFoundError:
            return False

    def steps(self) -> Iterator[float]:
        """Do one thing after the other; after each, the seconds to wait before the next. Ends when the run is finished,
        or when all is done and this process has the lease to finish it."""
        pause = _SHORTEST
        while not self.is_finished():  # else what was told is gone, and all of it would be done again
            if self.hearing.look(self._mine):
                self._later = {label: when for label, when in self._later.items() if when > self._clock()}
                pause = _SHORTEST
            self._run.show(self.hearing.mark, Mark(), queue=len(self._traffic), spilled=self._spill.bytes)
            self._begin()
            self._let_on()
            if len(self._traffic) > _waiting(self._parts) + _waiting(self._packed):  # else it is for others to do
                self._traffic.wait()
                pause = _SHORTEST
                yield 0.0
                continue
            if self.hearing.is_done and self._leases.take(FINISH):
                return
            yield pause
            pause = min(2 * pause, _LONGEST, self._leases.patience / 3)

    def _begin(self) -> None:
        """Give the workers something to do, output shards first, as they let pieces go: a worker that has a long part
        writes them in between."""
        while self._begin_task() or (self._has_room and self._begin_part()):
            pass

    @property
    def _has_room(self) -> bool:
        """Whether a worker has nothing to do, or what it unpacks waits for others."""
        return len(self._traffic) - _waiting(self._packed) < self._traffic.slots

    def _begin_task(self) -> bool:
        if self._writing >= self._run.writers:
            return False
        label = self._take_lease(
            [label for label in self.hearing.tasks if self._is_free(label)], self.hearing.has_shards
        )
        if label is not None:
            self._submit(label, self.hearing.tasks[label])
        return label is not None

    def _submit(self, label: str, task: ShardTask) -> None:
        self._mine.add(label)
        self._writing += 1
        self._traffic.submit(partial(self._wrote, label, task), self._write, task, urgent=True)

    def _begin_part(self) -> bool:
        parts = {self.hearing.label(part): part for part in self._window()}
        free = [label for label, part in parts.items() if self._is_free(label) and self._may_begin(part)]
        label = self._take_lease(free, lambda label: self._is_done(parts[label]))
        if label is None:
            return False
        part = parts[label]
        self._mine.add(label)
        for each in part.ranges:
            self._run.inputs.state(each.source)
        if self.hearing.is_packed(part):
            self._begin_packed(label, part)
            return True
        here = self._parts[label] = _Part(part)
        task = self._run.part_task(part)
        here.unit = self._traffic.submit(partial(self._came, label, here), self._tokenize, task, ahead=AHEAD)
        return True

    def _may_begin(self, part: Part) -> bool:
        """Whether a part may be begun here: each worker unpacks one, but for the one that all wait for."""
        has_room = len(self._packed) < self._run.workers or part == self.hearing.first
        return has_room or not self.hearing.is_packed(part)

    def _is_done(self, part: Part) -> bool:
        return self.hearing.has_unpacked(part) if self.hearing.is_packed(part) else self.hearing.has_counts(part)

    def _let_on(self) -> None:
        """Let parts put as many pieces as may lie about; the one whose turn it is in any case, as all wait for it."""
        first = self.hearing.first
        for here in self._parts.values():
            if here.part == first or self.hearing.bytes <= self._bound:
                while here.more:
                    here.more -= 1
                    self._traffic.more(here.unit)
        most = UNPACKED * self._all_workers()
        for packed in self._packed.values():
            if packed.more and self.hearing.may_unpack(packed.part, most):
                packed.more -= 1
                self._traffic.more(packed.unit)

    def _take_lease(self, free: list[str], is_done: Callable[[str], bool]) -> str | None:
        """The first of these that is not done and that nobody else has, or about that: where many look for what is
        free, each passes over more and more."""
        at, step = 0, 1
        while at < len(free):
            label = free[at]
            if is_done(label):
                at += 1
            elif not self._leases.take(label):
                # A few looks while its holder might be taken for dead.
                self._later[label] = self._clock() + self._leases.patience / 3
                at, step = at + step, 2 * step
            elif is_done(label):  # a moment ago
                self._leases.done(label)
                at += 1
            else:
                return label
        return None

    def _window(self) -> list[Part]:
        """Parts that may be begun."""
        workers = self._all_workers()
        self._bound = most_of(self._run.settings, self._run.dtype.itemsize, workers)
        return self.hearing.window(4 * workers + SECTION, self._bound)

    def _all_workers(self) -> int:
        """How many workers there are, of all that join."""
        now = self._clock()
        if now - self._counted >= 60 / LISTS:
            self._counted = now
            self._workers = sum(workers_of_name(name) for name in self._leases.holders())
        return max(self._workers, self._run.workers)

    def _is_free(self, label: str) -> bool:
        return label not in self._mine and self._later.get(label, 0.0) <= self._clock()

    def _came(self, label: str, here: _Part, done: Done) -> None:
        """Counts of a part, or its end."""
        if not done.last:
            here.counts.append(done.result)
            here.more += 1
            if done.result.last:  # what is left of it puts nothing
                here.more = 0
                self._traffic.more(here.unit)
            if len(here.counts) == SECTION or done.result.last:
                self._tell_counts(label, here)
        elif done.error and not self._is_told(done.error, lambda: self.hearing.has_counts(here.part)):
            raise done.error
        else:
            self._mine.discard(label)
            del self._parts[label]
            self._leases.done(label)
            self.did.parts += not done.error
            if here.part.data:  # whoever has unpacked it may be dead
                self._own.add([here.part.data])
                if not self.hearing.is_ahead(here.part):
                    self._own.drop(here.part.data)

    def _tell_counts(self, label: str, here: _Part) -> None:
        counts, here.counts = here.counts, []
        inputs = [self._input(number) for number in sorted({each.source for each in here.part.ranges})]
        for each in counts:
            self._own.add(refs_of(each))
            self._run.inputs.use(self._run.inputs.used(each.seen))
            self.did.mark = self.did.mark.plus(each.mark)
            if each.checks.not_compared:
                self._journal.write(NotCompared(documents=each.checks.not_compared))
        self._run.inputs.write(self._journal)
        raw = [msgspec.Raw(msgspec.msgpack.encode(each)) for each in counts]
        record = ToldCounts(by=self._leases.me, inputs=inputs, counts=raw)
        tell(self._store, f"{self._token}/{label}-{here.sections:04d}", record)
        self.hearing.take_counts(here.part, here.sections, counts, inputs)
        here.sections += 1

    def _begin_packed(self, label: str, part: Part) -> None:
        """Have a packed part unpacked for all, from where others have come to."""
        here = self._packed[label] = _Packed(part, self.hearing.unpacked(part))
        unpack = replace(self._unpack, known=here.told)
        here.unit = self._traffic.submit(partial(self._came_unpacked, label, here), unpack, part, ahead=1)

    def _came_unpacked(self, label: str, here: _Packed, done: Done) -> None:
        """What follows of a packed part, or its end."""
        if done.error and not self._is_told(done.error, lambda: False):
            raise done.error
        if not done.error:
            self._tell_unpacked(label, here, done.result)
        here.more += 1
        if done.last:
            self._mine.discard(label)
            del self._packed[label]
            self._leases.done(label)

    def _tell_unpacked(self, label: str, here: _Packed, found: Unpacked | None) -> None:
        record = ToldUnpacked(by=self._leases.me, read=self._input(here.part.ranges[0].source), found=found)
        if self.hearing.is_next(here.part, here.told, record):
            tell(self._store, f"{self._token}/{label}-{here.told:04d}", record)
            self.hearing.has_unpacked(here.part)  # which may be what another one has told
        if found and found.data:
            self._own.add([found.data])
            if not self.hearing.is_ahead(found.part(here.part.number + here.told)):  # others were quicker
                self._own.drop(found.data)
        here.told += 1

    def _input(self, number: int) -> InputTold:
        """An input as it is here. Raises RunError if it cannot be read, or has become another one since we began."""
        shard, entry = self._run.shards[number], self._run.inputs.fingerprint(number)
        then, now = self._run.inputs.state(number), state_of(shard)
        if entry.unreadable or now is None:
            raise RunError(not_read(shard.called))
        if then is None or then[:4] != now[:4]:
            raise RunError(differs(self._run, number))
        return InputTold(number, entry)

    def _wrote(self, label: str, task: ShardTask, done: Done) -> None:
        if done.error and self._is_told(done.error, lambda: self.hearing.has_shards(label)):
            self._end_task(label)
            self._leases.done(label)
            return
        if isinstance(done.error, PieceLost):
            self._make_again(label, task, done.error)
            return
        if done.error:
            raise done.error
        self._end_task(label)
        self._run.tally.seconds["pack and write"] += done.result.seconds
        self._own.add(piece.ref for piece in task.pieces)
        shards = [sealed.entry for sealed in done.result.shards]
        record = ToldShards(by=self._leases.me, shards=shards, remainder=done.result.remainder)
        tell(self._store, f"{self._token}/{label}", record)
        self.hearing.take_shards(label, record)
        self._leases.done(label)
        self.did.shards += 1

    def _end_task(self, label: str) -> None:
        self._mine.discard(label)
        self._writing -= 1

    def _make_again(self, label: str, task: ShardTask, lost: PieceLost) -> None:
        """Have the part done again that a lost piece is of, and then the task."""

        def then() -> None:
            self._writing -= 1
            self._submit(label, task)

        self._remaking.make(lost, then)
        self.did.again += 1

    def _is_told(self, error: BaseException, is_done: Callable[[], bool]) -> bool:
        """Whether what went wrong matters to nobody: somebody who took us for dead has done it, and what it was made of
        may be gone."""
        return isinstance(error, PieceLost | OSError) and (self.is_finished() or is_done())


def _waiting(units: dict[str, _Part] | dict[str, _Packed]) -> int:
    """How many of these wait to be let on."""
    return sum(here.more > 0 for here in units.values())


def workers_of_name(name: str) -> int:
    """How many workers one of those that join has, as its name tells.

    >>> workers_of_name("node3-4711-a1b2x8"), workers_of_name("other")
    (8, 1)
    """
    workers = name.rpartition("x")[2]
    return int(workers) if workers.isdecimal() else 1
