"""The one reader of a run's output shards: by columns, and of them only what is looked at."""

import errno
import os
import resource
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any

import numpy as np

from millstream.corpus.parquet import said
from millstream.errors import RunError
from millstream.folder import npy
from millstream.folder.documents import DOCUMENT_ROWS, DocumentTable
from millstream.folder.entries import FileEntry, Identity, RemainderEntry, ShardEntry
from millstream.folder.far import FarRows, Form
from millstream.records import SEGMENT, Ids
from millstream.samples import IGNORED
from millstream.store import Store, is_far

_AND_THE_NEXT = np.array([0, 1])


def array(store: Store, name: str) -> Ids:
    """A .npy file, mapped: a view that cannot be written to, of which only what is looked at is read. Raises RunError.

    A plain array: numpy's own subclass for such files makes half of the cost of taking a sample.
    """
    try:
        return npy.load(os.path.join(store.url, name))
    except (OSError, ValueError) as error:
        raise damaged(store, name, error) from error


def rows(store: Store, file: FileEntry, known: Form | None = None) -> "Ids | FarRows":
    """The rows of a .npy file: mapped, or far away fetched as they are looked at, where they are by what is `known` of
    them. Raises RunError."""
    if not is_far(store.url):
        return array(store, file.name)
    try:
        return FarRows(partial(_range, store, file.name), file.bytes, known)
    except ValueError as error:
        raise damaged(store, file.name, error) from error


def _range(store: Store, name: str, start: int, stop: int) -> bytes:
    try:
        data = store.read(name, start, stop)
    except OSError as error:
        raise damaged(store, name, error) from error
    if len(data) < stop - start:
        raise unusable(store, name, "it is shorter than it was")
    return data


