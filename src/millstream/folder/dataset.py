"""Read a finished run folder: samples by index without copying, whose documents they hold, where a document went."""

import hashlib
import itertools
import json
import operator
import os
from bisect import bisect_left, bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, overload

import msgspec
import numpy as np

from millstream.corpus.find import called
from millstream.corpus.kinds import place
from millstream.errors import RequestError, RunError
from millstream.folder.manifest import FAULTS, read_manifest
from millstream.folder.opened import MOST_DECODED, OPEN, places
from millstream.folder.reader import OutputShard, remainder
from millstream.records import DocumentFault, Ids
from millstream.samples import Arrays, Batch, Columns, Sample, Segment, Segments, side_by_side
from millstream.store import at

_KEPT = 4  # documents tables held at once
_NONE = np.empty(0, np.int64)


class DocumentPart(NamedTuple):
    """The part of a document that a sample holds: `length` ids from the document's id number `start`.

    `offset` is where the document stands in its input shard `source`: a byte (decompressed) or a row. `place` says both
    in words, and which input it is where several have one name.
    """

    id: str
    ordinal: int
    source: str
    offset: int
    start: int
    length: int
    document_length: int
    place: str


class Placement(NamedTuple):
    """Where `length` ids of a document, from its id number `start`, went: into sample number `sample`, from id `at` on.

    `sample` is the dataset's length for the kept remainder, and None for ids that were dropped with it.
    """

    ordinal: int
    sample: int | None
    start: int
    length: int
    at: int = 0


@dataclass(frozen=True)
class Located:
    """One document of `subset` and where its `length` ids went: `placements`, in order, from its first id to its last.

    `source`, `offset` and `place` are where it was read, as in `DocumentPart`. An empty document has one placement of
    no ids.
    `cut_off` ids more are left out, as it was longer than a sample: then `length` is what was kept.
    """

    subset: str
    id: str
    ordinal: int
    source: str
    offset: int
    length: int
    placements: tuple[Placement, ...]
    place: str
    cut_off: int = 0

    @property
    def dropped(self) -> int:
        """How many of its ids, the last ones, were dropped with the remainder."""
        return sum(part.length for part in self.placements if part.sample is None)


def open(folder: str | os.PathLike[str], subset: str = "train") -> "Dataset":
    """The samples of a finished run folder; `subset` is train or validation.

    Raises RequestError if the folder is no run folder, is unfinished, or has no such subset.
    """
    return Dataset(os.fspath(folder), subset)


