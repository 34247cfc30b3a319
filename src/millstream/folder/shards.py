"""Write one output shard: its samples, its segments and its documents, sealed together."""

import contextlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from msgspec.structs import replace

from millstream.folder.columns import batch, schema
from millstream.folder.documents import COUNTS, DOCUMENT_ROWS, DocumentTable, count_documents, documents_schema
from millstream.folder.entries import FileEntry, Files, RemainderEntry, ShardEntry
from millstream.folder.manifest import remainder_name, shard_names
from millstream.folder.npy import NpyWriter
from millstream.folder.samples import runs_of
from millstream.records import SEGMENT, Ids, ids_and_learned
from millstream.store import Store, WrittenFile, at

SAMPLE_ROWS = 1 << 10


class _Parquet:
    """A Parquet file written in row groups of a fixed number of rows, however the rows arrive."""

    def __init__(self, store: Store, name: str, schema: Any, rows: int, *, compression: str) -> None:
        import pyarrow.parquet as pq

        file = self._file = store.write(name)
        self._writer = pq.ParquetWriter(file, schema, compression=compression, use_dictionary=False)
        self._schema, self._rows = schema, rows
        self._held: list[Any] = []
        self._size = 0

    def write(self, columns: Sequence[Any]) -> None:
        import pyarrow as pa

        arrays = [arrow_column(column, field.type) for column, field in zip(columns, self._schema, strict=True)]
        batch = pa.record_batch(arrays, self._schema)
        while self._size + batch.num_rows >= self._rows:
            take = self._rows - self._size
            self._write([*self._held, batch.slice(0, take)])
            batch = batch.slice(take)
            self._held, self._size = [], 0
        if batch.num_rows:
            self._held.append(batch)
            self._size += batch.num_rows

    def _write(self, batches: list[Any]) -> None:
        import pyarrow as pa

        self._writer.write_table(pa.Table.from_batches(batches, self._schema).combine_chunks(), self._rows)

    def finish(self) -> WrittenFile:
        if self._held:
            self._write(self._held)
        self._writer.close()
        return self._file.finish()

    def close(self) -> None:
        self._file.close()  # first, so that the end that is written now goes nowhere
        self._writer.close()


@dataclass(frozen=True)
class Shape:
    """What decides the form of the output shards: `per_shard` samples of `seq_len` ids each, in `format`.

    `padded`: whether there can be padding, and `pad_left`, on which side. `masked`: ids come with LEARNED set where
    they are to be learned, and that is stored beside them.
    """

    seq_len: int
    dtype: "np.dtype[Any]"
    per_shard: int
    format: str = "npy"
    metadata: dict[str, str] = field(default_factory=dict)
    padded: bool = False
    pad_left: bool = False
    masked: bool = False


def arrow_column(column: Any, kind: Any) -> Any:
    """A column as an Arrow array of a type: of numpy's numbers and flags by their bytes. `pa.array` would look whether
    they are masked, and load `numpy.ma` for it, which takes longer than all else that a small run writes."""
    import pyarrow as pa

    if not isinstance(column, np.ndarray):
        return pa.array(column, kind)
    # By its name: to_pandas_dtype loads pandas in some versions, which need not be there.
    wanted = np.ascontiguousarray(column, np.dtype(str(kind)))
    values = np.packbits(wanted, bitorder="little") if wanted.dtype == np.bool_ else wanted
    return pa.Array.from_buffers(kind, len(column), [None, pa.py_buffer(values)])