class OutputShard:
    """One output shard; its files are opened on first use."""

    def __init__(self, store: Store, settings: Identity, entry: ShardEntry) -> None:
        self.store, self.settings, self.entry = store, settings, entry
        self._is_parquet, self._is_far = settings.format == "parquet", is_far(store.url)
        self._group: tuple[int, Ids, Ids | None] = (-1, np.empty(0), None)

    def __len__(self) -> int:
        return self.entry.samples

    @property
    def name(self) -> str:
        """The file of its samples."""
        return self.entry.files.samples.name

    @property
    def _columns(self) -> list[str]:
        return ["input_ids", *(["labels"] if self.settings.masked else [])]

    # Whose ids

    @cached_property
    def segments(self) -> Ids:
        return array(self.store, self.entry.files.segments.name)

    @cached_property
    def _samples(self) -> Ids:
        """Which sample each segment is of, in order."""
        column: Ids = self.segments["sample"]
        return column

    def _bounds(self, samples: Ids) -> Ids:
        """Where the segments of these samples begin; those of the remainder come behind the last one's.

        They are looked for, as who takes samples of many shards by chance opens one for each, and would look at all of
        its segments to know them.
        """
        found: Ids = np.searchsorted(self._samples, samples.astype(self._samples.dtype, copy=False))
        return found

    def segments_of(self, first: int, stop: int | None = None) -> Ids:
        """Those of the samples from `first` to before `stop`, or of one; the remainder comes behind the last one."""
        stop = first + 1 if stop is None else stop
        if not self._is_far:
            begin, end = self._bounds(np.array([first, stop])).tolist()
            return self.segments[begin:end]
        begin, end = (self._far_segments.first(sample, "sample", len(self)) for sample in (first, stop))
        return self._far_segments[begin:end]

    @cached_property
    def _far_segments(self) -> "FarRows":
        found = rows(self.store, self.entry.files.segments, ((self.entry.segments,), SEGMENT))
        assert isinstance(found, FarRows)
        return found

    @cached_property
    def _lengths(self) -> Ids:
        column: Ids = self.segments["length"]
        return column

    def lengths_of(self, samples: Ids) -> list[Ids]:
        """How many ids each segment has, of each of these samples."""
        if self._is_far:
            return [self.segments_of(sample)["length"] for sample in samples.tolist()]
        lengths, bounds = self._lengths, self._bounds(samples[:, None] + _AND_THE_NEXT)
        if (bounds[:, 0] == bounds[:, 1]).any():
            raise unusable(self.store, self.entry.files.segments.name, "a sample has no segments in it")
        return [lengths[begin:end] for begin, end in bounds.tolist()]

    def documents(self) -> Iterator[DocumentTable]:
        """Its documents, `DOCUMENT_ROWS` at a time."""
        import pyarrow as pa

        name = self.entry.files.documents.name
        try:
            with parquet(self.store, name) as file:
                for batch in file.iter_batches(DOCUMENT_ROWS, use_threads=False):
                    names = [each for each in batch.schema.names if each != "id"]
                    numbers = {each: batch[each].to_numpy(zero_copy_only=False) for each in names}
                    length = numbers["length"].astype(np.int64)
                    cut_off = numbers.get("cut_off", np.zeros(len(length))).astype(np.int64)  # millstream/1 has none
                    fields = (numbers["ordinal"], batch["id"].to_pylist(), numbers["source"], numbers["offset"])
                    yield DocumentTable(*fields, length, numbers["split"].astype(bool), cut_off)
        except (KeyError, OSError, ValueError, pa.ArrowException) as error:
            raise damaged(self.store, name, error) from error

    def table(self) -> Any:
        """The table of its documents."""
        import pyarrow as pa

        name = self.entry.files.documents.name
        try:
            with parquet(self.store, name) as file:
                return file.read(use_threads=False)
        except (OSError, ValueError, pa.ArrowException) as error:
            raise damaged(self.store, name, error) from error

    def documents_with(self, column: str, value: str | int) -> list[dict[str, Any]]:
        """The rows of its documents that have this value in a column.

        Row group by row group, that column first. Filters of `pq.read_table` would be less to write, but go through
        Arrow's datasets, which have threads of their own whatever they are told: see `parquet`.
        """
        import pyarrow as pa
        import pyarrow.compute as pc

        name = self.entry.files.documents.name
        wanted = pa.scalar(value, pa.string() if isinstance(value, str) else pa.uint64())
        found: list[dict[str, Any]] = []
        try:
            with parquet(self.store, name) as file:
                place = file.schema_arrow.get_field_index(column)
                for group in range(file.num_row_groups):
                    known = file.metadata.row_group(group).column(place).statistics
                    if known is not None and known.has_min_max and not known.min <= value <= known.max:
                        continue
                    mask = pc.equal(file.read_row_group(group, [column], use_threads=False)[column], wanted)
                    if pc.any(mask).as_py():
                        found += file.read_row_group(group, use_threads=False).filter(mask).to_pylist()
        except (KeyError, OSError, ValueError, pa.ArrowException) as error:
            raise damaged(self.store, name, error) from error
        return found

    # Samples, one by one

    def ids(self, sample: int) -> Ids:
        """A view of the file where it is an array."""
        row: Ids
        if self._is_parquet:
            ids, _, local = self._rows(sample)
            row = ids[local]
        else:
            row = self._ids[sample]
        return row

    def ids_of(self, samples: Ids) -> Ids:
        """Those of several samples, side by side."""
        stored = None if self._is_parquet else self._ids
        if isinstance(stored, np.ndarray):
            return stored[samples]
        return np.stack([self.ids(sample) for sample in samples.tolist()])

    def loss(self, sample: int) -> Ids | None:
        """bool: which ids are learned; None where the run has no loss mask."""
        row: Ids
        if self._is_parquet and self.settings.masked:
            _, labels, local = self._rows(sample)
            assert labels is not None
            row = labels[local] != IGNORED
        elif self._loss is not None:
            row = self._loss[sample]
        else:
            return None
        return row

    @cached_property
    def _ids(self) -> "Ids | FarRows":
        return (
            rows(self.store, self.entry.files.samples, self._form(self.settings.dtype)) if self._is_far else self._all
        )

    @cached_property
    def _all(self) -> "Ids | FarRows":
        """The ids for who looks at all of them: far away, too, what the file says of itself is compared."""
        found = rows(self.store, self.entry.files.samples)
        if len(found) != len(self):  # an IndexError would end a loop over the samples, as if all had been seen
            raise unusable(self.store, self.name, f"it has {len(found):,} samples instead of {len(self):,}")
        return found

    @cached_property
    def _loss(self) -> "Ids | FarRows | None":
        loss = self.entry.files.loss
        return rows(self.store, loss, self._form("?")) if loss and self._is_far else self._all_loss

    @cached_property
    def _all_loss(self) -> "Ids | FarRows | None":
        loss = self.entry.files.loss
        return rows(self.store, loss) if loss else None

    def _form(self, dtype: str) -> Form:
        return (len(self), self.settings.seq_len), np.dtype(dtype)

    @cached_property
    def _parquet(self) -> Any:
        return parquet(self.store, self.name)

    def _rows(self, sample: int) -> tuple[Ids, Ids | None, int]:
        """Ids and labels of the samples in this one's row group, and which of them it is."""
        file = self._parquet
        size = file.metadata.row_group(0).num_rows
        group, local = divmod(sample, size)
        if self._group[0] != group:
            table = file.read_row_group(group, columns=self._columns, use_threads=False)
            flat = [column.combine_chunks().flatten().to_numpy().reshape(len(table), -1) for column in table.columns]
            self._group = group, flat[0].astype(np.uint32), flat[1] if self.settings.masked else None
        return *self._group[1:], local

    # Samples, many at once

    def blocks(self, low: int, high: int, rows: int, dtype: "np.dtype[Any]") -> Iterator[tuple[Ids, Ids | None]]:
        """The samples from `low` to before `high`, about `rows` at a time: (rows, N), and which ids are to be learned,
        bool (rows, N), or None without a mask. Fewer of them if the file has fewer."""
        if self._is_parquet:
            yield from self._parquet_blocks(low, high, rows, dtype)
            return
        stored, loss = self._all, self._all_loss if self.settings.masked else None
        if stored.dtype != dtype:
            raise unusable(self.store, self.name, f"its ids are {stored.dtype}, not {dtype}")
        for start in range(low, min(high, len(stored)), rows):
            part = slice(start, min(start + rows, high))
            yield stored[part], None if loss is None else loss[part]

    def _parquet_blocks(
        self, low: int, high: int, rows: int, dtype: "np.dtype[Any]"
    ) -> Iterator[tuple[Ids, Ids | None]]:
        import pyarrow as pa

        start, columns = 0, self._columns
        try:
            with parquet(self.store, self.name) as file:
                for batch in file.iter_batches(rows, columns=columns, use_threads=False):
                    part = slice(max(low - start, 0), min(high - start, batch.num_rows))
                    if part.start < part.stop:
                        flat = [batch[name].flatten().to_numpy().reshape(batch.num_rows, -1)[part] for name in columns]
                        ids = flat[0].astype(dtype)
                        if (ids != flat[0]).any():
                            wrong = int(flat[0][ids != flat[0]][0])
                            raise unusable(self.store, self.name, f"id {wrong} does not fit {dtype}")
                        yield ids, flat[1] != IGNORED if self.settings.masked else None
                    start += batch.num_rows
        except (KeyError, OSError, ValueError, pa.ArrowException) as error:
            raise damaged(self.store, self.name, error) from error


