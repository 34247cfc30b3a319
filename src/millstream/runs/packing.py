"""The pack run: a corpus into a run folder of samples, resumable after any interruption, the same bytes every time."""

import contextlib
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from millstream.engines.local import map_ordered
from millstream.errors import DataError, LedgerError, RequestError, ResumeRefused, RunError
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
from millstream.formats.shards import Rows, Shape, ShardWriter, write_remainder
from millstream.formats.slices import Limits, slices, units
from millstream.formats.sources import InputShard, expand, fingerprint, prefix_hash
from millstream.records import Fault, Place, Slice, TokenBatch
from millstream.runs.encode import CHECK_FIRST, Encode, Encoded
from millstream.stream.pack import Concat, Packed, Packer, Split
from millstream.stream.tokenizers import Tokenizer, load_tokenizer

MIB = 1 << 20

# Peak resident memory, measured: the parent with Arrow; what an engine and its word cache grow to on words that never
# repeat, in the parent or in a worker; and copies of a document that is decoded, tokenized and packed.
PARENT_MEMORY = 160 * MIB
ENGINE_MEMORY = 180 * MIB
WORKER_MEMORY = 270 * MIB
DOCUMENT_COPIES = 10
WORTH_A_WORKER = 24 * MIB
"""Bytes of input below which starting another process takes longer than it saves."""


@dataclass(frozen=True)
class Settings:
    """What a run is asked for. The first group decides the bytes and may not change on resume."""

    tokenizer: str | None = "gpt2"
    seq_len: int = 2048
    strategy: str = "concat"
    bos: bool = False
    eos: bool = False
    bos_token: str | None = None
    eos_token: str | None = None
    remainder: str = "keep"
    pad_id: int | None = None
    pad_side: str = "right"
    text_field: str = "text"
    id_field: str = "id"
    ids_field: str | None = None
    limit: int | None = None
    validation: float = 0.0
    format: str = "npy"
    shard_size: int = 256 * MIB
    max_document: int | None = None

    workers: int | None = None
    memory: int = 1024 * MIB
    on_error: str = "stop"
    engine: str = "fast"
    overwrite: bool = False
    block: int = MIB


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


@dataclass(frozen=True)
class Mark:
    """The state of the reading side before a unit: what a resumed run goes on with.

    `ordinal`: documents read so far; `line`: of the input shard at `place`; `text_ids`, `special_ids` as in the ledger;
    `fault_bytes`: how long faults.jsonl is; `bytes`: of input.
    """

    place: Place = Place()
    ordinal: int = 0
    line: int = 0
    text_ids: int = 0
    special_ids: int = 0
    fault_bytes: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    bytes: int = 0

    @classmethod
    def load(cls, found: dict[str, Any]) -> "Mark":
        return cls(**{**found, "place": Place(*found["place"])})


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


