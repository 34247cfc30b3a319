"""Parts of the corpus on their way: begun ahead of their turn, and counted when they have it, whenever they come."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from millstream.corpus.unpacked import Unpack
from millstream.engines import Done
from millstream.errors import DataError
from millstream.records import Cursor, Part
from millstream.runs.pack.counts import Counts, placed
from millstream.runs.pack.planning import Planning
from millstream.runs.pack.sealing import Sealing
from millstream.runs.pack.shop import Shop
from millstream.runs.pack.spill import refs_of
from millstream.runs.pack.subset import Mark
from millstream.runs.pack.tokenizing import AHEAD
from millstream.runs.pack.wanted import Wanted


@dataclass
class _Begun:
    """A part that was handed out: `counts` came and wait for their turn, `taken` had it; the first `skip` are known
    already. It waits for `more` answers to be allowed. `all` that came is kept for its record, unless it
    will have none. `over`: nothing comes any more, as it is done, or has failed with `error`."""

    part: Part
    unit: int = -1
    skip: int = 0
    counts: deque[Counts] = field(default_factory=deque)
    taken: int = 0
    more: int = 0
    all: list[Counts] | None = field(default_factory=list)
    start: Mark | None = None
    over: bool = False
    error: BaseException | None = None


class PartsInTurn:
    """The parts of the run in a `shop` from a `mark` on, of about `size` bytes: `begin` some, `let_on` those that go
    on, `take` the counts whose turn it is, until they are `over`. `mark` is how far that is.

    What is counted goes to `sealing`. An earlier call had `read` so far.
    """

    def __init__(self, shop: Shop, sealing: Sealing, mark: Mark, *, size: int, read: Cursor | None) -> None:
        run, self.mark = shop.run, mark
        self._shop, self._run, self._spill, self._traffic = shop, run, shop.spill, shop.traffic
        self._parts, self._sealing = shop.parts, sealing
        self._known = read[:2] if read else (0, 0)
        unpack = run.reading.unpack(shop.pieces.lasting, read, size, shared=shop.tokenize.shared)
        planned = run.reading.parts(mark.cursor, size)
        self._plan = Planning(planned, run.shards, unpack=unpack, workers=run.workers)
        self._begun: deque[_Begun] = deque()  # in the order of the corpus
        self._wanted = Wanted(run.settings.limit)

    @property
    def over(self) -> bool:
        return not self._begun and (self._plan.over or self._at_the_limit)

    @property
    def have_come(self) -> bool:
        """Whether the part whose turn it is has counts already, as one that is known has: nobody need wait."""
        return bool(self._begun and self._begun[0].counts)

    # Begun

    def begin(self) -> None:
        """Hand out parts, as long as there is room for them and their pieces."""
        while self._traffic.room and not self._at_the_limit and self._may_come(not self._begun, self._coming):
            if self._plan.failed and self._begun:
                return  # what comes before the error has its turn first
            part = self._next()
            if part is None:
                return
            if self._wanted.is_over(part):
                self._drop_data(part)
            elif known := self._parts.take(part, self._spill):
                self._begun.append(_Begun(part, counts=deque(known), over=True))
            else:
                self._parts.look_at(part)
                self._begun.append(self._begin(part))

    def _next(self) -> Part | None:
        """The next part, if there is one yet. Raises what unpacking it raised."""
        if self._plan.failed:
            self._sealing.write_complete()
        return self._plan.next(partial(self._unpack, self._plan.ahead))

    def _unpack(self, ahead: int, unpack: Unpack, part: Part, came: Callable[[Done], None]) -> Callable[[], None]:
        """Have a packed input unpacked; a function that lets another piece of it be put."""
        unit = self._traffic.submit(came, unpack, part, ahead=ahead)
        return partial(self._traffic.more, unit)

    def _drop_data(self, part: Part) -> None:
        """What was unpacked for a part has been read."""
        if part.data:
            self._shop.pieces.drop(part.data)

    @property
    def _coming(self) -> int:
        """Parts that have put nothing yet."""
        return sum(not (begun.over or begun.counts or begun.taken) for begun in self._begun)

    def _begin(self, part: Part, skip: int = 0) -> _Begun:
        begun = _Begun(part, skip=skip)
        task = self._run.part_task(part)
        begun.unit = self._traffic.submit(partial(self._came, begun), self._shop.tokenize, task, ahead=AHEAD)
        return begun

    def _came(self, begun: _Begun, done: Done) -> None:
        """Counts of a part, or its end."""
        if done.last:
            begun.over, begun.error = True, done.error
            if begun.all and not done.error and all(map(self._spill.has, begun.all)):
                self._parts.record(begun.part, begun.all)
            begun.all = None
            return
        counts: Counts = done.result
        self._spill.add(counts)
        begun.counts.append(counts)
        if begun.all is not None:
            begun.all.append(counts)
            if not self._spill.has(begun.all[0]):  # some pieces are used before the last ones come
                begun.all = None
        begun.more += 1
        if counts.last:  # what is left of it puts nothing
            self._let_on(begun)

    def let_on(self) -> None:
        """Let parts put as many pieces as may lie about; the one whose turn it is in any case, as the others wait
        for it."""
        for begun in self._begun:
            if self._may_come(begun is self._begun[0]):
                self._let_on(begun)

    def _may_come(self, first: bool, coming: int = 0) -> bool:
        """Whether there is room for a piece more, or none will be let go without it: the `first` that is waited for is
        needed for the next output shards, unless some are still to be written, which let pieces go."""
        return not self._spill.full(coming) or (first and not self._sealing.left)

    def _let_on(self, begun: _Begun) -> None:
        while begun.more:
            begun.more -= 1
            self._traffic.more(begun.unit)

    # Counted

    def take(self) -> None:
        """Count what has come, as far as it follows on what was counted before. Raises what a part raised."""
        while self._begun:
            begun = self._begun[0]
            begun.start = begun.start or self.mark
            if self._wanted.is_over(begun.part) and not begun.taken:
                self._give_up(self._begun.popleft())
            elif begun.counts:
                self._take(begun, begun.counts.popleft())
            elif begun.over:
                self._begun.popleft()
                if begun.error:
                    self._sealing.write_complete()
                    raise begun.error
                self._drop_data(begun.part)
            else:
                return
            if self._at_the_limit:
                self._give_up_all()

    def _take(self, begun: _Begun, counts: Counts) -> None:
        begun.taken += 1
        before = self.mark
        if begun.taken <= begun.skip:
            self._spill.let_go(refs_of(counts))
        elif self._wanted.is_too_much(begun.part, counts, before):
            self._only_what_is_wanted(begun)
        else:
            counts.mark = replace(counts.mark, fault_bytes=self._write_faults(begun, counts))
            self.mark = before.plus(counts.mark)
            self._run.count(counts.checks, self._shop.journal)
            self._run.inputs.use(self._run.inputs.used(counts.seen))
            self._wanted.count(counts, self.mark)
            self._sealing.count(counts, before, self.mark)

    def _only_what_is_wanted(self, begun: _Begun) -> None:
        """Have a part done again, with the documents that are wanted of it."""
        assert begun.start
        self._give_up_all()
        again = self._begin(self._wanted.of(begun.part, begun.start), skip=begun.taken - 1)
        again.start = begun.start
        self._begun.append(again)

    def _write_faults(self, begun: _Begun, counts: Counts) -> int:
        """Bytes that the faults of a piece take in faults.jsonl."""
        try:
            return self._shop.faults.write(placed(counts.faults, self.mark)) - self.mark.fault_bytes
        except DataError:
            self._read_to_known(begun, counts)
            self._sealing.write_complete()
            raise

    def _read_to_known(self, begun: _Begun, counts: Counts) -> None:
        """Perhaps it is bad because the input is another one: reading on to where an earlier run was says so."""
        latest = counts.mark.cursor[:2]
        while latest < self._known and not (begun.over and not begun.counts):
            if begun.counts:
                latest = begun.counts.popleft().mark.cursor[:2]
            else:
                self._let_on(begun)
                self._traffic.wait()
        if begun.error:
            raise begun.error
        self._give_up_all()
        while latest < self._known and not self._plan.over:
            part = self._next()
            if part is None:
                self._traffic.wait()
            else:
                latest = max(latest, (part.ranges[-1].source, part.ranges[-1].start))
                self._drop_data(part)

    # Not wanted

    @property
    def _at_the_limit(self) -> bool:
        return self._wanted.is_enough(self.mark)

    def _give_up_all(self) -> None:
        while self._begun:
            self._give_up(self._begun.popleft())

    def _give_up(self, begun: _Begun) -> None:
        """What has come of a part, and what still comes, is not wanted."""
        for counts in begun.counts:
            self._spill.let_go(refs_of(counts))

        def ignore(done: Done) -> None:
            if not done.last:
                self._spill.add(done.result)
                self._spill.let_go(refs_of(done.result))

        if not begun.over:
            self._traffic.hand_over(begun.unit, ignore)
            self._traffic.give_up(begun.unit)  # else it waits for ever to be let on, and keeps others from its place
