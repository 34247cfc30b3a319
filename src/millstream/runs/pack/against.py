"""A run folder against the sources it was made of: they are read and tokenized again, with the reference engine."""

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from millstream.corpus.find import find_inputs
from millstream.corpus.sources import InputShard
from millstream.engines.ordered import map_ordered
from millstream.errors import RequestError, setting
from millstream.folder.dataset import open as open_run
from millstream.folder.entries import Identity, Manifest
from millstream.folder.manifest import TOKENIZER
from millstream.folder.reader import remainder
from millstream.folder.samples import Samples, ShardSamples, samples_of
from millstream.records import Cursor, DocumentFault, Ids, TokenBatch, ids_and_learned
from millstream.runs.pack.encode import Encode, Encoded
from millstream.runs.pack.fingerprint import Fingerprint, Key, hashed
from millstream.runs.pack.memory import workers_of
from millstream.runs.pack.numbering import Numbered
from millstream.runs.pack.reading import Reading, Unit, without_data
from millstream.runs.pack.settings import Settings, chat_of, chat_sha256
from millstream.runs.pack.subset import Mark
from millstream.store import kind_at
from millstream.stream.tokenizers import Tokenizer, load_tokenizer

_SHOWN = 10
_WINDOW = 64 << 20  # bytes of input that workers may have at once


@dataclass(frozen=True)
class Compared:
    """What `compare_with` found: `problems`, and how many documents were compared, of all there are.

    `not_compared` documents could only be encoded by the fast engine.
    """

    problems: list[str]
    documents: int
    of: int
    not_compared: int


@dataclass(frozen=True)
class EncodeOrCount:
    """What a worker does with a unit: tokenize it, or only count its documents."""

    encode: Encode

    def __call__(self, task: tuple[Unit, bool]) -> Encoded:
        unit, chosen = task
        return self.encode((unit, False)) if chosen else self.encode.counted(unit)


def compare_with(
    folder: str | os.PathLike[str],
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    sample: float = 1.0,
    tokenizer: str | None = None,
    chat_template: str | None = None,
    workers: int | None = None,
) -> Compared:
    """Read and tokenize `sources` again, with the reference engine, and compare every id, its document and its place.

    With a `sample` below 1, that part of them, in blocks from all over. `tokenizer` says where it is now, if it has
    moved, and `chat_template` which one the run was given. Nothing is held of documents but sums that only the same
    ones have.
    The folder has to be whole by itself: `millstream.verify` says that. Raises RequestError if these are not the run's
    sources, tokenizer or template.
    """
    if not 0 < sample <= 1:
        raise RequestError(f"{setting('sample', sample)} does not work: give a fraction above 0, up to 1")
    folder = os.fspath(folder)
    manifest = open_run(folder).manifest
    listed = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    shards = find_inputs([os.fspath(source) for source in listed], besides=folder).shards
    _refuse_others(manifest, shards)
    known = manifest.settings
    settings, loaded = _settings(folder, known, tokenizer, chat_template)
    chat = chat_of(settings, loaded)
    chosen = _Chosen(sample)
    run = _Run(folder, manifest, shards, loaded, Key.draw())
    reading = Reading(shards, settings, known, loaded, chat)
    encode = replace(reading.encode(), rescues=True)
    if workers is None:
        workers = _workers(settings, loaded, shards, known.max_document.bytes)
    source = run.source_side(reading, EncodeOrCount(encode), chosen, workers)
    return run.compared(source, run.folder_side(chosen), chosen)


def _refuse_others(manifest: Manifest, shards: list[InputShard]) -> None:
    then, now = [entry.name for entry in manifest.inputs], [shard.name for shard in shards]
    for number in range(max(len(then), len(now))):
        was, is_now = (names[number] if number < len(names) else "not given" for names in (then, now))
        if was != is_now:
            raise RequestError(
                f"these are not the sources of the run: input {number + 1} was {was}, is {is_now}. "
                "Give the same ones, in the same order"
            )