class Subset:
    """The samples of one subset (train, validation): its packer, its shards, and where it can go on.

    `resume` = (ordinal, used): the first document not wholly in a sealed shard and how many of its ids are in one.
    `mark` is the reading side's state before that document.
    """

    def __init__(self, name: str, folder: str, shape: Shape, packer: Packer, found: dict[str, Any] | None) -> None:
        self.name, self.folder, self.shape, self.packer = name, folder, shape, packer
        self.shards: list[dict[str, Any]] = found["shards"] if found else []
        self.resume: tuple[int, int] = (0, 0)
        self.mark = Mark()
        if found:
            self.resume = (found["resume"]["ordinal"], found["resume"]["used"])
            self.mark = Mark.load(found["resume"]["mark"])
        self.trim = self.resume
        self.base = len(self.shards) * shape.per_shard  # samples sealed before this run
        self.writer: ShardWriter | None = None
        self.remainder: dict[str, Any] | None = None

    def add(self, batch: TokenBatch, begin: Mark, after: Mark) -> bool:
        """Pack a batch that was read between the marks `begin` and `after`; whether a shard was sealed."""
        batch = batch.after(*self.trim)
        if not len(batch):
            return False
        packed = self.packer.feed(batch)
        ended = len(batch) - batch.open
        per_shard, sealed = self.shape.per_shard, False
        samples = self.packer.samples - len(packed.ids)  # samples and rows written so far
        rows = 0
        while True:
            number = len(self.shards)
            bound = (number + 1) * per_shard - self.base
            upto = min(bound, self.packer.samples)
            self._write_samples(packed, samples, upto, number * per_shard - self.base)
            samples = upto
            last = int(np.searchsorted(packed.last_sample[:ended], bound))
            self._write_rows(batch, packed, rows, last)
            rows = last
            if self.packer.samples < bound:
                return sealed
            self._seal()
            sealed = True
            self.resume = self._resume_at(batch, packed, rows, bound, after)
            self.mark = begin if rows < len(batch) else after

    def _resume_at(self, batch: TokenBatch, packed: Packed, row: int, bound: int, after: Mark) -> tuple[int, int]:
        if row == len(batch):
            return after.ordinal, 0
        ordinal = int(batch.ordinal[row])
        segments = packed.segments
        here = segments[(segments["document"] == ordinal) & (segments["sample"] < bound)]
        return ordinal, int(here[-1]["start"] + here[-1]["length"]) if len(here) else 0

    def _open(self) -> ShardWriter:
        if self.writer is None:
            self.writer = ShardWriter(self.folder, self.name, len(self.shards), self.shape)
        return self.writer

    def _write_samples(self, packed: Packed, low: int, high: int, first: int) -> None:
        if high <= low:
            return
        offset = self.packer.samples - len(packed.ids)
        chosen = packed.segments
        bounds = np.searchsorted(chosen["sample"], [low, high])
        segments = chosen[bounds[0] : bounds[1]].copy()
        segments["sample"] -= np.uint32(first) if first >= 0 else np.uint32(0)
        if first < 0:
            segments["sample"] += np.uint32(-first)
        rows = packed.ids[low - offset : high - offset]
        padding = rows.size - int(segments["length"].sum())
        self._open().write(rows, segments, padding)

    def _write_rows(self, batch: TokenBatch, packed: Packed, low: int, high: int) -> None:
        if high > low:
            part = slice(low, high)
            length = (batch.start + batch.length)[part]
            split = packed.split[part] & (length > 0)
            rows = (batch.ordinal[part], batch.doc_ids[part], batch.source[part], batch.offset[part])
            self._open().write_documents(Rows(*rows, length, split))

    def _seal(self) -> None:
        assert self.writer
        self.shards.append(self.writer.seal())
        self.writer = None

    def finish(self, remainder: str, pad_id: int, pad_side: str) -> None:
        """Seal what is left; the ids that fill no sample are kept, padded or dropped."""
        rest = self.packer.finish()
        n = self.shape.seq_len
        self.remainder = {"policy": remainder, "ids": len(rest.ids)}
        if len(rest.ids):
            segments = rest.segments.copy()
            local = self.packer.samples - (len(self.shards) * self.shape.per_shard - self.base)
            segments["sample"] = local
            if remainder == "pad":
                row = np.full((1, n), pad_id, rest.ids.dtype)
                left = n - len(rest.ids) if pad_side == "left" else 0
                row[0, left : left + len(rest.ids)] = rest.ids
                self._open().write(row, segments, n - len(rest.ids))
            elif remainder == "keep":
                self._open().write_segments(segments)
                self.remainder |= write_remainder(self.folder, self.name, rest.ids)
        if self.writer:
            self._seal()

    def entry(self, complete: bool) -> dict[str, Any]:
        found: dict[str, Any] = {"shards": self.shards}
        if complete:
            return {**found, "remainder": self.remainder}
        mark = {**asdict(self.mark), "place": list(self.mark.place)}
        return {**found, "resume": {"ordinal": self.resume[0], "used": self.resume[1], "mark": mark}}


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
        self.seconds: Counter[str] = Counter()
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
        if names and MANIFEST not in names and not names <= {JOURNAL, MANIFEST + TEMPORARY}:
            raise RequestError(
                f"{self.out} has files that are not millstream's; give an empty or a new folder as --out"
            )
        if MANIFEST in names and self.settings.overwrite:
            try:
                read_manifest(self.out)
            except RunError:
                pass  # damaged, but ours
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
        """What changed of the inputs that were used; what lies behind the last sealed place may be mended."""
        place = Place(len(self.inputs)) if finished else self._first_mark(found).place
        wrong = []
        then = found["inputs"]
        for number, shard in enumerate(self.inputs[: max(place.source, 1)]):
            if number >= len(then) or then[number]["name"] != shard.name:
                was = then[number]["name"] if number < len(then) else "not there"
                wrong.append(f"input {number + 1} was {was}, is {shard.name}")
            elif number < place.source and then[number] != self._fingerprint(number):
                wrong.append(f"{shard.name} has changed since it was packed")
        if finished and len(then) > len(self.inputs):
            wrong.append(f"input {len(self.inputs) + 1} was {then[len(self.inputs)]['name']}, is not there")
        used = found.get("prefix")
        if not wrong and not finished and used and place.source < len(self.inputs):
            shard = self.inputs[place.source]
            if shard.seekable and shard.kind != "parquet" and place.offset:
                try:
                    same = prefix_hash(shard, place.offset) == used
                except OSError as error:
                    raise RunError(f"{shard.name} cannot be read: {error.strerror}") from error
                if not same:
                    wrong.append(f"{shard.name} has changed before byte {place.offset:,}, where the run goes on")
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
                self._commit(subsets, mark)
            journal.write("resume" if found else "start", workers=self.workers, ordinal=mark.ordinal)
            first = mark
            try:
                mark = self._stream(subsets, mark, faults, journal)
                ledger = self._finish(subsets, mark, faults)
            except BaseException as error:
                journal.write("stop", reason=f"{type(error).__name__}: {error}")
                for subset in subsets.values():
                    if subset.writer:
                        with contextlib.suppress(OSError):  # of a full disk; the run has failed with its own error
                            subset.writer.close()
                raise
        journal.write("done", seconds=round(time.perf_counter() - self.started, 3))
        return self._report(ledger, {k: v.entry(True) for k, v in subsets.items()}, resumed=bool(found), span=(first, mark))

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

    def _tasks(self, place: Place) -> Iterator[tuple[tuple[Slice, ...], bool]]:
        settings = self.settings
        fixed = self.identity["max_document"]
        limits = Limits(
            fixed["bytes"],
            fixed["bytes"] if fixed["plain_text_too"] else None,
            bool(self.tokenizer and self.tokenizer.safe_cuts),
        )
        columns = (settings.ids_field or settings.text_field, settings.id_field)
        seen = 0
        for unit in units(slices(self.inputs, place, limits, columns, settings.block), settings.block):
            yield unit, seen < CHECK_FIRST
            seen += sum(piece.size for piece in unit)

    def _stream(self, subsets: dict[str, Subset], mark: Mark, faults: Any, journal: Journal) -> Mark:
        """Read, encode and pack everything from `mark` on; the mark at the end."""
        encode = self._encode()
        afters: list[Place] = []  # where each unit handed to the engine ends, in order
        start, tasks = mark, self._tasks(mark.place)

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
                if not encoded.opened:
                    begin = mark
                sealed = self._pack(subsets, encoded, batch, begin, after)
                if encoded.open and len(batch) > 1:
                    begin = mark
                mark = after
                if sealed:
                    self._commit(subsets, mark, faults)
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

    def _number(self, encoded: Encoded, mark: Mark, place: Place) -> tuple[Mark, TokenBatch, list[Fault]]:
        """Give the documents of a unit their ordinals and the faults their lines; the mark behind it."""
        limit = self.settings.limit
        line = mark.line if encoded.lines and encoded.lines[0][0] == mark.place.source else 0
        source_lines: Counter[int] = Counter()
        if encoded.lines:
            source_lines[encoded.lines[0][0]] = line
        bad = []
        names = {self.inputs[source].name: source for source, _ in encoded.lines}
        before = dict(source_lines)
        for source, count in encoded.lines:
            before.setdefault(source, source_lines[source])
            source_lines[source] += count
        for fault in encoded.faults:
            base = before.get(names.get(fault.source, -1), 0) if fault.line else 0
            bad.append(fault._replace(ordinal=mark.ordinal + fault.ordinal, line=fault.line and fault.line + base))
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
            place,
            mark.ordinal + count,
            source_lines[place.source],
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
        self, subsets: dict[str, Subset], encoded: Encoded, batch: TokenBatch, begin: Mark, after: Mark
    ) -> bool:
        start = time.perf_counter()
        if "validation" not in subsets:
            sealed = subsets["train"].add(batch, begin, after)
        else:
            chosen = encoded.in_validation[: len(batch)]
            sealed = subsets["train"].add(batch.where(~chosen), begin, after)
            sealed |= subsets["validation"].add(batch.where(chosen), begin, after)
        self.seconds["pack and write"] += time.perf_counter() - start
        return sealed

    def _commit(self, subsets: dict[str, Subset], mark: Mark, faults: Any = None) -> None:
        if faults:
            faults.flush()
            os.fsync(faults.fileno())
        first = min((subset.mark for subset in subsets.values()), key=lambda m: m.ordinal)
        source = first.place.source
        prefix = None
        if source < len(self.inputs) and self.inputs[source].seekable and first.place.offset:
            prefix = prefix_hash(self.inputs[source], first.place.offset)
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


