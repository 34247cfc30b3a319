"""Write one output shard: its samples, its segments and its documents, sealed together."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, Protocol

import numpy as np

from millstream.errors import RunError
from millstream.formats.exports.parquet import batch, schema
from millstream.formats.exports.samples import runs_of
from millstream.formats.manifest import TEMPORARY, commit_file, remainder_name, shard_names
from millstream.records import SEGMENT, Ids, unmarked

DOCUMENT_ROWS = 1 << 16
SAMPLE_ROWS = 1 << 10


class _Npy:
    """A .npy file written in pieces: its header is padded to a fixed size and written again at the end."""

    def __init__(self, path: str, dtype: "np.dtype[Any]", columns: int | None = None) -> None:
        self.rows = 0
        self._dtype, self._columns = dtype, columns
        self._file: IO[bytes] = open(path, "w+b")  # noqa: SIM115  closed by `close`
        self._file.write(self._header())

    def _header(self) -> bytes:
        # The format: 6 + 2 bytes of magic, u16 length, a dict literal padded with blanks to a multiple of 64 bytes.
        shape = (self.rows,) if self._columns is None else (self.rows, self._columns)
        descr = np.lib.format.dtype_to_descr(self._dtype)
        text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
        size = 128 if self._columns is not None else 256
        return b"\x93NUMPY\x01\x00" + (size - 10).to_bytes(2, "little") + text.ljust(size - 11).encode() + b"\n"

    def write(self, rows: Ids) -> None:
        self.rows += len(rows)
        if rows.size:
            self._file.write(np.ascontiguousarray(rows, self._dtype).view(np.uint8).data)

    def finish(self) -> None:
        self._file.seek(0)
        self._file.write(self._header())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class _Parquet:
    """A Parquet file written in row groups of a fixed number of rows, however the rows arrive."""

    def __init__(self, path: str, schema: Any, rows: int, compression: str) -> None:
        import pyarrow.parquet as pq

        self._writer = pq.ParquetWriter(path, schema, compression=compression, use_dictionary=False)
        self._schema, self._rows = schema, rows
        self._held: list[Any] = []
        self._size = 0

    def write(self, columns: Sequence[Any]) -> None:
        import pyarrow as pa

        batch = pa.record_batch([pa.array(c, f.type) for c, f in zip(columns, self._schema, strict=True)], self._schema)
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

    def finish(self) -> None:
        if self._held:
            self._write(self._held)
        self._writer.close()

    def close(self) -> None:
        self._writer.close()


class _Samples(Protocol):
    def write(self, ids: Ids, segments: Ids, learned: Ids | None) -> None: ...
    def finish(self) -> None: ...
    def close(self) -> None: ...


class _NpySamples:
    """Samples as an array and, where the run has a loss mask, that as another one."""

    def __init__(self, paths: dict[str, str], shape: "Shape") -> None:
        self._ids = _Npy(paths["samples"], shape.dtype, shape.seq_len)
        self._loss = _Npy(paths["loss"], np.dtype(bool), shape.seq_len) if shape.masked else None

    def write(self, ids: Ids, segments: Ids, learned: Ids | None) -> None:
        self._ids.write(ids)
        if self._loss is not None and learned is not None:
            self._loss.write(learned)

    def finish(self) -> None:
        for file in filter(None, (self._ids, self._loss)):
            file.finish()

    def close(self) -> None:
        for file in filter(None, (self._ids, self._loss)):
            file.close()


class _ParquetSamples:
    """Rows for Hugging Face `datasets` and TRL, in the columns of `exports.parquet.schema`."""

    def __init__(self, path: str, shape: "Shape") -> None:
        self._shape = shape
        self._schema = schema(shape.padded or shape.masked, shape.metadata)
        self._file = _Parquet(path, self._schema, SAMPLE_ROWS, "snappy")
        self.finish, self.close = self._file.finish, self._file.close

    def write(self, ids: Ids, segments: Ids, learned: Ids | None) -> None:
        if len(ids):
            first = int(segments["sample"][0])
            runs = runs_of(segments, len(ids), self._shape.seq_len, first, self._shape.pad_left)
            self._file.write(batch(self._schema, ids, runs, learned).columns)


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


@dataclass(frozen=True)
class Rows:
    """Documents, in columns, as documents-K.parquet keeps them; `length` and `cut_off` in ids, `offset` in bytes or
    rows."""

    ordinal: Ids
    id: list[str]
    source: Ids
    offset: Ids
    length: Ids
    split: Ids
    cut_off: Ids


def documents_schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("ordinal", pa.uint64()),
            ("id", pa.string()),
            ("source", pa.uint32()),
            ("offset", pa.uint64()),
            ("length", pa.uint64()),
            ("split", pa.bool_()),
            ("cut_off", pa.uint64()),
        ]
    )


COUNTS = ("documents", "empty", "split", "truncated", "left_out", "cut_off")
"""What is counted of an output shard's documents, as the manifest has it."""