def _settings(
    folder: str, known: Identity, tokenizer: str | None, chat_template: str | None
) -> tuple[Settings, Tokenizer | None]:
    """The settings that a run was made with, as far as they decide ids, and its tokenizer."""
    same = ("text_field", "id_field", "ids_field", "seq_len", "strategy", "limit", "validation")
    settings = Settings(**{name: getattr(known, name) for name in same}, overlong=known.overlong or "cut")
    named, loaded = known.tokenizer, None
    if named:
        copy = os.path.join(folder, TOKENIZER)
        found = tokenizer or (copy if kind_at(copy) == "file" else named.name)
        loaded = load_tokenizer(found)
        if loaded.sha256 != named.sha256:
            raise RequestError(f"tokenizer {found} is not the one of the run: give {setting('tokenizer')}")
        settings = replace(settings, tokenizer=found)
    settings = replace(settings, engine="reference")
    if known.chat:
        settings = replace(settings, chat=True, loss=known.chat.loss, chat_template=chat_template)
        for allow in (False, True):
            settings = replace(settings, allow_specials=allow)
            try:
                chat = chat_of(settings, loaded)
            except RequestError:
                if chat_template:
                    raise
                chat = None
            if chat and chat_sha256(chat) == known.chat.sha256:
                break
        else:
            raise RequestError(
                "a run folder does not keep the chat template, and this is not the one of the run: give "
                f"{setting('tokenizer')} with the folder that the run had, and {setting('chat_template')} if it had one"
            )
    return settings, loaded


def _workers(settings: Settings, tokenizer: Tokenizer | None, shards: list[InputShard], longest: int) -> int:
    with contextlib.suppress(RequestError):  # more to unpack than is usual
        return workers_of(replace(settings, max_document=longest), tokenizer, shards)[0]
    return 1


class _Chosen:
    """Units of the corpus: a fraction of them, evenly spread, the first among them; and the documents in these."""

    def __init__(self, fraction: float) -> None:
        self._fraction, self._units, self._last = fraction, 0, True
        self._bounds: list[int] = []  # of ranges of documents: from, to before, from, ...

    def unit(self, unit: Unit) -> bool:
        """Whether the next unit is chosen; one that begins inside a document is if the one before it was."""
        if unit[0].begins:
            now, before = (int((self._units + more) * self._fraction - 1e-9) for more in (1, 0))
            self._last = self._units == 0 or now > before
        self._units += 1
        return self._last

    def add(self, low: int, high: int) -> None:
        """The documents from `low` to before `high` are those of a chosen unit."""
        if self._bounds and self._bounds[-1] == low:
            self._bounds[-1] = high
        elif low < high:
            self._bounds += [low, high]

    def has(self, ordinal: Ids) -> Ids:
        """Which documents are chosen."""
        inside: Ids = np.searchsorted(np.array(self._bounds, np.uint64), ordinal.astype(np.uint64), "right") % 2 == 1
        return inside

    @property
    def documents(self) -> int:
        return sum(self._bounds[1::2]) - sum(self._bounds[::2])


@dataclass
class _Side:
    """What one side has: a fingerprint, how many documents, and how many could not be compared."""

    sums: Fingerprint
    documents: int = 0
    not_compared: int = 0