def make_ledger(mark: Mark, subsets: dict[str, Any], seq_len: int) -> dict[str, Any]:
    """What came in, counted while reading, against what went out, counted while writing. Raises LedgerError."""
    shards = [shard for subset in subsets.values() for shard in subset["shards"]]

    def total(key: str) -> int:
        return sum(shard[key] for shard in shards)

    left = {"keep": 0, "pad": 0, "drop": 0}
    for subset in subsets.values():
        left[subset["remainder"]["policy"]] += subset["remainder"]["ids"]
    documents = {
        "in": mark.ordinal,
        "whole": total("documents") - total("split") - total("empty"),
        "split": total("split"),
        "empty": total("empty"),
        "faulty": sum(mark.faults.values()),
    }
    ids = {
        "in": mark.text_ids + mark.special_ids,
        "text": mark.text_ids,
        "special": mark.special_ids,
        "in_samples": total("samples") * seq_len - total("padding"),
        "padding": total("padding"),
        "remainder": left["keep"],
        "dropped": left["drop"],
    }
    ledger = {"documents": documents, "ids": ids, "samples": total("samples"), "faults": mark.faults}
    check_ledger(ledger)
    return ledger


def check_ledger(ledger: dict[str, Any]) -> None:
    """Raises LedgerError unless documents in = whole + split + empty + faulty, and ids in = what became of them."""
    documents, ids = ledger["documents"], ledger["ids"]
    out = documents["whole"] + documents["split"] + documents["empty"] + documents["faulty"]
    if documents["in"] != out:
        raise LedgerError(f"{documents['in']:,} documents came in and {out:,} are accounted for")
    out = ids["in_samples"] + ids["remainder"] + ids["dropped"]
    if ids["in"] != out or ids["in"] != ids["text"] + ids["special"]:
        raise LedgerError(f"{ids['in']:,} ids came in and {out:,} are accounted for")


