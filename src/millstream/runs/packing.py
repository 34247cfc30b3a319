"""The pack run: a corpus into a run folder of samples, resumable after any interruption, the same bytes every time."""

import contextlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from millstream.engines.local import map_ordered
from millstream.errors import DataError, RequestError, ResumeRefused, RunError
from millstream.formats.documents import Fields
from millstream.formats.manifest import (
    FAULTS,
    FORMAT,
    JOURNAL,
    MANIFEST,
    TEMPORARY,
    TOKENIZER,
    Journal,
    commit_file,
    file_hash,
    read_manifest,
    remainder_name,
    shard_names,
    write_manifest,
)
from millstream.formats.shards import Shape
from millstream.formats.slices import Limits, slices, units
from millstream.formats.sources import InputShard, expand, fingerprint, prefix_hash
from millstream.records import Fault, Cursor, Slice, TokenBatch
from millstream.runs.encode import CHECK_FIRST, Encode, Encoded
from millstream.runs.ledger import make_ledger
from millstream.runs.settings import MIB, Settings, check_settings, choose_workers, identity
from millstream.runs.subset import Mark, Subset
from millstream.stream.pack import Concat, Packer, Split
from millstream.stream.tokenizers import load_tokenizer


class Progress(NamedTuple):
    """How far a run is, for whoever shows it. Bytes are decompressed where the input is."""

    bytes: int
    total_bytes: int | None
    documents: int
    ids: int
    faults: int
    seconds: float
    stages: dict[str, float]
    workers: int
    bytes_before: int
    ids_before: int


