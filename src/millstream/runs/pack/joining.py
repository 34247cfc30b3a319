"""Joining a run: the same command on any number of machines, with one folder, and whoever is last writes the manifest.

`run.json` is the claim. It is made once, by whoever comes first, and everybody compares with it what they would do.
"""

import contextlib
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import TypeVar

from millstream.corpus.sources import rough_total
from millstream.errors import DataError, RequestError, ResumeRefused, RunError, setting
from millstream.exports import FORMATS
from millstream.exports.out import delete_all
from millstream.folder.entries import InputEntry, Manifest
from millstream.folder.journal import Finished, Joined, Journal, Stopped
from millstream.folder.manifest import (
    FAULTS,
    JOURNAL,
    LEASES,
    MANIFEST,
    PIECES,
    RUN,
    is_journal,
    read_manifest,
    write_manifest,
)
from millstream.folder.records import Joint, RunRecord, begin_run, delete_records, read_run, this_version
from millstream.folder.samples import samples_of
from millstream.records import DocumentFault
from millstream.runs.pack.ending import (
    manifest_of,
    refuse_missing,
    refuse_unlearned,
    refuse_unreadable,
    report_of,
    with_exports,
    write_tokenizer,
)
from millstream.runs.pack.exporting import export_all
from millstream.runs.pack.faults import as_line, in_words
from millstream.runs.pack.folder import claim, delete_run, differences, found_run, refuse_if_different
from millstream.runs.pack.hearing import Did, differs
from millstream.runs.pack.joiner import FINISH, Joiner
from millstream.runs.pack.measuring import Measuring
from millstream.runs.pack.planning import PARTS, is_large, part_size
from millstream.runs.pack.run import Run
from millstream.runs.pack.spill import make_room, most_of, shared_pieces
from millstream.runs.pack.subset import Mark
from millstream.runs.pack.tokenizing import PIECE
from millstream.runs.progress import Report
from millstream.store import at, is_far, scratch
from millstream.store.held import refuse_without_claims
from millstream.store.lease import Leases, beating

T = TypeVar("T")

JOINED_PART = 64 << 20
"""Bytes of input in a part, of a large corpus: larger than those of one machine, as each has a lease and a record."""
_BEGINNING = 5.0
"""Seconds that another one may take to begin, and a lease more: it may have been killed in it."""
_TRIES = 50
_SHOWN = 5


class FaultsAside:
    """The faults of a run in their order, on a disk of this machine: all that join know them, and one writes them."""

    def __init__(self, run: Run) -> None:
        self._file, self._run = scratch(None), run

    def write(self, faults: Iterable[DocumentFault]) -> int:
        """Add faults; how many bytes all of them have. Raises DataError at the first, if a run stops there."""
        for fault in faults:
            if self._run.settings.on_error == "stop":
                raise DataError(
                    f"{in_words(fault, self._run.shards)}\nGo on without such documents with "
                    f"{setting('on_error', 'skip')}, or mend it, delete {self._run.out} and begin anew"
                )
            self._file.write(as_line(fault))
        return self._file.tell()

    def publish(self) -> None:
        self._file.seek(0)
        with at(self._run.out).write(FAULTS) as file:
            while data := self._file.read(1 << 20):
                file.write(data)

    def close(self) -> None:
        self._file.close()