class Dataset(Sequence[Sample]):
    """Samples by number: ``len``, indexing (negative too), slices (lists of samples) and iteration.

    Token ids are views of memory-mapped files: nothing is read before it is looked at. Sent to another process (a
    DataLoader's worker), it opens the folder again there.
    """

    def __init__(self, folder: str, subset: str = "train") -> None:
        self.folder, self.subset = folder, subset
        self.manifest = read_manifest(folder)
        if subset not in self.manifest.subsets:
            known = ", ".join(self.manifest.subsets)
            raise RequestError(f"{folder} has no subset {subset!r}; it has {known}")
        self._store, self._entry = at(folder), self.manifest.subsets[subset]
        self._shards = self._entry.shards
        self._ends = list(itertools.accumulate(shard.samples for shard in self._shards))
        self._pads_left = self.manifest.settings.pad_side == "left"
        self._owner = OPEN.owner_of(self)
        self._tables: OrderedDict[int, Any] = OrderedDict()

    def __reduce__(self) -> tuple[type["Dataset"], tuple[str, str]]:
        return Dataset, (self.folder, self.subset)

    @property
    def settings(self) -> dict[str, Any]:
        """What decided the bytes, as given and as found out."""
        return dict(msgspec.to_builtins(self.manifest.settings))

    @property
    def seq_len(self) -> int:
        return self.manifest.settings.seq_len

    @property
    def fingerprint(self) -> str:
        """A short name for its samples: the same wherever the folder lies, another for other samples."""
        kinds = ("loss", "samples", "segments")
        files = [(kind, getattr(shard.files, kind)) for shard in self._shards for kind in kinds]
        kept = [f"{kind} {file.sha256}" for kind, file in files if file]
        return hashlib.sha256("\n".join(kept).encode()).hexdigest()[:16]

    @property
    def ledger(self) -> dict[str, Any]:
        return dict(msgspec.to_builtins(self.manifest.ledger))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        shard, local = self._at(index)
        ids, segments = shard.ids(local), shard.segments_of(local)
        left = self._left(len(ids), segments["length"])
        return Sample(ids, Segments(segments), pad_left=left, loss=shard.loss(local))

    def batch(self, numbers: Sequence[int]) -> Batch:
        """What `collate` makes of the samples of these numbers, quicker."""
        chosen = np.fromiter(map(operator.index, numbers), np.int64, len(numbers))
        return Batch(gather([self], np.zeros_like(chosen), chosen))

    def __iter__(self) -> Iterator[Sample]:
        for number in range(len(self)):
            yield self[number]

    @property
    def remainder(self) -> Sample | None:
        """The ids that filled no sample, where they were kept (`complete` is False)."""
        if not self._entry.remainder.file:
            return None
        ids, loss = remainder(self._store, self._entry.remainder)
        shard = self._shard(len(self._shards) - 1)
        segments = shard.segments_of(len(shard))
        return Sample(ids, Segments(segments), complete=False, loss=loss)

    def documents(self, index: int) -> list[DocumentPart]:
        """The documents that sample `index` holds, in order; the dataset's length stands for the kept remainder."""
        sample = self.remainder if index == len(self) else None
        return [self._part(segment, index) for segment in (sample or self[index]).segments]

    def document(self, ordinal: int, index: int = 0) -> dict[str, Any]:
        """A document's row of documents-K.parquet; `index` is a sample that holds some of it, to look there first."""
        first = min(bisect_right(self._ends, index), len(self._shards) - 1)
        for number in [*range(first, len(self._shards)), *range(first)]:
            table = self._documents(number)
            ordinals = table["ordinal"].to_numpy()
            row = int(np.searchsorted(ordinals, np.uint64(ordinal)))
            if row < len(ordinals) and ordinals[row] == ordinal:
                found: dict[str, Any] = table.slice(row, 1).to_pylist()[0]
                return found
        raise KeyError(ordinal)

    def find(self, document_id: str) -> list[Placement]:
        """Where the documents of this id went, in order; empty documents have one placement of length 0.

        Raises KeyError if there is none (it may be in faults.jsonl or in another subset).
        """
        found = self.locate(document_id)
        if not found:
            raise KeyError(document_id)
        return [placement for document in found for placement in document.placements]

    def locate(self, document: str | int) -> list[Located]:
        """The documents of this id, or the one of this ordinal, and where they went; none if there are none."""
        rows = self._rows(document)
        parts = self._placements(rows)
        found = []
        for row in sorted(rows, key=lambda row: int(row["ordinal"])):
            ordinal, length, source = row["ordinal"], row["length"], self._source(row["source"])
            placements = tuple(sorted(parts[ordinal], key=lambda part: part.start))
            where = self._place(row)
            cut_off = row.get("cut_off", 0)  # millstream/1 has no such column
            found.append(
                Located(
                    subset=self.subset,
                    id=row["id"],
                    ordinal=ordinal,
                    source=source,
                    offset=row["offset"],
                    length=length,
                    placements=placements,
                    place=where,
                    cut_off=cut_off,
                )
            )
        return found

    def named(self, ordinal: int) -> list[str]:
        """The document of this ordinal, in words: its id and its place; nothing if this subset has none."""
        return [f"{row['id']}, {self._place(row)}" for row in self._rows(ordinal)]

    def _source(self, number: int) -> str:
        return self.manifest.inputs[number].name

    @cached_property
    def _labels(self) -> list[str]:
        return called([entry.name for entry in self.manifest.inputs])

    def _place(self, row: dict[str, Any]) -> str:
        """Where the document of a row of documents-K.parquet stands, in words."""
        kind = self.manifest.inputs[row["source"]].kind  # an earlier format has none
        return place(self._labels[row["source"]], row["offset"], kind, name=self._source(row["source"]))

    def document_ids(self, document: int | Located) -> Ids:
        """All ids that a document (its ordinal, or what `locate` found) has in the samples, BOS and EOS too, in order.

        Raises KeyError if there is none, RunError if some of its ids were dropped with the remainder.
        """
        if isinstance(document, int):
            located = self.locate(document)
            if not located:
                raise KeyError(document)
            document = located[0]
        if document.dropped:
            raise RunError(
                f"document {document.id!r} is not whole: {document.dropped:,} of its {document.length:,} ids, the last "
                "ones, were dropped with the remainder"
            )
        parts = [self._placed(placement) for placement in document.placements if placement.length]
        return np.concatenate(parts) if parts else np.zeros(0, np.uint32)

    def faults(self) -> list[dict[str, Any]]:
        """The documents that could not be used, as faults.jsonl has them."""
        return list(self._fault_lines())

    def _fault_lines(self) -> Iterator[dict[str, Any]]:
        if self._store.exists(FAULTS):
            with self._store.open(FAULTS) as file:
                yield from map(json.loads, file)

    def faults_of(self, document_id: str) -> list[DocumentFault]:
        """The documents of this id that could not be used. One without an id is called by its place, as in a sample."""
        found = [fault for fault in map(_fault, self._fault_lines()) if document_id in _names(fault)]
        return [fault._replace(source=self._labels[fault.shard]) for fault in found]

    def _rows(self, document: str | int) -> list[dict[str, Any]]:
        """The rows of documents-K.parquet of this id or ordinal, each with its K as "shard"."""
        by_id = isinstance(document, str)
        column = "id" if by_id else "ordinal"
        found: list[dict[str, Any]] = []
        for number, entry in enumerate(self._shards):
            hits = OutputShard(self._store, self.manifest.settings, entry).documents_with(column, document)
            found += [{**row, "shard": number} for row in hits]
            if found and not by_id:
                break
        return found

    def _placements(self, rows: list[dict[str, Any]]) -> dict[int, list[Placement]]:
        """Where the documents of these rows went, by ordinal; each output shard's segments are looked at once.

        A document's last id is in the shard with its row, so we go back from there. The segments of one document are
        neighbours, unless best-fit placed them; and best-fit drops nothing, so that counting tells when all are found.
        """
        settings = self.manifest.settings
        neighbours = settings.strategy != "best-fit"
        ordered = neighbours and settings.shuffle is None
        found: dict[int, list[Placement]] = {row["ordinal"]: [] for row in rows}
        left = {row["ordinal"]: row["length"] for row in rows}
        wanted = {row["ordinal"]: row["shard"] for row in rows if row["length"]}
        for number in range(max(wanted.values(), default=-1), -1, -1):
            here = [ordinal for ordinal, last in wanted.items() if last >= number]
            if not here:
                continue
            shard = self._shard(number)
            base = self._ends[number - 1] if number else 0
            first: dict[int, int] = {}
            for ordinal, sample, start, length, inside in places(shard, here, ordered=ordered):
                found[ordinal].append(Placement(ordinal, base + sample, start, length, inside))
                left[ordinal] -= length
                first[ordinal] = min(start, first.get(ordinal, start))
            for ordinal in here:
                began = neighbours and len(shard.segments) > 0 and not first.get(ordinal)
                if began or not left[ordinal]:
                    del wanted[ordinal]
            if not wanted:
                break
        for ordinal, missing in left.items():
            if missing and self._entry.remainder.policy != "drop":
                lost = f"{missing:,} ids of document number {ordinal:,} are in no sample"
                raise RunError(f"{self.folder} is damaged: {lost}; 'millstream verify' says what is wrong")
            if missing or not found[ordinal]:
                kept = sum(part.length for part in found[ordinal])
                found[ordinal].append(Placement(ordinal, None, kept, missing))
        return found

    def _placed(self, placement: Placement) -> Ids:
        """The ids of a placement, as they stand in the sample or the remainder."""
        assert placement.sample is not None
        if placement.sample == len(self):
            rest = self.remainder
            assert rest
            ids = rest.token_ids
        else:
            shard, local = self._at(placement.sample)
            ids = shard.ids(local)
        return ids[placement.at : placement.at + placement.length]

    def _part(self, segment: Segment, index: int) -> DocumentPart:
        row = self.document(segment.document, index)
        source, length = self._source(row["source"]), row["length"]
        part = (segment.document, source, row["offset"], segment.start, segment.length, length, self._place(row))
        return DocumentPart(row["id"], *part)

    def _by_shard(self, numbers: Ids) -> Iterator[tuple[OutputShard, Ids, Ids]]:
        """The output shards that samples are in, in order; of each, which of `numbers` these are, and the numbers that
        the samples have there."""
        count, order = len(self), np.argsort(numbers)
        wanted = numbers[order]
        known = wanted.tolist()
        if known[0] < -count or known[-1] >= count:
            raise IndexError(f"sample {known[-1] if known[-1] >= count else known[0]} of {count}")
        if known[0] < 0:
            yield from self._by_shard(np.where(numbers < 0, numbers + count, numbers))
            return
        begin = 0
        while begin < len(known):
            which = bisect_right(self._ends, known[begin])
            end = bisect_left(known, self._ends[which], begin)
            first = self._ends[which - 1] if which else 0
            yield self._shard(which), order[begin:end], wanted[begin:end] - first
            begin = end

    def _left(self, n: int, length: Ids) -> int:
        """The padding before segments of these lengths in a sample."""
        return n - int(length.sum()) if self._pads_left else 0

    def _at(self, index: int) -> tuple[OutputShard, int]:
        """The output shard that a sample is in, and its number there."""
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        which = bisect_right(self._ends, number)
        return self._shard(which), number - (self._ends[which - 1] if which else 0)

    def _shard(self, number: int) -> OutputShard:
        settings = self.manifest.settings
        most = {"most": MOST_DECODED} if settings.format == "parquet" else {}
        return OPEN.get(self._owner, number, lambda: OutputShard(self._store, settings, self._shards[number]), **most)

    def _documents(self, number: int) -> Any:
        if number not in self._tables:
            table = OutputShard(self._store, self.manifest.settings, self._shards[number]).table()
            # Best-fit and shuffled documents end in another order than they began.
            if (np.diff(table["ordinal"].to_numpy().astype(np.int64)) < 0).any():
                table = table.sort_by("ordinal")
            self._tables[number] = table
            while len(self._tables) > _KEPT:
                self._tables.popitem(last=False)
        self._tables.move_to_end(number)
        return self._tables[number]


