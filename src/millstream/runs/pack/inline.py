"""The streaming loop: units come one after the other, and what they become is packed and written here."""

import contextlib
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import replace

from millstream.errors import DataError
from millstream.exports.out import Place
from millstream.exports.tasks import Export
from millstream.folder.entries import SubsetEntry
from millstream.folder.journal import Committed, Journal, Used
from millstream.folder.samples import Samples
from millstream.records import Cursor
from millstream.runs.pack.encode import CHECK_FIRST, Encoded
from millstream.runs.pack.exporting import export_all
from millstream.runs.pack.faults import Faults
from millstream.runs.pack.folder import Found
from millstream.runs.pack.numbering import Numbered
from millstream.runs.pack.run import Run
from millstream.runs.pack.subset import Mark, Subset
from millstream.store import at

Answer = tuple[Encoded, Cursor, list[Used]]


class Inline:
    """The streaming loop of a run that goes on from what was `found`."""

    def __init__(self, run: Run, found: Found | None, *, faults: Faults, journal: Journal) -> None:
        self._run, self._faults, self._journal = run, faults, journal
        self._subsets = {
            name: Subset(name, run.out, form.shape, form.strategy, found.subset(name) if found else None)
            for name, form in run.forms.items()
        }
        # How far an earlier run has read: nothing is recorded before that is known to be unchanged.
        self._used = found.read if found else None
        self._known = found.read[:2] if found else (0, 0)
        self._numbering = run.reading.numbering()
        self._begin = Mark()  # where a document that goes on is read again from
        self._unwritten = False  # whether shards are sealed that have no record

    @property
    def sealed(self) -> bool:
        return any(subset.shards for subset in self._subsets.values())

    def pack(self, mark: Mark) -> Mark:
        start = self._begin = mark
        with contextlib.closing(self._answers(mark.cursor)) as answers:
            for encoded, read, used in answers:
                self._run.inputs.use(used)
                self._run.count(encoded.checks, self._journal)
                found = self._numbering.number(encoded, mark, read)
                fault_bytes = self._write_faults(found, read, answers)
                after = replace(found.mark, fault_bytes=fault_bytes)
                self._unwritten |= self._pack(found, encoded, mark, after)
                mark = after
                if self._unwritten and read[:2] >= self._known:
                    self._commit(mark, read)
                self._run.show(mark, start)
                if self._at_the_limit(mark) and not found.open:
                    break
        self._run.show(mark, start, at_once=True)
        return mark

    def finish(self) -> dict[str, SubsetEntry]:
        settings = self._run.settings
        with self._run.tally.time("pack and write"):
            for subset in self._subsets.values():
                subset.finish(settings.remainder, self._run.pad_id, settings.pad_side)
        return {name: subset.entry() for name, subset in self._subsets.items()}

    def export(self, subsets: Sequence[Samples]) -> Generator[tuple[Export, Place]]:
        finished = export_all(self._run.identity.exports or [], subsets, at(self._run.out), workers=1)
        with contextlib.closing(finished):
            yield from self._run.tally.timed("export", finished)

    def close(self) -> None:
        for subset in self._subsets.values():
            subset.close()

    def _at_the_limit(self, mark: Mark) -> bool:
        limit = self._run.settings.limit
        return limit is not None and mark.ordinal >= limit

    def _answers(self, cursor: Cursor) -> Generator[Answer]:
        """What became of each unit, where it ends, and what has been read of the inputs by then."""
        run, encode, seen = self._run, self._run.reading.encode(), 0
        run.inputs.look_at(cursor)
        for unit in run.tally.timed("read", run.reading.units(cursor, self._used)):
            used = run.inputs.read(unit)
            run.inputs.look_at(unit[-1].after)
            yield encode((unit, seen < CHECK_FIRST)), unit[-1].after, used
            seen += sum(piece.size for piece in unit)

    def _write_faults(self, found: Numbered, read: Cursor, answers: Iterator[Answer]) -> int:
        try:
            return self._faults.write(found.faults)
        except DataError:
            if read[:2] < self._known:
                # Perhaps it is bad because the input is another one: reading on to `used` says so.
                any(later[:2] >= self._known for _, later, _ in answers)
            raise

    def _pack(self, found: Numbered, encoded: Encoded, mark: Mark, after: Mark) -> bool:
        """Pack the documents of a unit between two marks; whether a shard was sealed."""
        start = time.perf_counter()
        # A document that goes on is read again from its beginning: no mark lies inside one.
        begin = self._begin if encoded.opened else mark
        goes_on = begin if encoded.opened and found.alone else mark
        end = goes_on if encoded.open else after
        # An open document can be in no batch yet: it is cut to a sample when it is whole.
        batch, ordinal = found.batch, found.mark.ordinal - found.open
        rest = self._run.rest(after)
        for subset in self._subsets.values():
            subset.rest = rest
        self._begin = end
        if "validation" not in self._subsets:
            sealed = self._subsets["train"].add(batch, begin, end, ordinal)
        else:
            chosen = found.in_validation
            sealed = self._subsets["train"].add(batch.where(~chosen), begin, end, ordinal)
            sealed |= self._subsets["validation"].add(batch.where(chosen), begin, end, ordinal)
        self._run.tally.seconds["pack and write"] += time.perf_counter() - start
        return sealed

    def _commit(self, mark: Mark, read: Cursor) -> None:
        self._run.inputs.write(self._journal)
        self._journal.flush()
        self._faults.sync()
        subsets = self._subsets.items()
        self._run.record(((name, each) for name, subset in subsets for each in subset.sealed[subset.recorded :]), read)
        for subset in self._subsets.values():
            subset.recorded = len(subset.sealed)
        self._journal.write(Committed(ordinal=mark.ordinal, bytes=mark.bytes))
        self._unwritten = False
