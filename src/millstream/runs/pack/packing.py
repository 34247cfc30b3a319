"""The pack run: a corpus into a run folder of samples, resumable after any interruption, the same bytes every time."""

import contextlib
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from millstream.errors import RequestError, RunError, setting
from millstream.folder.entries import SubsetEntry
from millstream.folder.journal import Finished, Journal, Resumed, Started, Stopped
from millstream.folder.manifest import PIECES, write_manifest
from millstream.folder.records import delete_records, forget_parts
from millstream.folder.samples import samples_of
from millstream.runs.pack.elsewhere import delete_pieces_elsewhere
from millstream.runs.pack.ending import (
    manifest_of,
    refuse_missing,
    refuse_unlearned,
    refuse_unreadable,
    report_of,
    with_exports,
    write_tokenizer,
)
from millstream.runs.pack.faults import Faults
from millstream.runs.pack.folder import (
    Found,
    begin,
    claim,
    clear,
    delete_run,
    found_run,
    refuse_if_different,
    refuse_unknown_to_reference,
    settled,
)
from millstream.runs.pack.inline import Inline
from millstream.runs.pack.measuring import Measuring
from millstream.runs.pack.run import Loop, Run
from millstream.runs.pack.settings import Settings, with_named
from millstream.runs.pack.spill import pieces_of
from millstream.runs.pack.subset import Mark
from millstream.runs.progress import Progress, Report
from millstream.store import at, is_far, temporary

if TYPE_CHECKING:
    from millstream.runs.pack.driven import PackJob


def pack_to(
    out: str | os.PathLike[str],
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    settings: Settings | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    **named: Any,
) -> Report:
    """Pack `sources` into the run folder `out`, or go on where an earlier run of the same settings ended.

    `settings`, or its fields by name (``seq_len=2048, eos=True, workers=4``); sources as in `millstream.read`. This is
    what the command line calls. Raises RequestError for wrong settings, ResumeRefused if going on would change the
    bytes, DataError at the first bad document with ``on_error="stop"``; after any of them, and after Ctrl-C or kill -9,
    the folder is whole and the same call goes on.
    """
    run = _run(out, sources, with_named("pack_to", settings, named), on_progress)
    with _in_words(run):
        if not run.settings.join:
            return PackRun(run).run()
        from millstream.runs.pack.joining import JoinedRun

        return JoinedRun(run).run()


def pack_with(
    drive: "Callable[[PackJob], None]",
    out: str | os.PathLike[str],
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    settings: Settings | None = None,
    *,
    on_progress: Callable[[Progress], None] | None = None,
    **named: Any,
) -> Report:
    """The same as `pack_to`, but the work is done wherever `drive` has it done: it is called once, with a `PackJob`,
    and returns when all of that is done.

    What it raises ends the run, which the same call goes on with. The bytes are those of `pack_to`.
    """
    from millstream.runs.pack.driven import Driven

    settings = replace(with_named("pack_with", settings, named), workers=1)
    for name, plain in (("join", False), ("on", "local")):
        if getattr(settings, name) != plain:
            given = setting(name, getattr(settings, name))
            raise RequestError(f"{given} shares the work out by itself: leave it away, or call pack_to")
    run = _run(out, sources, settings, on_progress)
    run.elsewhere = True
    run.workers_why = "which counts; the rest was done by a function of yours"
    with _in_words(run):
        return PackRun(run, partial(Driven, drive)).run()


def _run(
    out: str | os.PathLike[str],
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    settings: Settings,
    on_progress: Callable[[Progress], None] | None,
) -> Run:
    listed = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    return Run(os.fspath(out), [os.fspath(source) for source in listed], settings, on_progress)


@contextlib.contextmanager
def _in_words(run: Run) -> Iterator[None]:
    """Raises RunError for what the system says, with what to do."""
    settings = run.settings
    try:
        yield
    except MemoryError as error:
        raise RunError(
            f"the system has no memory left: fewer {setting('workers')} need less. Run the same command again to go on"
        ) from error
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            # What goes into a bucket is in a temporary folder first, as are the faults of those who join.
            folders = [None if is_far(run.out) else run.out, settings.spill]
            folders.append(temporary() if is_far(run.out) or settings.join else None)
            disks = " or of ".join(filter(None, folders))
            raise RunError(
                f"no space left on the disk of {disks}; free some and run the same command again to go on"
            ) from error
        told = f"{error.filename}: {error.strerror}" if error.filename and error.strerror else error
        raise RunError(f"{told}. Run the same command again to go on") from error