class _Run:
    """A run folder and its sources."""

    def __init__(
        self, folder: str, manifest: Manifest, shards: list[InputShard], tokenizer: Tokenizer | None, key: Key
    ) -> None:
        self._folder, self._manifest, self._shards, self._key = folder, manifest, shards, key
        self._count = manifest.ledger.documents["in"]
        self._masked = manifest.settings.masked

    def source_side(self, reading: Reading, again: EncodeOrCount, chosen: _Chosen, workers: int) -> _Side:
        """What the sources give."""
        side, numbering, afters = _Side(Fingerprint(self._count, self._key)), reading.numbering(), list[Any]()
        dropped, limit = self._dropped(), self._manifest.settings.limit

        def tasks() -> Iterator[tuple[Unit, bool]]:
            for unit in reading.units(Cursor()):
                take = chosen.unit(unit)
                afters.append((unit[-1].after, take))
                yield (unit if workers == 1 else without_data(unit, self._shards)), take

        mark = Mark()

        def size(task: tuple[Unit, bool]) -> int:
            return sum(piece.size for piece in task[0])

        results = map_ordered(again, tasks(), workers=workers, window_bytes=_WINDOW, size=size)
        with contextlib.closing(results):
            for encoded in results:
                after, take = afters.pop(0)
                found = numbering.number(encoded, mark, after)
                if take:
                    self._add(side.sums, found, dropped)
                    chosen.add(mark.ordinal, found.mark.ordinal)
                    side.not_compared += len(encoded.checks.not_compared)
                mark = found.mark
                if limit is not None and mark.ordinal >= limit and not found.open:
                    break
        side.documents = mark.ordinal
        return side

    def _add(self, sums: Fingerprint, found: Numbered, dropped: dict[int, int]) -> None:
        batch = found.batch
        whole = len(batch) - batch.open
        length, cut_off = (batch.start + batch.length)[:whole], batch.cut_off[:whole]
        facts = (batch.source[:whole], batch.offset[:whole], length, cut_off, hashed(batch.doc_ids[:whole]))
        sums.tell(batch.ordinal[:whole], *facts)
        _tell_faults(sums, found.faults)
        some = _without_dropped(batch, dropped)
        sums.add(some.ordinal, some.start, some.length, self._plain(some.ids))

    def _plain(self, ids: Ids) -> Ids:
        """Ids with whether they are learned as one number."""
        if not self._masked:
            return ids
        plain, learned = ids_and_learned(ids, np.dtype(np.uint32))
        together: Ids = plain | (learned.astype(np.uint64) << np.uint64(32))
        return together

    def folder_side(self, chosen: _Chosen) -> _Side:
        """What the folder has."""
        side = _Side(Fingerprint(self._count, self._key), self._count)
        for samples in samples_of(self._folder, self._manifest):
            for shard in _shards(samples):
                for part in _stretches(shard):
                    self._add_stretch(side.sums, chosen, *part)
                for rows in shard.documents():
                    mine = chosen.has(rows.ordinal)
                    names = hashed([name for name, take in zip(rows.id, mine.tolist(), strict=True) if take])
                    columns = (rows.source, rows.offset, rows.length, rows.cut_off)
                    side.sums.tell(rows.ordinal[mine], *(column[mine] for column in columns), names)
            if samples.kept:
                self._add_stretch(side.sums, chosen, *_remainder(samples))
        _tell_faults(side.sums, [fault for fault in self._faults() if chosen.has(np.array([fault.ordinal])).all()])
        return side

    def _add_stretch(self, sums: Fingerprint, chosen: _Chosen, segments: Ids, ids: Ids, learned: Ids | None) -> None:
        if learned is not None:
            ids = ids.astype(np.uint64) | (learned.astype(np.uint64) << np.uint64(32))
        mine = chosen.has(segments["document"])
        length = segments["length"].astype(np.int64)
        if not mine.all():
            ids = ids[np.repeat(mine, length)]
        some = segments[mine]
        sums.add(some["document"], some["start"].astype(np.int64), length[mine], ids)

    def _faults(self) -> Iterator[DocumentFault]:
        return (
            (DocumentFault(**line) for line in open_run(self._folder).faults()) if self._manifest.faults else iter(())
        )

    def _dropped(self) -> dict[int, int]:
        """How many ids were kept of the documents whose last ones were dropped with the remainder."""
        found: dict[int, int] = {}
        for samples in samples_of(self._folder, self._manifest):
            rest = samples.entry.remainder
            left = rest.ids if rest.policy == "drop" else 0
            for shard in reversed(list(_shards(samples))):
                if not left:
                    break
                tables = list(shard.documents())
                for rows in reversed(tables):
                    for ordinal, length in zip(rows.ordinal[::-1].tolist(), rows.length[::-1].tolist(), strict=True):
                        if left and length:
                            found[ordinal] = max(0, length - left)
                            left = max(0, left - length)
        return found

    def compared(self, source: _Side, folder: _Side, chosen: _Chosen) -> Compared:
        """What differs, in words."""
        problems = []
        if source.documents != folder.documents:
            problems.append(f"the sources have {source.documents:,} documents, the run had {folder.documents:,}")
        of_rows, of_ids = source.sums.different_rows(folder.sums), source.sums.different_ids(folder.sums)
        for places, what in (
            (of_ids, "has other ids than its source gives, or elsewhere, or others are to be learned"),
            (of_rows, "is not as its source has it: its id, its place, how long it is, or whether it is a fault"),
        ):
            problems += [f"{self._named(place, source.sums.width)} {what}" for place in places[:_SHOWN].tolist()]
            if len(places) > _SHOWN:
                problems.append(f"{len(places) - _SHOWN:,} more: each {what}")
        return Compared(problems, chosen.documents, source.documents, source.not_compared)

    def _named(self, place: int, width: int) -> str:
        if width > 1:
            return f"one of the documents {place * width:,} to {place * width + width - 1:,}"
        for subset in self._manifest.subsets:
            for found in open_run(self._folder, subset).named(place):
                return f"document {place:,} ({found})"
        return f"document {place:,}"


