"""What a pack run is made of: its corpus, its settings, and what is told of it on the way."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from millstream.corpus.find import find_inputs
from millstream.corpus.parquet import check_columns
from millstream.exports.out import Place
from millstream.exports.tasks import Export
from millstream.folder.entries import SubsetEntry
from millstream.folder.journal import Journal, NodeTaken, NotCompared
from millstream.folder.records import Resume, ShardRecord, record_shard
from millstream.folder.samples import Samples
from millstream.folder.shards import Shape
from millstream.records import Cursor, Part
from millstream.runs.pack.counts import Checks
from millstream.runs.pack.extent import Extent
from millstream.runs.pack.folder import Found
from millstream.runs.pack.inputs import Inputs
from millstream.runs.pack.measuring import Measuring
from millstream.runs.pack.memory import Crew, workers_of
from millstream.runs.pack.pieces import Pieces
from millstream.runs.pack.reading import Reading
from millstream.runs.pack.settings import (
    Settings,
    chat_of,
    check_settings,
    column_flag,
    columns_of,
    identity,
    paces,
)
from millstream.runs.pack.subset import Mark, Sealed
from millstream.runs.pack.tokenizing import PartTask
from millstream.runs.pack.writing import Form, WriteShards
from millstream.runs.progress import Progress
from millstream.store import at, is_far, temporary
from millstream.stream.line import Strategy
from millstream.stream.tokenizers import load_tokenizer


@dataclass
class Tally:
    """What a run counts besides its ledger, as `Report` has it; `seconds` of work by stage, over all processes."""

    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    compared: int = 0
    taught: int = 0
    unlearned: int = 0
    twice: int = 0
    lost: int = 0
    unknown: int = 0
    not_compared: int = 0
    not_compared_such_as: tuple[str, str] | None = None
    spilled: int = 0

    def add(self, checks: Checks) -> None:
        for stage, seconds in checks.seconds.items():
            self.seconds[stage] += seconds
        self.compared += checks.compared
        self.taught += checks.taught
        self.unlearned += checks.unlearned
        self.twice += checks.twice
        self.lost += checks.lost
        self.unknown += checks.unknown
        self.not_compared += len(checks.not_compared)
        self.not_compared_such_as = self.not_compared_such_as or next(iter(checks.not_compared.items()), None)

    @contextlib.contextmanager
    def time(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start

    def timed(self, stage: str, items: Iterator[Any]) -> Iterator[Any]:
        while True:
            with self.time(stage):
                item = next(items, self)
            if item is self:
                return
            yield item


class Loop(Protocol):
    """How a run is read, tokenized, packed and written. Like `Inline` and `Pooled`, which are made of a `Run`, what was
    found of an earlier one, its faults and its journal."""

    @property
    def sealed(self) -> bool:
        """Whether any output shard is written."""
        ...

    def pack(self, mark: Mark) -> Mark:
        """Read, tokenize and pack all that follows a mark; the mark at the end."""
        ...

    def finish(self) -> dict[str, SubsetEntry]:
        """Write what is left; what the manifest says of each subset."""
        ...

    def export(self, subsets: Sequence[Samples]) -> Generator[tuple[Export, Place]]:
        """Write all that is sealed in the other formats asked for; each when it is finished, for the caller to
        publish."""
        ...

    def close(self) -> None:
        """End what goes on, and leave unfinished what is not finished."""
        ...


class Run:
    """The parts of one call of `pack_to`, all checked before the folder is looked at. Raises RequestError."""

    def __init__(
        self,
        out: str,
        sources: list[str],
        settings: Settings,
        on_progress: Callable[[Progress], None] | None = None,
    ) -> None:
        check_settings(settings)
        self.out, self.settings = out, settings
        self._on_progress, self._shown = on_progress, 0.0
        self.found = find_inputs(sources, besides=out)
        self.shards = self.found.shards
        check_columns(self.shards, columns_of(settings)[:-1], column_flag(settings))
        self.inputs = Inputs(self.shards, columns_of(settings))
        name = settings.tokenizer_name
        self.tokenizer = load_tokenizer(name) if name else None
        self.identity = identity(settings, self.tokenizer)
        self._extent = Extent(self.shards)
        self.dtype = self.tokenizer.dtype if self.tokenizer else np.dtype(np.uint32)
        chat = chat_of(settings, self.tokenizer)
        self.reading = Reading(self.shards, settings, self.identity, self.tokenizer, chat)
        if settings.on == "local":
            self.workers, self.workers_why, self.writers = workers_of(settings, self.tokenizer, self.shards)
        else:
            self.workers, self.workers_why, self.writers = Crew(0, "nobody knows yet", 0)  # until the cluster is asked
        self.tally = Tally()
        self.measuring: Measuring | None = None
        self.nodes: Callable[[], list[NodeTaken]] = list  # those of a cluster
        self.elsewhere = False  # whether somebody else has the work done, perhaps on other machines
        self.started = time.perf_counter()

    @property
    def spill(self) -> str | None:
        """The folder for what workers leave for one another. None: in the run folder, unless that is in a bucket and
        all of them are on this machine."""
        alone = self.settings.on == "local" and not self.settings.join and not self.elsewhere
        return self.settings.spill or (temporary() if alone and is_far(self.out) else None)

    @property
    def max_document(self) -> int:
        return self.identity.max_document.bytes

    @property
    def pad_id(self) -> int:
        return self.identity.pad_id or 0

    def go_on(self, found: Found) -> None:
        """Take over what earlier calls have recorded of the inputs."""
        self.inputs.told, self.inputs.records = found.read.source, found.told

    @property
    def forms(self) -> dict[str, Form]:
        """How each of its subsets is packed and written."""
        return {
            name: Form(self.shape(pace), self.strategy(pace))
            for name, pace in zip(("train", "validation"), paces(self.settings.validation), strict=True)
            if pace
        }

    def part_task(self, part: Part) -> PartTask:
        """A part as workers are given it, with what is known of its files here."""
        states = {each.source: self.inputs.state(each.source) for each in part.ranges}
        return self.reading.part_task(part, {source: state.size for source, state in states.items() if state})

    def write_shards(self, pieces: Pieces) -> WriteShards:
        """What workers do with a shard task."""
        settings = self.settings
        return WriteShards(
            self.out,
            self.forms,
            pieces,
            remainder=settings.remainder,
            pad_id=self.pad_id,
            pad_side=settings.pad_side,
        )

    def shape(self, pace: float) -> Shape:
        """The form of the output shards of a subset with this pace."""
        settings, known = self.settings, self.identity
        item = 4 if known.format == "parquet" else self.dtype.itemsize
        whole = max(1, settings.shard_size // (settings.seq_len * item))
        return Shape(
            settings.seq_len,
            self.dtype,
            max(1, round(whole * pace)),
            format=known.format,
            metadata=known.in_parquet,
            padded=known.padded,
            pad_left=settings.pad_side == "left",
            masked=settings.masked,
        )

    def strategy(self, pace: float) -> Strategy:
        """How a subset with this pace is packed."""
        settings, known = self.settings, self.identity
        return Strategy(
            settings.strategy,
            settings.seq_len,
            self.pad_id,
            pad_side=settings.pad_side,
            window=max(1, round((known.window or 0) * pace)),
            max_segments=settings.max_segments,
            shuffle=settings.shuffle,
            shuffle_window=max(1, round((known.shuffle_window or 0) * pace)),
        )

    # What is written of it on the way

    def record(self, some: Iterable[tuple[str, Sealed]], read: Cursor) -> None:
        """Record output shards of these subsets, now that the inputs have been read to `read`; faults.jsonl is on the
        disk."""
        read, store = self.inputs.with_prefix(read), at(self.out)
        self.inputs.tell(store, read)
        for subset, sealed in some:
            record_shard(store, recorded(subset, sealed, read))

    def count(self, checks: Checks, journal: Journal) -> None:
        self.tally.add(checks)
        if checks.not_compared:
            journal.write(NotCompared(documents=checks.not_compared))

    def show(self, mark: Mark, start: Mark, at_once: bool = False, *, queue: int = 0, spilled: int = 0) -> None:
        """Tell whoever shows it how far the run is, ten times a second at most, and now and then the journal; it began
        at `start`. `queue` and `spilled` are as in `Measured`."""
        now = time.perf_counter()
        if self._on_progress and (at_once or now - self._shown > 0.1):
            self._shown = now
            self._on_progress(self._progress(mark, start))
        if self.measuring and (self.measuring.due or at_once):
            self.measuring.tell(self._progress(mark, start), queue, spilled, self.nodes())

    def rest(self, mark: Mark) -> int | None:
        """About how many ids are behind a mark, going by those before it; None if nobody can tell."""
        share = self._extent.share(mark.cursor)
        return round((mark.text_ids + mark.special_ids) * (1 / share - 1)) if share else None

    def _progress(self, mark: Mark, start: Mark) -> Progress:
        return Progress(
            bytes=mark.bytes,
            share=self._extent.share(mark.cursor),
            share_before=self._extent.share(start.cursor),
            documents=mark.ordinal,
            ids=mark.text_ids + mark.special_ids,
            faults=sum(mark.faults.values()),
            seconds=time.perf_counter() - self.started,
            stages=dict(self.tally.seconds),
            workers=self.workers,
            bytes_before=start.bytes,
            ids_before=start.text_ids + start.special_ids,
        )


def recorded(subset: str, sealed: Sealed, read: Cursor) -> ShardRecord:
    """The record of a shard; `read` has what identifies the bytes before it."""
    begin, end = Resume.of(sealed.begin), Resume.of(sealed.end or sealed.begin)
    return ShardRecord(subset=subset, entry=sealed.entry, begin=begin, end=end, read=read)