# Settings -----------------------------------------------------------------------------------------------------------


def check_settings(settings: Settings) -> None:
    """Raises RequestError that says what to give instead."""

    def wrong(flag: str, found: object, want: str) -> RequestError:
        return RequestError(f"{flag} {found} does not work: {want}")

    if settings.seq_len < 1:
        raise wrong("--seq-len", settings.seq_len, "a sample needs at least one id")
    for flag, value, known in (
        ("--strategy", settings.strategy, ("concat", "split")),
        ("--remainder", settings.remainder, ("keep", "drop", "pad")),
        ("--pad-side", settings.pad_side, ("right", "left")),
        ("--format", settings.format, ("npy", "parquet")),
        ("--on-error", settings.on_error, ("stop", "skip")),
        ("--engine", settings.engine, ("fast", "reference")),
    ):
        if value not in known:
            raise wrong(flag, value, f"give {' or '.join(known)}")
    if not 0 <= settings.validation < 1:
        raise wrong("--validation", settings.validation, "give a fraction from 0 to below 1, such as 0.01")
    if settings.limit is not None and settings.limit < 0:
        raise wrong("--limit", settings.limit, "give a number of documents")
    if settings.workers is not None and settings.workers < 1:
        raise wrong("--workers", settings.workers, "give at least 1")
    for flag, size in (("--shard-size", settings.shard_size), ("--max-document", settings.max_document)):
        if size is not None and size < 1:
            raise wrong(flag, size, "give a size such as 64MiB")
    if (settings.ids_field or settings.text_field) == settings.id_field:
        raise wrong("--id-field", settings.id_field, "a document's id cannot be its text as well")