def _tell_faults(sums: Fingerprint, faults: list[DocumentFault]) -> None:
    if faults:
        ordinal = np.array([fault.ordinal for fault in faults], np.uint64)
        facts = hashed([f"{fault.reason} {fault.shard} {fault.offset} {fault.line} {fault.id}" for fault in faults])
        sums.tell(ordinal, facts)


def _without_dropped(batch: TokenBatch, dropped: dict[int, int]) -> TokenBatch:
    """A batch without the ids that the run dropped with the remainder."""
    rows = [row for row, ordinal in enumerate(batch.ordinal.tolist()) if ordinal in dropped] if dropped else []
    if not rows:
        return batch
    keep = batch.length.copy()
    for row in rows:
        most = dropped[int(batch.ordinal[row])] - int(batch.start[row])
        keep[row] = min(max(most, 0), int(keep[row]))
    begins = np.cumsum(batch.length) - batch.length
    within = np.arange(len(batch.ids)) - np.repeat(begins, batch.length)
    return replace(batch, ids=batch.ids[within < np.repeat(keep, batch.length)], length=keep)


def _stretches(shard: ShardSamples) -> Iterator[tuple[Ids, Ids, Ids | None]]:
    """(segments, their ids back to back, which of them are to be learned) of a shard's samples, a block at a time."""
    samples = shard.samples
    for first, ids, learned in shard.blocks():
        segments = shard.segments(first, len(ids))
        used = np.bincount(segments["sample"] - first, segments["length"], len(ids)).astype(np.int64)[:, None]
        column = np.arange(samples.seq_len)
        own = column >= samples.seq_len - used if samples.pad_left else column < used
        yield segments, ids[own], None if learned is None else learned[own]


def _shards(samples: Samples) -> Iterator[ShardSamples]:
    """The output shards of a subset, as they are."""
    for number, entry in enumerate(samples.entry.shards):
        yield ShardSamples(samples, number, entry, 0, entry.samples, np.empty(0, samples.dtype))


def _remainder(samples: Samples) -> tuple[Ids, Ids, Ids | None]:
    """The kept remainder's segments, its ids, and which of them are to be learned."""
    last = list(_shards(samples))[-1]
    return last.rest_segments, *remainder(samples.store, samples.entry.remainder)