class ShardWriter:
    """Output shard `number` of a subset; nothing has its name before `seal`, and several can write it at once.

    `fills`: whether it will probably have `per_shard` samples. It saves time to be right: samples that are fewer than
    their header says have to be hashed again, and those that nobody expects are hashed at the end alone.
    """

    def __init__(self, folder: str, subset: str, number: int, shape: Shape, *, fills: bool = True) -> None:
        self.number, self.shape = number, shape
        self.samples = self.padding = self.learned = 0
        self._counts: Counter[str] = Counter()
        names = shard_names(subset, number, shape.format, shape.masked and shape.format == "npy")
        self._names = names
        store, expected = at(folder), shape.per_shard if fills else None
        if shape.format == "parquet":
            self._schema = schema(shape.padded or shape.masked, shape.metadata)
            self._rows = _Parquet(store, names["samples"], self._schema, SAMPLE_ROWS, compression="snappy")
        else:
            self._ids = NpyWriter(store, names["samples"], shape.dtype, shape.seq_len, expected)
        if "loss" in names:
            self._loss = NpyWriter(store, names["loss"], np.dtype(bool), shape.seq_len, expected)
        self._segments = NpyWriter(store, names["segments"], SEGMENT)
        documents = names["documents"]
        self._documents = _Parquet(store, documents, documents_schema(), DOCUMENT_ROWS, compression="zstd")

    def _files(self) -> dict[str, "NpyWriter | _Parquet"]:
        samples = self._rows if self.shape.format == "parquet" else self._ids
        loss = {"loss": self._loss} if "loss" in self._names else {}
        return {"samples": samples, "segments": self._segments, "documents": self._documents, **loss}

    def write(self, ids: Ids, segments: Ids, padding: int = 0) -> None:
        """Samples (rows, seq_len) and their segments, numbered from the shard's first sample."""
        learned = None
        if self.shape.masked:
            ids, learned = ids_and_learned(ids, self.shape.dtype)
            self.learned += int(learned.sum())
        if self.shape.format == "parquet":
            self._write_rows(ids, segments, learned)
        else:
            self._ids.write(ids)
            if learned is not None:
                self._loss.write(learned)
        self._segments.write(segments)
        self.samples += len(ids)
        self.padding += padding

    def _write_rows(self, ids: Ids, segments: Ids, learned: Ids | None) -> None:
        """Rows for Hugging Face `datasets` and TRL, in the columns of `columns.schema`."""
        if len(ids):
            first = int(segments["sample"][0])
            runs = runs_of(segments, len(ids), self.shape.seq_len, first, self.shape.pad_left)
            self._rows.write(batch(self._schema, ids, runs, learned).columns)

    def write_segments(self, segments: Ids) -> None:
        """Segments of the remainder, which belong to the sample after the last one."""
        self._segments.write(segments)

    def write_documents(self, rows: DocumentTable) -> None:
        columns = [rows.ordinal, rows.id, rows.source, rows.offset, rows.length, rows.split, rows.cut_off]
        self._documents.write(columns)
        self._counts.update(count_documents(rows.length, rows.split, rows.cut_off))

    def seal(self) -> ShardEntry:
        """Write everything durably under its name; the shard's manifest entry."""
        written = {kind: FileEntry(self._names[kind], *file.finish()) for kind, file in self._files().items()}
        return ShardEntry(
            number=self.number,
            samples=self.samples,
            padding=self.padding,
            segments=self._segments.rows,
            **{name: self._counts[name] for name in COUNTS},
            learned=self.learned if self.shape.masked else None,
            files=Files(**written),
        )

    def close(self) -> None:
        """Give up: nothing of it is left."""
        for file in self._files().values():
            file.close()


def write_remainder(folder: str, subset: str, rest: RemainderEntry, ids: Ids, shape: Shape) -> RemainderEntry:
    """Write the ids of a remainder, and their loss mask, if there is one; its manifest entry with these files."""
    loss = None
    if shape.masked:
        ids, learned = ids_and_learned(ids, shape.dtype)
        loss = _write_flat(folder, remainder_name(subset, "remainder-loss"), learned)
    file = _write_flat(folder, remainder_name(subset), ids)
    return replace(rest, name=file.name, bytes=file.bytes, sha256=file.sha256, loss=loss)


def _write_flat(folder: str, name: str, values: Ids) -> FileEntry:
    with contextlib.closing(NpyWriter(at(folder), name, values.dtype, expected=len(values))) as file:
        file.write(values)
        return FileEntry(name, *file.finish())