@dataclass(frozen=True)
class Report:
    """How a run ended. `ledger` is the manifest's; `stages` are seconds of work by stage, over all processes."""

    out: str
    complete: bool
    already: bool
    resumed: bool
    ledger: dict[str, Any]
    seq_len: int
    samples: int
    shards: int
    seconds: float
    stages: dict[str, float]
    bytes: int
    ids_this_time: int
    workers: int
    workers_why: str
    compared: int
    hints: list[str]
    tokenizer: str | None
    validation: dict[str, Any] | None = None

    @property
    def faults(self) -> int:
        return int(self.ledger["documents"]["faulty"])

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "faults": self.faults}


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
    if named:
        settings = replace(settings or Settings(), **named)
    listed = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    run = PackRun(os.fspath(out), [os.fspath(source) for source in listed], settings or Settings(), on_progress)
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
        self.inputs = expand(sources)
        self.tokenizer = load_tokenizer(settings.tokenizer) if settings.tokenizer else None
        if self.tokenizer is None and not settings.ids_field:
            raise RequestError("give a tokenizer, or --ids-field for text that is tokenized already")
        self.identity = identity(settings, self.tokenizer)
        self.total_bytes = _total_bytes(self.inputs)
        self.workers, self.workers_why = choose_workers(settings, self.max_document, self.total_bytes)
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.started = time.perf_counter()
        self.compared = 0
        self.fingerprints: list[dict[str, Any] | None] = [None] * len(self.inputs)

    @property
    def max_document(self) -> int:
        return int(self.identity["max_document"]["bytes"])

    # The folder ----------------------------------------------------------------------------------------------------

    def run(self) -> Report:
        self._claim()
        journal = Journal(self.out)
        try:
            found = self._found()
            if found is None:
                _delete_all_but_journal(self.out)
                self._write_tokenizer()
            elif found["complete"]:
                self._same(found, finished=True)
                return self._report(found["ledger"], found["subsets"], already=True)
            else:
                self._same(found)
            return self._go(found, journal)
        finally:
            journal.close()

    def _claim(self) -> None:
        """Make the folder, or see that it is ours; with `overwrite`, start it anew."""
        try:
            names = set(os.listdir(self.out))
        except FileNotFoundError:
            os.makedirs(self.out)
            return
        except NotADirectoryError:
            raise RequestError(f"{self.out} is a file; --out wants a folder") from None
        begun = {JOURNAL, FAULTS, TOKENIZER, TOKENIZER + TEMPORARY, MANIFEST + TEMPORARY}
        if MANIFEST not in names and names and not (JOURNAL in names and names <= begun):
            raise RequestError(
                f"{self.out} has files that are not millstream's; give an empty or a new folder as --out"
            )
        if MANIFEST in names and self.settings.overwrite:
            with contextlib.suppress(RunError):  # damaged, but ours
                read_manifest(self.out)
            with contextlib.closing(Journal(self.out)):
                _delete_all_but_journal(self.out)
                os.truncate(os.path.join(self.out, JOURNAL), 0)

    def _found(self) -> dict[str, Any] | None:
        if not os.path.exists(os.path.join(self.out, MANIFEST)):
            return None
        return read_manifest(self.out)

    def _write_tokenizer(self) -> None:
        if self.tokenizer and self.tokenizer.definition is not None:
            path = os.path.join(self.out, TOKENIZER)
            with open(path + TEMPORARY, "w", encoding="utf-8") as file:
                file.write(self.tokenizer.definition)
            commit_file(self.out, TOKENIZER)

    def _same(self, found: dict[str, Any], finished: bool = False) -> None:
        """Raises ResumeRefused, naming each difference, if going on would not give the bytes of one run."""
        asked = dict(self.identity)
        if self.settings.max_document is None:
            asked["max_document"] = found["settings"]["max_document"]
        wrong = [
            f"{_flag(key)} was {_shown(found['settings'].get(key))}, is {_shown(value)}"
            for key, value in asked.items()
            if found["settings"].get(key) != value
        ]
        self.identity = asked
        if not wrong:
            wrong = self._changed_inputs(found, finished)
        if wrong:
            state = "is finished with other settings or inputs" if finished else "was begun differently"
            raise ResumeRefused(
                f"{self.out} {state}:\n  " + "\n  ".join(wrong) + "\n"
                "Give the same command to go on, another --out, or --overwrite to start anew"
            )

    def _changed_inputs(self, found: dict[str, Any], finished: bool) -> list[str]:
        """What changed of the inputs that were used; what lies behind the last sealed cursor may be mended."""
        then = found["inputs"]
        cursor = Cursor(len(then)) if finished else self._first_mark(found).cursor
        wrong = []
        names = [shard.name for shard in self.inputs]
        for number, entry in enumerate(then[: cursor.source + 1]):
            if number >= len(names) or names[number] != entry["name"]:
                now = names[number] if number < len(names) else "not given"
                wrong.append(f"input {number + 1} was {entry['name']}, is {now}")
            elif number < cursor.source and entry != self._fingerprint(number):
                wrong.append(f"{names[number]} has changed since it was packed")
        if finished and len(names) > len(then):
            wrong.append(f"input {len(then) + 1} was not given, is {names[len(then)]}")
        used = found.get("prefix")
        if not wrong and not finished and used and cursor.source < len(self.inputs):
            shard = self.inputs[cursor.source]
            if shard.seekable and shard.kind != "parquet" and cursor.offset:
                try:
                    same = prefix_hash(shard, cursor.offset) == used
                except OSError as error:
                    raise RunError(f"{shard.name} cannot be read: {error.strerror}") from error
                if not same:
                    wrong.append(f"{shard.name} has changed before byte {cursor.offset:,}, where the run goes on")
        return wrong

    def _fingerprint(self, number: int) -> dict[str, Any]:
        known = self.fingerprints[number]
        if known is None:
            shard = self.inputs[number]
            try:
                known = fingerprint(shard)
            except OSError:
                known = {"name": shard.name, "unreadable": True}
            self.fingerprints[number] = known
        return known

    @staticmethod
    def _first_mark(found: dict[str, Any]) -> Mark:
        marks = [Mark.load(subset["resume"]["mark"]) for subset in found["subsets"].values()]
        return min(marks, key=lambda mark: mark.ordinal)

    # The run -------------------------------------------------------------------------------------------------------

    def _go(self, found: dict[str, Any] | None, journal: Journal) -> Report:
        mark = self._first_mark(found) if found else Mark()
        known = self._known_files(found)
        for name in os.listdir(self.out):
            if name not in known and (name.endswith(TEMPORARY) or _is_shard(name)):
                os.unlink(os.path.join(self.out, name))
        subsets = self._subsets(found)
        fault_path = os.path.join(self.out, FAULTS)
        with contextlib.ExitStack() as stack:
            if mark.fault_bytes or os.path.exists(fault_path):
                os.truncate(fault_path, mark.fault_bytes)
            faults = stack.enter_context(open(fault_path, "ab"))
            if found is None:
                self._commit(subsets)
            journal.write("resume" if found else "start", workers=self.workers, ordinal=mark.ordinal)
            first = mark
            try:
                mark = self._stream(subsets, mark, faults, journal)
                ledger = self._finish(subsets, mark, faults)
            except BaseException as error:
                with contextlib.suppress(OSError):  # on a full disk; the run has failed with its own error
                    journal.write("stop", reason=f"{type(error).__name__}: {error}")
                    for subset in subsets.values():
                        subset.close()
                raise
        journal.write("done", seconds=round(time.perf_counter() - self.started, 3))
        return self._report(
            ledger, {k: v.entry(True) for k, v in subsets.items()}, resumed=bool(found), span=(first, mark)
        )

    def _subsets(self, found: dict[str, Any] | None) -> dict[str, Subset]:
        settings = self.settings
        dtype = self.tokenizer.dtype if self.tokenizer else np.dtype(np.uint32)
        item = 4 if settings.format == "parquet" else dtype.itemsize
        whole = max(1, settings.shard_size // (settings.seq_len * item))
        fraction = settings.validation
        sizes = {"train": whole}
        if fraction:
            # Both subsets' shards fill at the same pace, so that neither keeps the other from going on late.
            sizes["train"] = max(1, round(whole * min(1.0, (1 - fraction) / fraction)))
            sizes["validation"] = max(1, round(whole * min(1.0, fraction / (1 - fraction))))
        metadata = {"millstream": json.dumps(self.identity)}
        subsets = {}
        for name, size in sizes.items():
            packer: Packer
            if settings.strategy == "split":
                packer = Split(settings.seq_len, dtype, self.pad_id, settings.pad_side)
            else:
                packer = Concat(settings.seq_len, dtype)
            shape = Shape(settings.seq_len, dtype, size, settings.format, metadata)
            subsets[name] = Subset(name, self.out, shape, packer, found["subsets"][name] if found else None)
        return subsets

    @property
    def pad_id(self) -> int:
        return int(self.identity["pad_id"] or 0)

    def _tasks(self, cursor: Cursor) -> Iterator[tuple[tuple[Slice, ...], bool]]:
        settings = self.settings
        fixed = self.identity["max_document"]
        limits = Limits(
            fixed["bytes"],
            fixed["bytes"] if fixed["plain_text_too"] else None,
            bool(self.tokenizer and self.tokenizer.safe_cuts),
        )
        columns = (settings.ids_field or settings.text_field, settings.id_field)
        seen = 0
        for unit in units(slices(self.inputs, cursor, limits, columns, settings.block), settings.block):
            yield unit, seen < CHECK_FIRST
            seen += sum(piece.size for piece in unit)

    def _stream(self, subsets: dict[str, Subset], mark: Mark, faults: Any, journal: Journal) -> Mark:
        """Read, encode and pack everything from `mark` on; the mark at the end."""
        encode = self._encode()
        afters: list[Cursor] = []  # where each unit handed to the engine ends, in order
        start, tasks = mark, self._tasks(mark.cursor)

        def watched() -> Iterator[tuple[tuple[Slice, ...], bool]]:
            for unit, check_all in self._timed("read", tasks):
                afters.append(unit[-1].after)
                yield (unit if self.workers == 1 else _without_data(unit, self.inputs)), check_all

        results = map_ordered(
            encode,
            watched(),
            workers=self.workers,
            window_bytes=self._window(),
            size=lambda task: sum(piece.size for piece in task[0]),
        )
        begin = mark
        shown = 0.0
        with contextlib.closing(results):
            for encoded in self._timed("wait", results):
                after, batch, bad = self._number(encoded, mark, afters.pop(0))
                self._record(bad, faults)
                after = replace(after, fault_bytes=faults.tell())
                # A document that goes on is read again from its beginning: no mark lies inside one.
                begin = begin if encoded.opened else mark
                goes_on = begin if encoded.opened and len(batch) == 1 else mark
                end = goes_on if encoded.open else after
                sealed = self._pack(subsets, encoded, batch, begin, end, after.ordinal)
                begin, mark = end, after
                if sealed:
                    self._commit(subsets, faults)
                    journal.write("commit", ordinal=mark.ordinal, bytes=mark.bytes)
                now = time.perf_counter()
                if self.on_progress and now - shown > 0.1:
                    shown = now
                    self.on_progress(self._progress(mark, start))
                if self.settings.limit is not None and mark.ordinal >= self.settings.limit:
                    break
        if self.on_progress:
            self.on_progress(self._progress(mark, start))
        return mark

    def _encode(self) -> Encode:
        settings, tokenizer = self.settings, self.tokenizer
        return Encode(
            Fields(
                settings.text_field,
                settings.id_field,
                settings.ids_field,
                tokenizer.vocab_size - 1 if tokenizer else 0xFFFFFFFF,
            ),
            settings.tokenizer if tokenizer else None,
            self.identity["bos_id"],
            self.identity["eos_id"],
            self.max_document,
            settings.validation,
            settings.engine,
        )

    def _window(self) -> int:
        return max(MIB, min(256 * MIB, 4 * MIB * self.workers, self.max_document))

    def _timed(self, stage: str, items: Iterator[Any]) -> Iterator[Any]:
        while True:
            start = time.perf_counter()
            item = next(items, self)
            self.seconds[stage] += time.perf_counter() - start
            if item is self:
                return
            yield item

    def _number(self, encoded: Encoded, mark: Mark, cursor: Cursor) -> tuple[Mark, TokenBatch, list[Fault]]:
        """Give the documents of a unit their ordinals and the faults their lines; the mark behind it."""
        limit = self.settings.limit
        lines = Counter({mark.cursor.source: mark.line})  # before this unit; a later input shard begins with it
        bad = [
            fault._replace(
                ordinal=mark.ordinal + fault.ordinal,
                line=fault.line and fault.line + lines[fault.shard],
            )
            for fault in encoded.faults
        ]
        for source, count in encoded.lines:
            lines[source] += count
        ordinal = encoded.position + mark.ordinal
        batch = TokenBatch(
            encoded.ids,
            encoded.length,
            ordinal.astype(np.uint64),
            np.zeros(len(ordinal), np.int64),
            encoded.doc_ids,
            encoded.source,
            encoded.offset,
            encoded.open,
        )
        if encoded.opened and len(batch):
            batch.start[0] = self._open_ids
        count = encoded.count
        if limit is not None and mark.ordinal + count > limit:
            batch = batch.rows(0, int((ordinal < limit).sum()))
            bad = [fault for fault in bad if fault.ordinal < limit]
            count = limit - mark.ordinal
        self._open_ids = int(batch.start[-1] + batch.length[-1]) if batch.open else 0
        filled = batch.length > 0
        begun = int((filled & (batch.start == 0)).sum())
        ended = int(filled.sum()) - batch.open
        specials = begun * (self.identity["bos_id"] is not None) + ended * (self.identity["eos_id"] is not None)
        counts = Counter(mark.faults)
        counts.update(fault.reason for fault in bad)
        for stage, seconds in encoded.seconds.items():
            self.seconds[stage] += seconds
        self.compared += encoded.compared
        after = Mark(
            cursor,
            mark.ordinal + count,
            lines[cursor.source],
            mark.text_ids + len(batch.ids) - specials,
            mark.special_ids + specials,
            mark.fault_bytes,
            dict(sorted(counts.items())),
            mark.bytes + encoded.size,
        )
        return after, batch, bad

    _open_ids = 0

    def _record(self, bad: list[Fault], faults: Any) -> None:
        for fault in bad:
            if self.settings.on_error == "stop":
                named = f" (id {fault.id!r})" if fault.id else ""
                raise DataError(
                    f"{fault.place}{named}: {fault.message}.\n"
                    "Everything before it is kept. Mend it and run the same command again to go on, or go on without "
                    "such documents with --on-error skip"
                )
            faults.write(json.dumps(fault._asdict(), ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n")

    def _pack(
        self,
        subsets: dict[str, Subset],
        encoded: Encoded,
        batch: TokenBatch,
        begin: Mark,
        end: Mark,
        ordinal: int,
    ) -> bool:
        start = time.perf_counter()
        if "validation" not in subsets:
            sealed = subsets["train"].add(batch, begin, end, ordinal)
        else:
            chosen = encoded.in_validation[: len(batch)]
            sealed = subsets["train"].add(batch.where(~chosen), begin, end, ordinal)
            sealed |= subsets["validation"].add(batch.where(chosen), begin, end, ordinal)
        self.seconds["pack and write"] += time.perf_counter() - start
        return sealed

    def _commit(self, subsets: dict[str, Subset], faults: Any = None) -> None:
        if faults:
            faults.flush()
            os.fsync(faults.fileno())
        first = min((subset.mark for subset in subsets.values()), key=lambda m: m.ordinal)
        source = first.cursor.source
        prefix = None
        if source < len(self.inputs) and self.inputs[source].seekable and first.cursor.offset:
            prefix = prefix_hash(self.inputs[source], first.cursor.offset)
        manifest = {
            **self._head(False),
            "inputs": [
                self._fingerprint(n) if n < source else {"name": shard.name} for n, shard in enumerate(self.inputs)
            ],
            "prefix": prefix,
            "subsets": {name: subset.entry(False) for name, subset in subsets.items()},
        }
        write_manifest(self.out, manifest)

    def _head(self, complete: bool) -> dict[str, Any]:
        return {"format": FORMAT, "complete": complete, "settings": self.identity}

    def _finish(self, subsets: dict[str, Subset], mark: Mark, faults: Any) -> dict[str, Any]:
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
        manifest = {
            **self._head(True),
            "tokenizer_file": {"name": TOKENIZER, "bytes": os.path.getsize(kept), "sha256": file_hash(kept)}
            if os.path.exists(kept)
            else None,
            "inputs": [self._fingerprint(number) for number in range(len(self.inputs))],
            "subsets": {name: subset.entry(True) for name, subset in subsets.items()},
            "faults": entry,
            "ledger": ledger,
        }
        write_manifest(self.out, manifest)
        self.seconds["pack and write"] += time.perf_counter() - start
        return ledger

    def _known_files(self, found: dict[str, Any] | None) -> set[str]:
        known = {MANIFEST, JOURNAL, FAULTS, TOKENIZER}
        for subset in (found or {"subsets": {}})["subsets"].values():
            known |= {file["name"] for shard in subset["shards"] for file in shard["files"].values()}
        return known

    def _progress(self, mark: Mark, start: Mark) -> Progress:
        ids = mark.text_ids + mark.special_ids
        elapsed = time.perf_counter() - self.started
        return Progress(
            mark.bytes,
            self.total_bytes,
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
        *,
        already: bool = False,
        resumed: bool = False,
        span: tuple[Mark, Mark] | None = None,
    ) -> Report:
        first, last = span or (Mark(), Mark())

        def samples(name: str) -> int:
            return sum(shard["samples"] for shard in subsets[name]["shards"]) if name in subsets else 0

        hints = []
        settings = self.identity
        if self.tokenizer and settings["bos_id"] is None and settings["eos_id"] is None and not settings["ids_field"]:
            hints.append(
                "neither BOS nor EOS separates documents: a model cannot see where one ends; --eos adds one"
                if settings["strategy"] == "concat"
                else "no EOS ends a document: a model never learns to stop; --eos adds one"
            )
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
            hints=hints,
            tokenizer=self.tokenizer.name if self.tokenizer else None,
            validation=validation,
        )


def _total_bytes(inputs: list[InputShard]) -> int | None:
    """Bytes of input, for the time left; None where it is not known (standard input) or not comparable (packed)."""
    if any(not shard.seekable for shard in inputs):
        return None
    total = 0
    for shard in inputs:
        with contextlib.suppress(OSError):
            total += os.path.getsize(shard.uri)
    return total


def _without_data(unit: tuple[Slice, ...], inputs: list[InputShard]) -> tuple[Slice, ...]:
    """What workers can read themselves need not be sent."""
    return tuple(
        replace(piece, data=None) if piece.data and inputs[piece.source].seekable and piece.kind != "rows" else piece
        for piece in unit
    )


def _is_shard(name: str) -> bool:
    for subset in ("train", "validation"):
        names = {*shard_names(subset, 0).values(), *shard_names(subset, 0, "parquet").values()}
        if name == remainder_name(subset):
            return True
        if any(name.startswith(n.partition("00000")[0]) and name.endswith(n.partition("00000")[2]) for n in names):
            return True
    return False


def _delete_all_but_journal(folder: str) -> None:
    for name in os.listdir(folder):
        if name in (MANIFEST, FAULTS, TOKENIZER) or name.endswith(TEMPORARY) or _is_shard(name):
            os.unlink(os.path.join(folder, name))


def _flag(key: str) -> str:
    return "--" + key.removesuffix("_id").replace("_", "-") if key != "pad_id" else "--pad-id"


def _shown(value: Any) -> str:
    if isinstance(value, dict) and "name" in value:
        return f"{value['name']} ({value['sha256'][:12]})"
    if isinstance(value, dict) and "bytes" in value:
        return f"{value['bytes']:,} bytes"
    return "not given" if value is None else str(value)
