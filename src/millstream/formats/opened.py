"""The output shards of run folders, opened when they are needed; few at once, over all folders together."""

import contextlib
import errno
import os
import resource
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator
from functools import cached_property
from typing import Any

import numpy as np

from millstream.errors import RunError
from millstream.records import Ids
from millstream.samples import IGNORED

_SCAN = 1 << 20  # segments looked at together
_MOST = 64
_FILES = 3  # of an open shard: samples, segments, loss mask


class Shard:
    """One output shard, opened on first use."""

    def __init__(self, folder: str, entry: dict[str, Any], settings: dict[str, Any]) -> None:
        self._paths = {kind: os.path.join(folder, file["name"]) for kind, file in entry["files"].items()}
        self._samples, self._format = entry["samples"], settings["format"]
        self._seq_len, self._pad_left = settings["seq_len"], settings["pad_side"] == "left"
        chat = settings.get("chat")
        self._labelled = self._format == "parquet" and chat is not None and chat.get("loss") != "all"
        self._group: tuple[int, Ids, Ids | None] = (-1, np.empty(0), None)

    @cached_property
    def segments(self) -> Ids:
        return load(self._paths["segments"])

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
        return load(self._paths["samples"])

    def ids(self, sample: int) -> Ids:
        row: Ids
        if self._format == "parquet":
            ids, _, local = self._rows(sample)
            row = ids[local]
        else:
            row = self._file[sample]
        return row

    def loss(self, sample: int) -> Ids | None:
        """bool: which ids are learned; None where the run has no loss mask."""
        row: Ids
        if self._labelled:
            _, labels, local = self._rows(sample)
            assert labels is not None
            row = labels[local] != IGNORED
        elif self._loss is not None:
            row = self._loss[sample]
        else:
            return None
        return row

    @cached_property
    def _loss(self) -> Ids | None:
        return load(self._paths["loss"]) if "loss" in self._paths else None

    def _rows(self, sample: int) -> tuple[Ids, Ids | None, int]:
        """Ids and labels of the samples in this one's row group, and which of them it is."""
        size = self._file.metadata.row_group(0).num_rows
        group, local = divmod(sample, size)
        if self._group[0] != group:
            names = ["input_ids", "labels"] if self._labelled else ["input_ids"]
            table = self._file.read_row_group(group, columns=names)
            flat = [column.combine_chunks().flatten().to_numpy().reshape(len(table), -1) for column in table.columns]
            self._group = group, flat[0].astype(np.uint32), flat[1] if self._labelled else None
        return *self._group[1:], local

    def places(self, documents: Collection[int], ordered: bool) -> Iterator[tuple[int, int, int, int, int]]:
        """(ordinal, sample, start, length, place of the first id in the sample) of these documents' segments.

        `ordered`: segments stand in the order of their documents, so that they need not all be looked at.
        """
        segments = self.segments
        for row in self._find(documents, ordered).tolist():
            ordinal, start, length, sample = segments[row].tolist()
            first, stop = np.searchsorted(segments["sample"], np.array([sample, sample + 1], np.uint32)).tolist()
            at = int(segments["length"][first:row].sum())
            if self._pad_left and sample < self._samples:
                at += self._seq_len - int(segments["length"][first:stop].sum())
            yield ordinal, sample, start, length, at

    def _find(self, documents: Collection[int], ordered: bool) -> Ids:
        """The rows of `segments` that are of these documents."""
        column, wanted = self.segments["document"], np.sort(np.array(list(documents), np.uint64))
        if ordered:
            bounds = zip(np.searchsorted(column, wanted), np.searchsorted(column, wanted, side="right"), strict=True)
            return np.concatenate([np.arange(*bound) for bound in bounds])
        parts = [
            low + np.flatnonzero(np.isin(column[low : low + _SCAN], wanted)) for low in range(0, len(column), _SCAN)
        ]
        return np.concatenate(parts) if parts else np.zeros(0, np.int64)


class OpenShards:
    """The shards that were used last, of all datasets: a memory-mapped file counts as an open one, and systems limit
    those of a process, to 256 or 1,024 as a rule. Half of them are left to others."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, int], Shard] = OrderedDict()

    def owner_of(self, dataset: object) -> object:
        """A name for a dataset's shards; with the dataset, they go."""
        owner = object()
        weakref.finalize(dataset, self._drop, owner).atexit = False
        return owner

    def get(self, owner: object, number: int, make: Callable[[], Shard]) -> Shard:
        """A shard, opened by `make` unless it still is. Threads may do this at once: each step here is one for them."""
        shard = self._kept.pop((owner, number), None) or make()
        self._kept[owner, number] = shard  # the last now
        most = max(2, min(_MOST, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 // _FILES))
        while len(self._kept) > most:
            with contextlib.suppress(KeyError):
                self._kept.popitem(last=False)
        return shard

    def of(self, owner: object) -> int:
        """How many shards of a dataset are open."""
        return sum(key[0] is owner for key in list(self._kept))

    def _drop(self, owner: object) -> None:
        for key in [key for key in list(self._kept) if key[0] is owner]:
            self._kept.pop(key, None)


OPEN = OpenShards()


def load(path: str) -> Ids:
    """A file of an array, memory-mapped. Raises RunError."""
    try:
        loaded = np.load(path, mmap_mode="r")
    except (EOFError, OSError, ValueError) as error:
        raise damaged(path, error) from error
    plain: Ids = loaded.view(np.ndarray)  # numpy's subclass makes half of the cost of taking a sample
    return plain


def damaged(path: str, error: Exception) -> RunError:
    """What is said of a file that cannot be read."""
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        told = f"this process has as many files open as it may, {allowed:,}: samples that are kept keep theirs open"
        return RunError(f"{path} cannot be opened: {told}. Keep fewer, or allow more with ulimit -n")
    return RunError(f"{path} cannot be read ({error}); 'millstream verify' says what is wrong")