def gather(datasets: Sequence[Dataset], which: Ids, numbers: Ids, arrays: Arrays | None = None) -> Columns:
    """Samples of datasets of one `seq_len` side by side, without a `Sample` for each: number `numbers[i]` of dataset
    `which[i]`.

    Raises IndexError for a number that a dataset does not have, RequestError if there is nothing to gather.
    """
    if not len(numbers):
        raise RequestError("there is nothing to collate: give at least one sample")
    n = datasets[0].seq_len
    token_ids = (arrays or Arrays()).take("token_ids", (len(numbers), n), np.int64)
    lengths: list[Ids] = [_NONE] * len(numbers)
    left = np.zeros(len(numbers), np.int64)
    losses: dict[int, Ids] = {}
    for number, dataset in enumerate(datasets):
        those = np.flatnonzero(which == number)
        for shard, here, inside in dataset._by_shard(numbers[those]) if len(those) else ():
            rows = those[here].tolist()
            token_ids[rows] = shard.ids_of(inside)
            for row, length in zip(rows, shard.lengths_of(inside), strict=True):
                lengths[row] = length
            if dataset._pads_left:
                left[rows] = [dataset._left(n, lengths[row]) for row in rows]
            if shard.settings.masked:
                losses |= {row: shard.loss(sample) for row, sample in zip(rows, inside.tolist(), strict=True)}
    return side_by_side(token_ids, lengths, left, losses)


def _fault(line: dict[str, Any]) -> DocumentFault:
    return DocumentFault(**line)


def _names(fault: DocumentFault) -> set[str]:
    """What a faulty document is called: its id; without one, what a good one there would be called."""
    if fault.id is not None:
        return {fault.id}
    return {f"{fault.source}#{fault.offset}"} | (set() if fault.line or fault.offset else {fault.source})
