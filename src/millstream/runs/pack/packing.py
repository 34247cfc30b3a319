"""The pack run: a corpus into a run folder of samples, resumable after any interruption, the same bytes every time."""

import contextlib
import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from millstream.engines.ordered import map_ordered
from millstream.errors import DataError, RequestError, RunError, setting
from millstream.formats.corpus import find_inputs
from millstream.formats.exports import export
from millstream.formats.exports.samples import can_pad, samples_of
from millstream.formats.kinds import fault_place
from millstream.formats.manifest import (
    FAULTS,
    FORMAT,
    TEMPORARY,
    TOKENIZER,
    Journal,
    commit_file,
    file_hash,
    write_manifest,
)
from millstream.formats.parquet import check_columns
from millstream.formats.shards import Shape
from millstream.records import Cursor, Fault, Slice
from millstream.runs.pack.encode import CHECK_FIRST, Encoded
from millstream.runs.pack.extent import Extent
from millstream.runs.pack.folder import (
    NOT_COMPARED,
    claim,
    clear,
    delete_run,
    first_mark,
    found_run,
    refuse_if_different,
    refuse_unknown_to_reference,
)
from millstream.runs.pack.hints import hints_of, nothing_learned
from millstream.runs.pack.inputs import Inputs, Used
from millstream.runs.pack.ledger import make_ledger
from millstream.runs.pack.memory import workers_of
from millstream.runs.pack.numbering import Numbered
from millstream.runs.pack.reading import Reading, Unit, without_data
from millstream.runs.pack.settings import (
    MIB,
    Settings,
    chat_of,
    check_settings,
    column_flag,
    columns_of,
    identity,
    paces,
    with_named,
)
from millstream.runs.pack.subset import Mark, Subset
from millstream.runs.progress import Progress, Report
from millstream.stream.line import Strategy
from millstream.stream.tokenizers import load_tokenizer


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
    settings = with_named("pack_to", settings, named)
    listed = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    run = PackRun(os.fspath(out), [os.fspath(source) for source in listed], settings, on_progress)
    try:
        return run.run()
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            raise RunError(
                f"no space left on the disk of {run.out}; free some and run the same command again to go on"
            ) from error
        raise RunError(f"{error}. Run the same command again to go on") from error


