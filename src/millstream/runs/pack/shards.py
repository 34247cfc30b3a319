"""The output shards of an unfinished run, sealed in any order: where each subset begins, and their records."""

from collections.abc import Mapping

from millstream.folder.entries import RemainderEntry, ShardEntry, SubsetEntry
from millstream.folder.journal import Committed, Journal
from millstream.folder.records import SealedShards
from millstream.runs.pack.counts import ShardTask
from millstream.runs.pack.course import Start
from millstream.runs.pack.faults import Faults
from millstream.runs.pack.folder import Found
from millstream.runs.pack.run import Run
from millstream.runs.pack.subset import Mark, Sealed
from millstream.runs.pack.writing import Form, Written


def starts_of(forms: Mapping[str, Form], found: Found | None = None) -> dict[str, Start]:
    """Where the course of each subset begins: behind what was `found` sealed."""
    starts = {}
    for name, form in forms.items():
        shards = found.subset(name) if found else SealedShards()
        starts[name] = Start(
            form.strategy,
            form.shape.per_shard,
            first=len(shards.records),
            state=shards.resume.state,
            sealed=frozenset(record.entry.number for record in shards.later),
        )
    return starts


class Shards:
    """Those of a `run`, with those that were `found`; `add` what is written, and in the end they are `entries`.

    `front` is where the run would go on, were it killed.
    """

    def __init__(self, run: Run, found: Found | None, *, faults: Faults, journal: Journal) -> None:
        self._run, self._faults, self._journal = run, faults, journal
        self._known = found.read[:2] if found else (0, 0)
        earlier = {name: found.subset(name) if found else SealedShards() for name in run.forms}
        self._entries: dict[str, dict[int, ShardEntry]] = {
            name: {record.entry.number: record.entry for record in shards.all} for name, shards in earlier.items()
        }
        self._fronts = {name: _Front(shards) for name, shards in earlier.items()}
        self._remainders: dict[str, RemainderEntry] = {}
        self._unrecorded: list[tuple[str, Sealed]] = []

    @property
    def any(self) -> bool:
        """Whether any is sealed."""
        return any(self._entries.values())

    @property
    def front(self) -> Mark:
        return min((each.mark for each in self._fronts.values()), key=lambda mark: mark.ordinal)

    def add(self, task: ShardTask, written: Written, read: Mark) -> bool:
        """What a task has written, now that the inputs have been read so far; whether any got their records.

        They do once all that was used for them is known to be what an earlier run has read. What was written as the
        input is over has no record, since more may be appended to that: the manifest follows soon.
        """
        self._entries[task.subset] |= {sealed.entry.number: sealed.entry for sealed in written.shards}
        if written.remainder is not None:
            self._remainders[task.subset] = written.remainder
        if not task.over:
            self._unrecorded += [(task.subset, sealed) for sealed in written.shards if sealed.end is not None]
        if not self._unrecorded or read.cursor[:2] < self._known:
            return False
        self._run.inputs.write(self._journal)
        self._journal.flush()
        self._faults.sync()
        self._run.record(self._unrecorded, read.cursor)
        self._journal.write(Committed(ordinal=read.ordinal, bytes=read.bytes))
        for name, each in self._unrecorded:
            self._fronts[name].add(each)
        self._unrecorded.clear()
        return True

    def entries(self) -> dict[str, SubsetEntry]:
        """What the manifest says of each subset, once all are written."""
        return {
            name: SubsetEntry([entries[number] for number in sorted(entries)], self._remainders[name])
            for name, entries in self._entries.items()
        }


class _Front:
    """Where a subset would go on, were the run killed: `mark`, behind all shards that are recorded without a gap."""

    def __init__(self, found: SealedShards) -> None:
        self.mark = found.resume.mark
        self._number = len(found.records)
        self._later = {record.entry.number: record.end.mark for record in found.later}

    def add(self, sealed: Sealed) -> None:
        assert sealed.end
        self._later[sealed.entry.number] = sealed.end["mark"]
        while self._number in self._later:
            self.mark = self._later.pop(self._number)
            self._number += 1