DEFAULT_MAX_DOCUMENT = 32 * MIB


def identity(settings: Settings, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What decides the bytes, as the manifest keeps it."""

    def special(wanted: bool, what: str, named: str | None, own: str | None) -> int | None:
        if not wanted and named is None:
            return None
        if tokenizer is None:
            raise RequestError(f"--{what} needs a tokenizer that names the token; give --tokenizer")
        return tokenizer.special_id(named or own, what)

    eos = special(settings.eos, "eos", settings.eos_token, tokenizer.eos_token if tokenizer else None)
    bos = special(settings.bos, "bos", settings.bos_token, tokenizer.bos_token if tokenizer else None)
    pad = settings.pad_id
    if pad is None and (settings.strategy == "split" or settings.remainder == "pad"):
        if tokenizer is None or (tokenizer.eos_token is None and eos is None):
            raise RequestError("samples have to be padded, and no EOS token is known to do it; give --pad-id")
        pad = eos if eos is not None else tokenizer.special_id(tokenizer.eos_token, "eos")
    largest = tokenizer.vocab_size - 1 if tokenizer else 0xFFFFFFFF
    if pad is not None and not 0 <= pad <= largest:
        raise RequestError(f"--pad-id {pad} is no id of the vocabulary: give one from 0 to {largest:,}")
    explicit = settings.max_document is not None
    engine = "fastokens 0.3.5" if tokenizer and tokenizer.reference else None
    return {
        "tokenizer": tokenizer
        and {"name": tokenizer.name, "sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size},
        "engine": engine,
        "seq_len": settings.seq_len,
        "strategy": settings.strategy,
        "bos_id": bos,
        "eos_id": eos,
        "remainder": settings.remainder,
        "pad_id": pad,
        "pad_side": settings.pad_side,
        "text_field": settings.text_field,
        "id_field": settings.id_field,
        "ids_field": settings.ids_field,
        "limit": settings.limit,
        "validation": settings.validation,
        "format": settings.format,
        "shard_size": settings.shard_size,
        "max_document": {
            "bytes": settings.max_document or DEFAULT_MAX_DOCUMENT,
            "plain_text_too": explicit,
        },
    }


def choose_workers(settings: Settings, max_document: int, total_bytes: int | None) -> tuple[int, str]:
    """(number of processes, why). Raises RequestError if `memory` is less than one process was measured to need."""
    documents = DOCUMENT_COPIES * max_document
    least = PARENT_MEMORY + ENGINE_MEMORY + min(documents, settings.memory)
    if settings.memory < PARENT_MEMORY + ENGINE_MEMORY + documents:
        fits = max(0, settings.memory - PARENT_MEMORY - ENGINE_MEMORY) // DOCUMENT_COPIES
        lower = f", or --max-document {fits // MIB}MiB" if fits >= MIB else ""
        raise RequestError(
            f"--memory {settings.memory // MIB}MiB is too little: documents of up to {max_document / MIB:.3g} MiB need "
            f"{(PARENT_MEMORY + ENGINE_MEMORY + documents) // MIB}MiB. Give that{lower}"
        )
    del least
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    room = (settings.memory - PARENT_MEMORY - documents) // WORKER_MEMORY
    if settings.workers is not None:
        if settings.workers > max(1, room):
            need = (PARENT_MEMORY + documents + settings.workers * WORKER_MEMORY) // MIB
            raise RequestError(
                f"--workers {settings.workers} need up to {need}MiB; --memory is {settings.memory // MIB}MiB. "
                f"Give --memory {need}MiB or --workers {max(1, room)}"
            )
        return settings.workers, "as asked"
    if room < cores:
        return max(1, room), f"as many as fit into {settings.memory // MIB}MiB; there are {cores} cores"
    if total_bytes is not None and total_bytes < cores * WORTH_A_WORKER:
        return max(1, min(cores, total_bytes // WORTH_A_WORKER)), "the input is small"
    return cores, "one a core"


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
        replace(piece, data=None)
        if piece.data and inputs[piece.source].seekable and piece.kind != "rows"
        else piece
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

