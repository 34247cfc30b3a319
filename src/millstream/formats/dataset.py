"""Read a finished run folder: samples by index without copying, whose documents they hold, where a document went."""

import builtins
import json
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np

from millstream.errors import RequestError, RunError
from millstream.formats.corpus import labelled
from millstream.formats.kinds import place
from millstream.formats.manifest import FAULTS, read_manifest, refuse_earlier
from millstream.formats.opened import OPEN, Shard, damaged, load
from millstream.records import Fault, Ids
from millstream.samples import Sample, Segment, Segments

_KEPT = 4  # documents tables held at once


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
        if not self.manifest["complete"]:
            refuse_earlier(folder, self.manifest)
            raise RequestError(f"{folder} is not finished; run the same pack command again to go on")
        if subset not in self.manifest["subsets"]:
            known = ", ".join(self.manifest["subsets"])
            raise RequestError(f"{folder} has no subset {subset!r}; it has {known}")
        self._entry = self.manifest["subsets"][subset]
        self._shards: list[dict[str, Any]] = self._entry["shards"]
        counts = [shard["samples"] for shard in self._shards]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._owner = OPEN.owner_of(self)
        self._tables: OrderedDict[int, Any] = OrderedDict()

    def __reduce__(self) -> tuple[type["Dataset"], tuple[str, str]]:
        return Dataset, (self.folder, self.subset)

    @property
    def settings(self) -> dict[str, Any]:
        """What decided the bytes, as given and as found out."""
        return dict(self.manifest["settings"])

    @property
    def seq_len(self) -> int:
        return int(self.manifest["settings"]["seq_len"])

    @property
    def ledger(self) -> dict[str, Any]:
        return dict(self.manifest["ledger"])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        number = index + len(self) if index < 0 else index
        if not 0 <= number < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        shard, local = self._at(number)
        return self._sample(shard.ids(local), shard.segments_of(local), shard.loss(local))

    def __iter__(self) -> Iterator[Sample]:
        for number in range(len(self)):
            yield self[number]

    @property
    def remainder(self) -> Sample | None:
        """The ids that filled no sample, where they were kept (`complete` is False)."""
        kept = self._entry["remainder"]
        if not kept or "name" not in kept:
            return None
        ids = load(os.path.join(self.folder, kept["name"]))
        loss = load(os.path.join(self.folder, kept["loss"]["name"])) if "loss" in kept else None
        shard = self._shard(len(self._shards) - 1)
        segments = shard.segments_of(self._shards[-1]["samples"])
        return Sample(ids, Segments(segments), complete=False, loss=loss)

    def documents(self, index: int) -> list[DocumentPart]:
        """The documents that sample `index` holds, in order; the dataset's length stands for the kept remainder."""
        sample = self.remainder if index == len(self) else None
        return [self._part(segment, index) for segment in (sample or self[index]).segments]

    def document(self, ordinal: int, index: int = 0) -> dict[str, Any]:
        """A document's row of documents-K.parquet; `index` is a sample that holds some of it, to look there first."""
        first = min(int(np.searchsorted(self._ends, index, side="right")), len(self._shards) - 1)
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
                Located(self.subset, row["id"], ordinal, source, row["offset"], length, placements, where, cut_off)
            )
        return found

    def named(self, ordinal: int) -> list[str]:
        """The document of this ordinal, in words: its id and its place; nothing if this subset has none."""
        return [f"{row['id']}, {self._place(row)}" for row in self._rows(ordinal)]

    def _source(self, number: int) -> str:
        name: str = self.manifest["inputs"][number]["name"]
        return name

    @cached_property
    def _labels(self) -> list[str]:
        return labelled([entry["name"] for entry in self.manifest["inputs"]])

    def _place(self, row: dict[str, Any]) -> str:
        """Where the document of a row of documents-K.parquet stands, in words."""
        kind = self.manifest["inputs"][row["source"]].get("kind")  # an earlier format has none
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
        path = os.path.join(self.folder, FAULTS)
        if os.path.exists(path):
            with builtins.open(path, encoding="utf-8") as file:
                yield from map(json.loads, file)

    def faults_of(self, document_id: str) -> list[Fault]:
        """The documents of this id that could not be used. One without an id is called by its place, as in a sample."""
        found = [fault for fault in map(_fault, self._fault_lines()) if document_id in _names(fault)]
        return [fault._replace(source=self._labels[fault.shard]) for fault in found]

    def _rows(self, document: str | int) -> list[dict[str, Any]]:
        """The rows of documents-K.parquet of this id or ordinal, each with its K as "shard"."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        by_id = isinstance(document, str)
        name, value = ("id", pa.scalar(document)) if by_id else ("ordinal", pa.scalar(document, pa.uint64()))
        found: list[dict[str, Any]] = []
        for number in range(len(self._shards)):
            path = self._documents_path(number)
            try:
                hits = pq.read_table(path, filters=pc.field(name) == value, partitioning=None).to_pylist()
            except (OSError, pa.ArrowInvalid) as error:
                raise damaged(path, error) from error
            found += [{**row, "shard": number} for row in hits]
            if found and not by_id:
                break
        return found

    def _placements(self, rows: list[dict[str, Any]]) -> dict[int, list[Placement]]:
        """Where the documents of these rows went, by ordinal; each output shard's segments are looked at once.

        A document's last id is in the shard with its row, so we go back from there. The segments of one document are
        neighbours, unless best-fit placed them; and best-fit drops nothing, so that counting tells when all are found.
        """
        settings = self.manifest["settings"]
        neighbours = settings["strategy"] != "best-fit"
        ordered = neighbours and settings.get("shuffle") is None
        found: dict[int, list[Placement]] = {row["ordinal"]: [] for row in rows}
        left = {row["ordinal"]: row["length"] for row in rows}
        wanted = {row["ordinal"]: row["shard"] for row in rows if row["length"]}
        for number in range(max(wanted.values(), default=-1), -1, -1):
            here = [ordinal for ordinal, last in wanted.items() if last >= number]
            if not here:
                continue
            shard = self._shard(number)
            base = int(self._ends[number - 1]) if number else 0
            first: dict[int, int] = {}
            for ordinal, sample, start, length, at in shard.places(here, ordered):
                found[ordinal].append(Placement(ordinal, base + sample, start, length, at))
                left[ordinal] -= length
                first[ordinal] = min(start, first.get(ordinal, start))
            for ordinal in here:
                began = neighbours and len(shard.segments) > 0 and not first.get(ordinal)
                if began or not left[ordinal]:
                    del wanted[ordinal]
            if not wanted:
                break
        for ordinal, missing in left.items():
            if missing and self._entry["remainder"]["policy"] != "drop":
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

    def _sample(self, ids: Ids, segments: Ids, loss: Ids | None) -> Sample:
        left = self.manifest["settings"]["pad_side"] == "left"
        padding = len(ids) - int(segments["length"].sum())
        return Sample(ids, Segments(segments), pad_left=padding if left else 0, loss=loss)

    def _at(self, number: int) -> tuple[Shard, int]:
        """The output shard that sample `number` is in, and its number there."""
        which = int(np.searchsorted(self._ends, number, side="right"))
        return self._shard(which), number - (int(self._ends[which - 1]) if which else 0)

    def _shard(self, number: int) -> Shard:
        return OPEN.get(
            self._owner, number, lambda: Shard(self.folder, self._shards[number], self.manifest["settings"])
        )

    def _documents_path(self, number: int) -> str:
        return os.path.join(self.folder, self._shards[number]["files"]["documents"]["name"])

    def _documents(self, number: int) -> Any:
        import pyarrow.parquet as pq

        if number not in self._tables:
            table = pq.read_table(self._documents_path(number))
            # Best-fit and shuffled documents end in another order than they began.
            if (np.diff(table["ordinal"].to_numpy().astype(np.int64)) < 0).any():
                table = table.sort_by("ordinal")
            self._tables[number] = table
            while len(self._tables) > _KEPT:
                self._tables.popitem(last=False)
        self._tables.move_to_end(number)
        return self._tables[number]


def _fault(line: dict[str, Any]) -> Fault:
    return Fault(**line)


def _names(fault: Fault) -> set[str]:
    """What a faulty document is called: its id; without one, what a good one there would be called."""
    if fault.id is not None:
        return {fault.id}
    return {f"{fault.source}#{fault.offset}"} | (set() if fault.line or fault.offset else {fault.source})