def remainder(store: Store, kept: RemainderEntry) -> tuple[Ids, Ids | None]:
    """The ids of a kept remainder, and which of them are to be learned; None without a mask."""
    assert kept.name is not None
    return array(store, kept.name), array(store, kept.loss.name) if kept.loss else None


def parquet(store: Store, name: str) -> Any:
    """A Parquet file, mapped, or far away read by ranges. Raises RunError.

    It is read with ``use_threads=False``, as is all Parquet: Python owns the bytes, and a thread of Arrow that lets go
    of the last of them while the interpreter ends aborts the process.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if is_far(store.url):
            # pre_buffer would read in Arrow's own threads.
            return pq.ParquetFile(store.open(name), pre_buffer=False)
        file = pa.BufferReader(pa.py_buffer(store.map(name)))
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise damaged(store, name, error) from error


def unusable(store: Store, name: str, why: str) -> RunError:
    return RunError(f"{os.path.join(store.url, name)} cannot be used: {why}; 'millstream verify' says what is wrong")


def damaged(store: Store, name: str, error: Exception) -> RunError:
    """What is said of a file that cannot be read."""
    path = os.path.join(store.url, name)
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        told = f"this process has as many files open as it may, {allowed:,}: samples that are kept keep theirs open"
        return RunError(f"{path} cannot be opened: {told}. Keep fewer, or allow more with ulimit -n")
    return RunError(f"{path} cannot be read ({said(error)}); 'millstream verify' says what is wrong")