def _loop_of(run: Run) -> Callable[..., Loop]:
    """One worker streams; what several need is only loaded for them, since a small run is mostly its start."""
    if run.workers == 1 and run.settings.on == "local":
        return Inline
    from millstream.runs.pack.driver import Pooled

    return Pooled


class PackRun:
    """One call of `pack_to`: it claims the folder, goes on where an earlier run ended, finishes and reports."""

    def __init__(self, run: Run, loop_of: Callable[..., Loop] | None = None) -> None:
        self._run, self._out, self._settings = run, run.out, run.settings
        self._loop_of = loop_of or _loop_of(run)

    def run(self) -> Report:
        out, run = self._out, self._run
        claim(out, self._settings.overwrite)
        with contextlib.closing(Journal(out)) as journal:
            found = found_run(out)
            if found is None:
                delete_run(out)
                write_tokenizer(run)
                return self._go(None, journal)
            refuse_if_different(out, found, run.identity, run.inputs)
            run.inputs.write(journal)
            if done := found.manifest:
                self._tidy()  # what a crash may have left
                return report_of(run, done, already=True, did=Mark())
            write_tokenizer(run)
            if self._settings.engine == "reference":
                refuse_unknown_to_reference(out)
            return self._go(found, journal)

    def _tidy(self) -> None:
        """Delete what an unfinished run keeps, now that it is finished, and what workers left that were killed."""
        at(self._out).sweep()
        pieces_of(self._run).delete()
        at(self._out).delete(PIECES)  # those may lie elsewhere, and here is what tells machines that they see this
        delete_pieces_elsewhere(self._out)
        delete_records(at(self._out))

    def _go(self, found: Found | None, journal: Journal) -> Report:
        run = self._run
        refuse_unreadable(run)
        first = found.mark if found else Mark()
        loop_of = self._loop_of
        found = found and settled(self._out, found, run.inputs, in_order=loop_of is Inline)
        clear(self._out, found)
        delete_pieces_elsewhere(self._out, pieces_of(run))
        if loop_of is Inline:
            pieces_of(run).delete()  # that several workers left, who were killed
            forget_parts(at(self._out))
        with contextlib.closing(
            Faults(self._out, first.fault_bytes, shards=run.shards, on_error=self._settings.on_error)
        ) as faults:
            if found is None:
                begin(self._out, run.identity, run.inputs.named())
            else:
                run.go_on(found)
            if found:
                journal.write(Resumed(workers=run.workers, ordinal=first.ordinal, read=found.read))
            else:
                journal.write(Started(workers=run.workers, ordinal=first.ordinal))
            run.measuring = Measuring(self._out, journal)
            loop: Loop | None = None
            try:
                try:
                    loop = loop_of(run, found, faults=faults, journal=journal)
                    mark, subsets = self._pack(loop, first, journal)
                    faults.finish()
                    manifest = manifest_of(run, subsets, mark)
                    refuse_missing(run, manifest)
                    manifest = with_exports(manifest, loop.export(samples_of(self._out, manifest)))
                finally:
                    if loop:
                        loop.close()  # before anything is deleted that its workers may write to
                write_manifest(self._out, manifest)
                self._tidy()
            except BaseException as error:
                if isinstance(error, RequestError) and not found and not (loop and loop.sealed):
                    delete_run(self._out)  # nothing was made of it, so that it, mended, may be another one
                with contextlib.suppress(OSError):  # on a full disk; the run has failed with its own error
                    journal.write(Stopped(reason=f"{type(error).__name__}: {error}"))
                raise
        journal.write(Finished(seconds=round(time.perf_counter() - run.started, 3)))
        did = Mark(
            bytes=mark.bytes - first.bytes,
            text_ids=mark.text_ids - first.text_ids,
            special_ids=mark.special_ids - first.special_ids,
        )
        return report_of(run, manifest, resumed=bool(found), did=did)

    def _pack(self, loop: Loop, mark: Mark, journal: Journal) -> tuple[Mark, dict[str, SubsetEntry]]:
        """(the mark at the end, what the manifest says of each subset)"""
        run = self._run
        mark = loop.pack(mark)
        run.inputs.write(journal)
        refuse_unlearned(run, mark)
        return mark, loop.finish()
