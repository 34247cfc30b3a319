"""Read a finished run folder: samples by index without copying, whose documents they hold, where a document went."""

import builtins
import os
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, overload

import numpy as np

from millstream.errors import RequestError, RunError
from millstream.formats.manifest import FAULTS, read_manifest
from millstream.records import SEGMENT, Ids, Sample, Segment

_KEPT = 4  # documents tables held at once


class DocumentPart(NamedTuple):
    """The part of a document that a sample holds: `length` ids from the document's id number `start`.

    `offset` is where the document stands in its input shard `source`: a byte (decompressed) or a row.
    """

    id: str
    ordinal: int
    source: str
    offset: int
    start: int
    length: int
    document_length: int


class Placement(NamedTuple):
    """Where `length` ids of a document, from its id number `start`, went: into sample number `sample`.

    `sample` is the dataset's length for the kept remainder, and None for ids that were dropped with it.
    """

    ordinal: int
    sample: int | None
    start: int
    length: int


def open(folder: str | os.PathLike[str], subset: str = "train") -> "Dataset":
    """The samples of a finished run folder; `subset` is train or validation.

    Raises RequestError if the folder is no run folder, is unfinished, or has no such subset.
    """
    return Dataset(os.fspath(folder), subset)


class Dataset(Sequence[Sample]):
    """Samples by number: ``len``, indexing (negative too), slices (lists of samples) and iteration.

    Token ids are views of memory-mapped files: nothing is read before it is looked at.
    """

    def __init__(self, folder: str, subset: str = "train") -> None:
        self.folder, self.subset = folder, subset
        self.manifest = read_manifest(folder)
        if not self.manifest["complete"]:
            raise RequestError(f"{folder} is not finished; run the same pack command again to go on")
        if subset not in self.manifest["subsets"]:
            known = ", ".join(self.manifest["subsets"])
            raise RequestError(f"{folder} has no subset {subset!r}; it has {known}")
        self._entry = self.manifest["subsets"][subset]
        self._shards: list[dict[str, Any]] = self._entry["shards"]
        counts = [shard["samples"] for shard in self._shards]
        self._ends = np.cumsum(counts, dtype=np.int64)
        self._open_shards: dict[int, _Shard] = {}
        self._tables: OrderedDict[int, Any] = OrderedDict()

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
        which = int(np.searchsorted(self._ends, number, side="right"))
        shard = self._shard(which)
        local = number - (int(self._ends[which - 1]) if which else 0)
        segments = shard.segments_of(local)
        return self._sample(shard.ids(local), segments)

    def __iter__(self) -> Iterator[Sample]:
        for number in range(len(self)):
            yield self[number]

    @property
    def remainder(self) -> Sample | None:
        """The ids that filled no sample, where they were kept (`complete` is False)."""
        kept = self._entry["remainder"]
        if not kept or "name" not in kept:
            return None
        ids = np.load(os.path.join(self.folder, kept["name"]))
        shard = self._shard(len(self._shards) - 1)
        segments = shard.segments_of(self._shards[-1]["samples"])
        return Sample(ids, _plain(segments), complete=False)

    def documents(self, index: int) -> list[DocumentPart]:
        """The documents that sample `index` holds, in order."""
        return [self._part(segment, index) for segment in self[index].segments]

    def document(self, ordinal: int, index: int = 0) -> dict[str, Any]:
        """A document's row of documents-K.parquet; `index` is a sample that holds some of it, to look there first."""
        first = int(np.searchsorted(self._ends, index, side="right"))
        for number in [*range(min(first, len(self._shards)), len(self._shards)), *range(first)]:
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
        import pyarrow.compute as pc

        ordinals: dict[int, int] = {}
        for number in range(len(self._shards)):
            table = self._documents(number)
            hits = table.filter(pc.equal(table["id"], document_id))
            lengths = hits["length"].to_pylist()
            ordinals |= dict(zip(hits["ordinal"].to_pylist(), lengths, strict=True))
        if not ordinals:
            raise KeyError(document_id)
        return [place for ordinal, length in sorted(ordinals.items()) for place in self._places(ordinal, length)]

    def faults(self) -> list[dict[str, Any]]:
        """The documents that could not be used, as faults.jsonl has them."""
        import json

        path = os.path.join(self.folder, FAULTS)
        if not os.path.exists(path):
            return []
        with builtins.open(path, encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def _places(self, ordinal: int, length: int) -> list[Placement]:
        places, base, found = [], 0, 0
        for number in range(len(self._shards)):
            segments = self._shard(number).segments
            for row in np.flatnonzero(segments["document"] == ordinal).tolist():
                segment = segments[row]
                size = int(segment["length"])
                places.append(Placement(ordinal, base + int(segment["sample"]), int(segment["start"]), size))
                found += size
            base += self._shards[number]["samples"]
        if found < length or not places:
            places.append(Placement(ordinal, None, found, length - found))
        return places

    def _part(self, segment: Segment, index: int) -> DocumentPart:
        row = self.document(segment.document, index)
        source = self.manifest["inputs"][row["source"]]["name"]
        return DocumentPart(
            row["id"], segment.document, source, row["offset"], segment.start, segment.length, row["length"]
        )

    def _sample(self, ids: Ids, segments: Ids) -> Sample:
        left = self.manifest["settings"]["pad_side"] == "left"
        padding = len(ids) - int(segments["length"].sum())
        return Sample(ids, _plain(segments), pad_left=padding if left else 0)

    def _shard(self, number: int) -> "_Shard":
        if number not in self._open_shards:
            self._open_shards[number] = _Shard(self.folder, self._shards[number], self.manifest["settings"])
        return self._open_shards[number]

    def _documents(self, number: int) -> Any:
        import pyarrow.parquet as pq

        if number not in self._tables:
            path = os.path.join(self.folder, self._shards[number]["files"]["documents"]["name"])
            table = pq.read_table(path)
            # Best-fit and shuffled documents end in another order than they began.
            if (np.diff(table["ordinal"].to_numpy().astype(np.int64)) < 0).any():
                table = table.sort_by("ordinal")
            self._tables[number] = table
            while len(self._tables) > _KEPT:
                self._tables.popitem(last=False)
        self._tables.move_to_end(number)
        return self._tables[number]


class _Shard:
    """One output shard, opened on first use."""

    def __init__(self, folder: str, entry: dict[str, Any], settings: dict[str, Any]) -> None:
        self._paths = {kind: os.path.join(folder, file["name"]) for kind, file in entry["files"].items()}
        self._samples, self._format = entry["samples"], settings["format"]
        self._group: tuple[int, Ids] = (-1, np.empty(0))

    @cached_property
    def segments(self) -> Ids:
        return _load(self._paths["segments"])

    @cached_property
    def _bounds(self) -> Ids:
        return np.searchsorted(self.segments["sample"], np.arange(self._samples + 2))

    def segments_of(self, sample: int) -> Ids:
        return self.segments[self._bounds[sample] : self._bounds[sample + 1]]

    @cached_property
    def _file(self) -> Any:
        import pyarrow.parquet as pq

        if self._format == "parquet":
            return pq.ParquetFile(self._paths["samples"])
        return _load(self._paths["samples"])

    def ids(self, sample: int) -> Ids:
        if self._format != "parquet":
            ids: Ids = self._file[sample]
            return ids
        rows = self._file.metadata.row_group(0).num_rows
        group, local = divmod(sample, rows)
        if self._group[0] != group:
            column = self._file.read_row_group(group, columns=["input_ids"])["input_ids"]
            flat = column.combine_chunks().flatten().to_numpy()
            self._group = (group, flat.reshape(len(column), -1).astype(np.uint32))
        row: Ids = self._group[1][local]
        return row


def _load(path: str) -> Ids:
    try:
        loaded: Ids = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); 'millstream verify' says what is wrong") from error
    return loaded


def _plain(segments: Ids) -> tuple[Segment, ...]:
    assert segments.dtype == SEGMENT
    rows = zip(segments["document"].tolist(), segments["start"].tolist(), segments["length"].tolist(), strict=True)
    return tuple(Segment(*row) for row in rows)