class JoinedRun:
    """One call of `pack_to` with `join`: it claims the folder or finds it claimed, does its share, and may finish.

    `beats` keeps its leases for the time of a block, and `clock` is what they are told by.
    """

    def __init__(
        self,
        run: Run,
        *,
        beats: Callable[[Leases], AbstractContextManager[None]] = beating,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._run, self._out, self._store = run, run.out, at(run.out)
        self._beats, self._clock = beats, clock

    def run(self) -> Report:
        steps = self.steps()
        while True:
            try:
                time.sleep(next(steps))
            except StopIteration as end:
                report: Report = end.value
                return report

    def steps(self) -> Generator[float, None, Report]:
        """Do one thing after the other; after each, the seconds to wait before the next."""
        run = self._run
        self._refuse()
        claim(self._out, overwrite=False)
        if done := self._finished():
            return report_of(run, done, already=True, did=Mark())
        refuse_unreadable(run)
        if is_far(self._out):
            refuse_without_claims(self._store)
        joint = self._claimed()
        if done := self._finished():  # just now, and then ours was made in vain
            return report_of(run, done, already=True, did=Mark())
        store = self._store.below(f"{LEASES}/{joint.token}")
        leases = Leases(store, name_of(run.workers), patience=run.settings.lease, clock=self._clock)
        with contextlib.closing(Journal(self._out, leases.me)) as journal:
            journal.write(Joined(workers=run.workers, by=leases.me))
            try:
                report = yield from self._take_part(joint, leases, journal)
            except BaseException as error:
                with contextlib.suppress(OSError):  # on a full disk; the run has failed with its own error
                    journal.write(Stopped(reason=f"{type(error).__name__}: {error}"))
                raise
            journal.write(Finished(seconds=round(time.perf_counter() - run.started, 3)))
        return report

    # The claim

    def _refuse(self) -> None:
        """Raises RequestError for what those who join cannot do."""
        if any(shard.uri == "-" for shard in self._run.shards):
            raise RequestError(
                f"standard input cannot be shared: with {setting('join', True)} give files that all can read"
            )
        if self._run.settings.overwrite:
            raise RequestError(
                f"{setting('overwrite', True)} would delete what the others do: with {setting('join', True)} give a "
                "new folder, or delete this one first"
            )

    def _finished(self) -> Manifest | None:
        """The manifest, if there is one; raises ResumeRefused if it is another run's."""
        found = found_run(self._out, joined=True) if self._store.exists(MANIFEST) else None
        if found is None or found.manifest is None:
            return None
        refuse_if_different(self._out, found, self._run.identity, self._run.inputs)
        tidy(self._run)
        return found.manifest

    def _claimed(self) -> Joint:
        """How all do it. Raises RequestError or ResumeRefused, with what differs, if it is not what this call would."""
        begun = self._read() or self._begin()
        if begun is None:
            return self._joint()  # it is finished
        if begun.joint is None:
            raise RequestError(
                f"{self._out} was begun without {setting('join', True)}: finish it so, or give another {setting('out')}"
            )
        ours = self._ours()
        wrong = differences(begun.settings, ours.settings)
        if begun.millstream != ours.millstream:
            wrong.insert(0, f"millstream was {begun.millstream}, is {ours.millstream}")
        others = [] if wrong else list(_other_inputs(begun.inputs, ours.inputs))
        wrong += others
        if begun.joint.block != self._run.settings.block:
            wrong.append(f"block was {begun.joint.block}, is {self._run.settings.block}")
        if wrong:
            shown = wrong[:_SHOWN] + [f"and {len(wrong) - _SHOWN:,} more"] * (len(wrong) > _SHOWN)
            mended = "; inputs that were mended since it began need one" * bool(others)
            raise ResumeRefused(
                f"{self._out} is packed by others in another way: {'; '.join(shown)}. Give each the same command, "
                f"versions and inputs, or another {setting('out')}{mended}"
            )
        return begun.joint

    def _read(self) -> RunRecord | None:
        """`run.json`; None, too, while it is made where a disk has no links: then it is empty for a moment."""
        try:
            return read_run(self._store)
        except RunError:
            if self._store.size(RUN):
                raise
            return None

    def _ours(self) -> RunRecord:
        run = self._run
        inputs = [InputEntry(shard.name, shard.kind, _size_of(run, number)) for number, shard in enumerate(run.shards)]
        return RunRecord(millstream=this_version(), settings=run.identity, inputs=inputs, joint=self._joint())

    def _joint(self) -> Joint:
        size = part_size(rough_total(self._run.shards), JOINED_PART)
        packed = sum(map(is_large, self._run.shards))
        return Joint(
            part=size,
            piece=PIECE,
            block=self._run.settings.block,
            token=secrets.token_hex(6),
            unpack=0 < packed < PARTS,  # more of them keep all workers busy as they are
        )

    def _begin(self) -> RunRecord | None:
        """Begin the run, under the lock of those that do not join; None if it was finished meanwhile."""
        late = time.monotonic() + self._run.settings.lease + _BEGINNING
        while True:
            try:
                with contextlib.closing(Journal(self._out)):
                    # In this order: a manifest is written before run.json is deleted.
                    if self._read() is None and not self._store.exists(MANIFEST):
                        delete_run(self._out)  # an empty run.json, too, of a process killed as it made it
                        for name in [name for name, _ in self._store.entries() if is_journal(name)]:
                            if name != JOURNAL:  # of another run
                                self._store.delete(name)
                        write_tokenizer(self._run)
                        begin_run(self._store, self._ours())
            except RequestError:  # another one has it, who begins to join, or packs by itself
                if time.monotonic() > late:
                    raise
                time.sleep(0.1)
            if begun := self._read():
                return begun
            if self._store.exists(MANIFEST):
                return None

    # The work

    def _take_part(self, joint: Joint, leases: Leases, journal: Journal) -> Generator[float, None, Report]:
        run = self._run
        pieces = shared_pieces(run, joint.token)
        make_room(pieces.store, most_of(run.settings, run.dtype.itemsize, run.workers), needed=True)
        run.measuring = Measuring(self._out, journal)
        did, all, manifest = Did(), Did(), None
        try:
            with self._beats(leases), contextlib.closing(FaultsAside(run)) as faults:
                joiner = Joiner(run, joint, leases, journal=journal, write_faults=faults.write, clock=self._clock)
                did, all = joiner.did, joiner.hearing.all
                with contextlib.closing(joiner):
                    yield from joiner.steps()
                manifest = None if joiner.is_finished() else finish(joiner, run, leases, faults)
        except (OSError, LeaseLost):
            if not self._store.exists(MANIFEST):
                raise  # else what was told is deleted, by those who have finished the run
        by = "this one" if manifest else "another one"
        manifest = manifest or read_manifest(self._out)  # that the inputs are the same is known
        tidy(run)
        pieces.delete()
        shared = f"{did.parts:,} of {all.parts:,} parts and {did.shards:,} of {all.shards:,} shard tasks were done here"
        again = f"; {did.again:,} pieces that were not to be found here were made again" * bool(did.again)
        return report_of(run, manifest, did=did.mark, shared=f"{shared}; {by} wrote the manifest{again}")


class LeaseLost(RunError):
    """Whoever was to finish the run was taken for dead, and another one does."""


def finish(joiner: Joiner, run: Run, leases: Leases, faults: FaultsAside) -> Manifest:
    """Write what is left, once all parts and shards are told of: faults, exports, the manifest."""
    store = at(run.out)
    refuse_unlearned(run, joiner.hearing.mark)
    faults.publish()
    manifest = manifest_of(run, joiner.hearing.entries, joiner.hearing.mark)
    refuse_missing(run, manifest)
    for number, entry in joiner.hearing.inputs.items():
        if manifest.inputs[number] != entry:
            raise RunError(differs(run, number))
    delete_all(store, FORMATS)  # what one has left that was killed here
    exported = export_all(run.identity.exports or [], samples_of(run.out, manifest), store, workers=run.workers)
    manifest = with_exports(manifest, _while_held(exported, leases))
    write_manifest(run.out, manifest)
    return manifest


def _while_held(exported: Generator[T], leases: Leases) -> Generator[T]:
    """The same, as long as nobody else can have begun to finish the run. Raises RunError then."""
    with contextlib.closing(exported):
        for each in exported:
            _check(leases)
            yield each
    _check(leases)


def _check(leases: Leases) -> None:
    if not leases.holds(FINISH):
        raise LeaseLost(
            "this process was not heard of for too long, and another one finishes the run: run the same command again"
        )


def tidy(run: Run) -> None:
    """Delete what a run that is finished leaves; all that joined do so, each as it ends."""
    store = at(run.out)
    for _ in range(_TRIES):
        try:
            store.delete(PIECES)
            store.delete(LEASES)
            store.sweep()
            delete_records(store)
            return
        except OSError:  # another one does the same, or still writes there
            time.sleep(0.01)


def name_of(workers: int) -> str:
    """A name for this process, which no other one ever had, and that tells how many workers it has."""
    host = re.sub("[^A-Za-z0-9]+", "-", socket.gethostname())[:40]
    return f"{host}-{os.getpid()}-{secrets.token_hex(4)}x{workers}"


def _size_of(run: Run, number: int) -> int | None:
    try:
        return run.shards[number].size()
    except OSError:
        return None


def _other_inputs(then: list[InputEntry], now: list[InputEntry]) -> Iterator[str]:
    """What differs between the inputs of two that join."""
    if len(then) != len(now):
        yield f"there were {len(then):,} inputs, are {len(now):,}"
    for number, (was, here) in enumerate(zip(then, now, strict=False)):
        if was.name != here.name or was.kind != here.kind:
            yield f"input {number + 1} was {was.name} ({was.kind}), is {here.name} ({here.kind})"
        elif was.bytes != here.bytes:
            yield f"{here.name} had {was.bytes} bytes, has {here.bytes}"