class PackRun:
    """One call of `pack_to`; `run` does it."""

    def __init__(
        self,
        out: str,
        sources: list[str],
        settings: Settings,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        check_settings(settings)
        self.out, self.settings = out, settings
        self.on_progress = on_progress
        self.found = find_inputs(sources)
        self.shards = self.found.shards
        check_columns(self.shards, columns_of(settings)[:-1], column_flag(settings))
        self.inputs = Inputs(self.shards, columns_of(settings))
        name = settings.tokenizer_name
        self.tokenizer = load_tokenizer(name) if name else None
        self.identity = identity(settings, self.tokenizer)
        self.extent = Extent(self.shards)
        self.dtype = self.tokenizer.dtype if self.tokenizer else np.dtype(np.uint32)
        chat = chat_of(settings, self.tokenizer)
        self.reading = Reading(self.shards, settings, self.identity, self.tokenizer, chat)
        self.workers, self.workers_why = workers_of(settings, self.tokenizer, self.shards)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.started = time.perf_counter()
        self.compared = 0
        self.lost = self.unknown = self.taught = self.unlearned = self.twice = self.not_compared = 0
        self.not_compared_such_as: tuple[str, str] | None = None

    @property
    def max_document(self) -> int:
        return int(self.identity["max_document"]["bytes"])

    def run(self) -> Report:
        claim(self.out, self.settings.overwrite)
        with contextlib.closing(Journal(self.out)) as journal:
            found = found_run(self.out)
            if found is None:
                delete_run(self.out)
                self._write_tokenizer()
                return self._go(None, journal)
            refuse_if_different(self.out, found, self.identity, self.inputs)
            self.inputs.write(journal)
            if not found["complete"] and self.settings.engine == "reference":
                refuse_unknown_to_reference(self.out)
            if found["complete"]:
                return self._report(found["ledger"], found["subsets"], found.get("exports", []), already=True)
            return self._go(found, journal)

    def _write_tokenizer(self) -> None:
        if self.tokenizer and self.tokenizer.definition is not None:
            path = os.path.join(self.out, TOKENIZER)
            with open(path + TEMPORARY, "w", encoding="utf-8") as file:
                file.write(self.tokenizer.definition)
            commit_file(self.out, TOKENIZER)

    def _go(self, found: dict[str, Any] | None, journal: Journal) -> Report:
        if self.found.unreadable and self.settings.on_error == "stop":
            raise DataError(
                f"cannot read {self.found.unreadable[0]}. Mend it and run the same command again, "
                f"or go on without what is in such folders with {setting('on_error', 'skip')}"
            )
        mark = first_mark(found) if found else Mark()
        clear(self.out, found)
        subsets = self._subsets(found)
        fault_path = os.path.join(self.out, FAULTS)
        with contextlib.ExitStack() as stack:
            if mark.fault_bytes or os.path.exists(fault_path):
                os.truncate(fault_path, mark.fault_bytes)
            faults = stack.enter_context(open(fault_path, "ab"))
            if found is None:
                self._commit(subsets, Cursor())
            journal.write("resume" if found else "start", workers=self.workers, ordinal=mark.ordinal)
            first = mark
            try:
                used = Cursor(*found["read"]) if found else None
                mark = self._stream(subsets, mark, used, faults, journal)
                self.inputs.write(journal)
                if self.unlearned and not self.taught and not mark.learned:
                    raise DataError(nothing_learned(mark.ordinal))
                ledger, exports = self._finish(subsets, mark, faults)
            except BaseException as error:
                if isinstance(error, RequestError) and not found and not any(each.shards for each in subsets.values()):
                    delete_run(self.out)  # nothing was made of it, so that the request, mended, may be another one
                with contextlib.suppress(OSError):  # on a full disk; the run has failed with its own error
                    journal.write("stop", reason=f"{type(error).__name__}: {error}")
                    for subset in subsets.values():
                        subset.close()
                raise
        journal.write("done", seconds=round(time.perf_counter() - self.started, 3))
        entries = {k: v.entry(True) for k, v in subsets.items()}
        return self._report(ledger, entries, exports, resumed=bool(found), span=(first, mark))

    def _subsets(self, found: dict[str, Any] | None) -> dict[str, Subset]:
        settings, known = self.settings, self.identity
        item = 4 if known["format"] == "parquet" else self.dtype.itemsize
        whole = max(1, settings.shard_size // (settings.seq_len * item))
        metadata = {"millstream": json.dumps(known)}
        subsets = {}
        for name, pace in zip(("train", "validation"), paces(settings.validation), strict=True):
            if pace:
                shape = Shape(
                    settings.seq_len,
                    self.dtype,
                    max(1, round(whole * pace)),
                    known["format"],
                    metadata,
                    can_pad(known),
                    settings.pad_side == "left",
                    settings.masked,
                )
                strategy = Strategy(
                    settings.strategy,
                    settings.seq_len,
                    self.pad_id,
                    settings.pad_side,
                    max(1, round((known["window"] or 0) * pace)),
                    settings.max_segments,
                    settings.shuffle,
                    max(1, round((known["shuffle_window"] or 0) * pace)),
                )
                subsets[name] = Subset(name, self.out, shape, strategy, found["subsets"][name] if found else None)
        return subsets

    @property
    def pad_id(self) -> int:
        return int(self.identity["pad_id"] or 0)

    def _tasks(self, cursor: Cursor, used: Cursor | None) -> Iterator[tuple[Unit, bool]]:
        seen = 0
        for unit in self.reading.units(cursor, used):
            yield unit, seen < CHECK_FIRST
            seen += sum(piece.size for piece in unit)

    def _stream(
        self, subsets: dict[str, Subset], mark: Mark, used: Cursor | None, faults: Any, journal: Journal
    ) -> Mark:
        """Read, encode and pack everything from `mark` on; the mark at the end.

        `used` is how far an earlier run has read: nothing is committed before that is known to be unchanged.
        """
        encode, numbering = self.reading.encode(), self.reading.numbering()
        afters: list[tuple[Cursor, list[Used]]] = []  # where each unit handed to the engine ends, in order
        start, tasks = mark, self._tasks(mark.cursor, used)

        def watched() -> Iterator[tuple[Unit, bool]]:
            for unit, check_all in self._timed("read", tasks):
                afters.append((unit[-1].after, self.inputs.read(unit)))
                yield (unit if self.workers == 1 else without_data(unit, self.shards)), check_all

        results = map_ordered(
            encode,
            watched(),
            workers=self.workers,
            window_bytes=self._window(),
            size=lambda task: sum(piece.size for piece in task[0]),
            named=lambda task: _place_of(task[0]),
            on_death=lambda why: journal.write("worker died", why=why),
        )
        begin = mark
        unwritten = False
        known = used[:2] if used else (0, 0)
        shown = 0.0
        with contextlib.closing(results):
            for encoded in self._timed("wait", results):
                read, of_inputs = afters.pop(0)
                self.inputs.use(of_inputs)
                found = numbering.number(encoded, mark, read)
                self._count(encoded)
                if encoded.not_compared:
                    journal.write(NOT_COMPARED, documents=encoded.not_compared)
                compared = read[:2] >= known
                try:
                    self._record(found.faults, faults)
                except DataError:
                    if not compared:
                        # Perhaps it is bad because the input is another one: reading on to `used` says so.
                        any(afters.pop(0)[0][:2] >= known for _ in results)
                    raise
                after = replace(found.mark, fault_bytes=faults.tell())
                # A document that goes on is read again from its beginning: no mark lies inside one.
                begin = begin if encoded.opened else mark
                goes_on = begin if encoded.opened and found.alone else mark
                end = goes_on if encoded.open else after
                unwritten |= self._pack(subsets, found, begin, end)
                begin, mark = end, after
                if unwritten and compared:
                    self.inputs.write(journal)
                    self._commit(subsets, read, faults)
                    journal.write("commit", ordinal=mark.ordinal, bytes=mark.bytes)
                    unwritten = False
                now = time.perf_counter()
                if self.on_progress and now - shown > 0.1:
                    shown = now
                    self.on_progress(self._progress(mark, start))
                if self.settings.limit is not None and mark.ordinal >= self.settings.limit and not found.open:
                    break
        if self.on_progress:
            self.on_progress(self._progress(mark, start))
        return mark

    def _count(self, encoded: Encoded) -> None:
        for stage, seconds in encoded.seconds.items():
            self.seconds[stage] += seconds
        self.compared += encoded.compared
        self.taught += encoded.taught
        self.unlearned += encoded.unlearned
        self.twice += encoded.twice
        self.lost += encoded.lost
        self.unknown += encoded.unknown
        self.not_compared += len(encoded.not_compared)
        self.not_compared_such_as = self.not_compared_such_as or next(iter(encoded.not_compared.items()), None)

    def _window(self) -> int:
        return min(256 * MIB, max(self.max_document, 4 * MIB * self.workers))

    def _timed(self, stage: str, items: Iterator[Any]) -> Iterator[Any]:
        while True:
            start = time.perf_counter()
            item = next(items, self)
            self.seconds[stage] += time.perf_counter() - start
            if item is self:
                return
            yield item

    def _record(self, bad: list[Fault], faults: Any) -> None:
        for fault in bad:
            if self.settings.on_error == "stop":
                named = f" (id {fault.id!r})" if fault.id else ""
                shard = self.shards[fault.shard]
                place = fault_place(fault._replace(source=shard.called), shard.kind, shard.name)
                raise DataError(
                    f"{place}{named}: {fault.message}{'' if fault.message.endswith('?') else '.'}\n"
                    "Everything before it is kept. Mend it and run the same command again to go on, or go on without "
                    f"such documents with {setting('on_error', 'skip')}"
                )
            faults.write(json.dumps(fault._asdict(), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

    def _pack(self, subsets: dict[str, Subset], found: Numbered, begin: Mark, end: Mark) -> bool:
        start = time.perf_counter()
        batch, ordinal = found.batch, found.mark.ordinal
        if "validation" not in subsets:
            sealed = subsets["train"].add(batch, begin, end, ordinal)
        else:
            chosen = found.in_validation
            sealed = subsets["train"].add(batch.where(~chosen), begin, end, ordinal)
            sealed |= subsets["validation"].add(batch.where(chosen), begin, end, ordinal)
        self.seconds["pack and write"] += time.perf_counter() - start
        return sealed

    def _commit(self, subsets: dict[str, Subset], read: Cursor, faults: Any = None) -> None:
        if faults:
            faults.flush()
            os.fsync(faults.fileno())
        manifest = {
            **self._head(False),
            "inputs": self.inputs.entries(read.source),
            "read": list(self.inputs.with_prefix(read)),
            "subsets": {name: subset.entry(False) for name, subset in subsets.items()},
        }
        write_manifest(self.out, manifest)

    def _head(self, complete: bool) -> dict[str, Any]:
        return {"format": FORMAT, "complete": complete, "settings": self.identity}

    def _finish(
        self, subsets: dict[str, Subset], mark: Mark, faults: Any
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Seal and export what is left, and complete the manifest: its ledger and its exports."""
        start = time.perf_counter()
        settings = self.settings
        for subset in subsets.values():
            subset.finish(settings.remainder, self.pad_id, settings.pad_side)
        faults.flush()
        os.fsync(faults.fileno())
        faulty = sum(mark.faults.values())
        ledger = make_ledger(mark, {name: subset.entry(True) for name, subset in subsets.items()}, settings.seq_len)
        path = os.path.join(self.out, FAULTS)
        entry = {"name": FAULTS, "bytes": os.path.getsize(path), "sha256": file_hash(path)} if faulty else None
        if not faulty:
            os.unlink(path)
        kept = os.path.join(self.out, TOKENIZER)
        manifest: dict[str, Any] = {
            **self._head(True),
            "tokenizer_file": {"name": TOKENIZER, "bytes": os.path.getsize(kept), "sha256": file_hash(kept)}
            if os.path.exists(kept)
            else None,
            "inputs": self.inputs.entries(len(self.shards)),
            "subsets": {name: subset.entry(True) for name, subset in subsets.items()},
            "faults": entry,
            "ledger": ledger,
        }
        self.seconds["pack and write"] += time.perf_counter() - start
        manifest["exports"] = self._export(manifest)
        write_manifest(self.out, manifest)
        return ledger, manifest["exports"]

    def _export(self, manifest: dict[str, Any]) -> list[dict[str, Any]]:
        """Write the sealed samples in the other formats asked for; their manifest entries."""
        start, made = time.perf_counter(), []
        for name in self.identity["exports"] or ():
            done, out = export(name, samples_of(self.out, manifest), self.out)
            out.publish()
            made.append(asdict(done))
        self.seconds["export"] += time.perf_counter() - start
        return made

    def _progress(self, mark: Mark, start: Mark) -> Progress:
        ids = mark.text_ids + mark.special_ids
        elapsed = time.perf_counter() - self.started
        return Progress(
            mark.bytes,
            self.extent.share(mark.cursor),
            self.extent.share(start.cursor),
            mark.ordinal,
            ids,
            sum(mark.faults.values()),
            elapsed,
            dict(self.seconds),
            self.workers,
            start.bytes,
            start.text_ids + start.special_ids,
        )

    def _report(
        self,
        ledger: dict[str, Any],
        subsets: dict[str, Any],
        exports: list[dict[str, Any]],
        *,
        already: bool = False,
        resumed: bool = False,
        span: tuple[Mark, Mark] | None = None,
    ) -> Report:
        first, last = span or (Mark(), Mark())

        def samples(name: str) -> int:
            return sum(shard["samples"] for shard in subsets[name]["shards"]) if name in subsets else 0

        repeated = self.found.repeated()
        settings = self.identity
        validation = None
        if "validation" in subsets:
            validation = {"samples": samples("validation"), "shards": len(subsets["validation"]["shards"])}
        return Report(
            out=self.out,
            complete=True,
            already=already,
            resumed=resumed,
            ledger=ledger,
            seq_len=settings["seq_len"],
            samples=samples("train"),
            shards=len(subsets["train"]["shards"]),
            seconds=time.perf_counter() - self.started,
            stages={k: round(v, 3) for k, v in self.seconds.items()},
            bytes=last.bytes - first.bytes,
            ids_this_time=last.text_ids + last.special_ids - first.text_ids - first.special_ids,
            workers=self.workers,
            workers_why=self.workers_why,
            compared=self.compared,
            not_compared=self.not_compared,
            not_compared_such_as=self.not_compared_such_as,
            hints=hints_of(settings, ledger, repeated, self.unlearned, self.twice, already=already),
            unlearned=self.unlearned,
            lost=self.lost,
            unknown=self.unknown,
            tokenizer=self.tokenizer.name if self.tokenizer else None,
            settings=settings,
            validation=validation,
            exports=exports,
            ignored=self.found.ignored_by_kind(),
            unreadable=self.found.unreadable,
        )


def _place_of(unit: tuple[Slice, ...]) -> str:
    """Which part of the input a unit is, in words."""
    first, last = unit[0], unit[-1]
    what = "rows" if first.kind == "rows" else "bytes"
    to = f"{last.name}, {what} to" if last.source != first.source else "to"
    return f"{first.name}, {what} {first.start:,} {to} {last.stop:,}"