def count_documents(length: Ids, split: Ids, cut_off: Ids) -> dict[str, int]:
    """`COUNTS` of these documents, of which a shard's table has the columns.

    >>> some = count_documents(np.array([0, 0, 4, 4]), np.array([False, False, True, True]), np.array([0, 9, 3, 0]))
    >>> some["empty"], some["left_out"], some["truncated"], some["split"], some["cut_off"]
    (1, 1, 1, 1, 12)
    """
    whole, filled = cut_off == 0, length > 0
    masks = (whole & ~filled, split & whole, ~whole & filled, ~whole & ~filled)
    counts = [len(length), *(int(mask.sum()) for mask in masks), int(cut_off.sum())]
    return dict(zip(COUNTS, counts, strict=True))


def read_rows(path: str) -> Iterator[Rows]:
    """The documents of an output shard, `DOCUMENT_ROWS` at a time. Raises RunError if they cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(DOCUMENT_ROWS):
                names = [name for name in batch.schema.names if name != "id"]
                numbers = {name: batch[name].to_numpy(zero_copy_only=False) for name in names}
                length = numbers["length"].astype(np.int64)
                cut_off = numbers.get("cut_off", np.zeros(len(length))).astype(np.int64)  # millstream/1 has none
                fields = (numbers["ordinal"], batch["id"].to_pylist(), numbers["source"], numbers["offset"])
                yield Rows(*fields, length, numbers["split"].astype(bool), cut_off)
    except (KeyError, OSError, ValueError, pa.ArrowException) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


class ShardWriter:
    """Output shard `number` of a subset; nothing has its name before `seal`."""

    def __init__(self, folder: str, subset: str, number: int, shape: Shape) -> None:
        self.folder, self.number, self.shape = folder, number, shape
        self.samples = self.padding = self.learned = 0
        self._counts: Counter[str] = Counter()
        self._names = shard_names(subset, number, shape.format, shape.masked and shape.format == "npy")
        paths = {kind: os.path.join(folder, name + TEMPORARY) for kind, name in self._names.items()}
        self._samples: _Samples
        if shape.format == "parquet":
            self._samples = _ParquetSamples(paths["samples"], shape)
        else:
            self._samples = _NpySamples(paths, shape)
        self._segments = _Npy(paths["segments"], SEGMENT)
        self._documents = _Parquet(paths["documents"], documents_schema(), DOCUMENT_ROWS, "zstd")

    def write(self, ids: Ids, segments: Ids, padding: int = 0) -> None:
        """Samples (rows, seq_len) and their segments, numbered from the shard's first sample."""
        learned = None
        if self.shape.masked:
            ids, learned = unmarked(ids, self.shape.dtype)
            self.learned += int(learned.sum())
        self._samples.write(ids, segments, learned)
        self._segments.write(segments)
        self.samples += len(ids)
        self.padding += padding

    def write_segments(self, segments: Ids) -> None:
        """Segments of the remainder, which belong to the sample after the last one."""
        self._segments.write(segments)

    def write_documents(self, rows: Rows) -> None:
        columns = [rows.ordinal, rows.id, rows.source, rows.offset, rows.length, rows.split, rows.cut_off]
        self._documents.write(columns)
        self._counts.update(count_documents(rows.length, rows.split, rows.cut_off))

    def seal(self) -> dict[str, Any]:
        """Write everything durably under its name; the shard's manifest entry."""
        for part in (self._samples, self._segments, self._documents):
            part.finish()
            part.close()
        return {
            "number": self.number,
            "samples": self.samples,
            "padding": self.padding,
            "segments": self._segments.rows,
            **{name: self._counts[name] for name in COUNTS},
            **({"learned": self.learned} if self.shape.masked else {}),
            "files": {kind: {"name": name, **commit_file(self.folder, name)} for kind, name in self._names.items()},
        }

    def close(self) -> None:
        """Give up: the temporary files stay for the next run to delete."""
        for part in (self._samples, self._segments, self._documents):
            part.close()


def write_remainder(folder: str, subset: str, ids: Ids, shape: Shape) -> dict[str, Any]:
    """The remainder's manifest entry, once it is written; its loss mask, if there is one, in a file of its own."""
    if not shape.masked:
        return {"ids": len(ids), **_write_flat(folder, remainder_name(subset), ids)}
    ids, learned = unmarked(ids, shape.dtype)
    loss = _write_flat(folder, remainder_name(subset, "remainder-loss"), learned)
    return {"ids": len(ids), **_write_flat(folder, remainder_name(subset), ids), "loss": loss}


def _write_flat(folder: str, name: str, values: Ids) -> dict[str, Any]:
    file = _Npy(os.path.join(folder, name + TEMPORARY), values.dtype, None)
    file.write(values)
    file.finish()
    file.close()
    return {"name": name, **commit_file(folder, name)}
