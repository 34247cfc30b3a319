"""The samples of one subset, as an export sees them: shard by shard, in blocks of rows, with whose ids they are."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from millstream.errors import RequestError, RunError
from millstream.records import Ids
from millstream.samples import IGNORED

BLOCK_IDS = 1 << 20
"""Ids that are looked at together."""

SHARD_IDS = 1 << 28
"""A shard of more ids is handed over in several, as some formats count bytes with 32 bits."""

NO_DOCUMENT = -1


@dataclass(frozen=True)
class Runs:
    """Runs of ids of one document each, in order; they cover every id of their samples, padding too.

    `length` i32 and `document` i64 (the ordinal, or `NO_DOCUMENT` for padding), one a run; `count` i64: runs in each
    sample.
    """

    length: Ids
    document: Ids
    count: Ids

    @property
    def bounds(self) -> Ids:
        """Where each sample's runs begin, and where the last one's end: i64, one more than there are samples."""
        return np.concatenate([[0], np.cumsum(self.count)])


def runs_of(segments: Ids, samples: int, seq_len: int, first: int = 0, pad_left: bool = False) -> Runs:
    """The runs of `samples` samples of `seq_len` ids, numbered from `first` in `segments`.

    >>> from millstream.records import SEGMENT
    >>> runs = runs_of(np.array([(7, 0, 2, 5), (8, 0, 1, 5), (8, 1, 4, 6)], SEGMENT), 2, 4, first=5)
    >>> runs.length.tolist(), runs.document.tolist(), runs.count.tolist()
    ([2, 1, 1, 4], [7, 8, -1, 8], [3, 1])
    """
    sample = segments["sample"].astype(np.int64) - first
    length, document = segments["length"].astype(np.int32), segments["document"].astype(np.int64)
    count = np.bincount(sample, minlength=samples).astype(np.int64)
    padding = seq_len - np.bincount(sample, length, samples).astype(np.int64)
    padded = np.flatnonzero(padding)
    ends = np.cumsum(count)
    at = (ends - count if pad_left else ends)[padded]
    count[padded] += 1
    return Runs(np.insert(length, at, padding[padded]), np.insert(document, at, NO_DOCUMENT), count)


@dataclass(frozen=True)
class Shard:
    """Samples `low` to `high` of one output shard, `number` counting from 0 over the subset.

    The subset's last one has the kept remainder (fewer than N ids) as `rest`, and no samples if there are none at all.
    """

    samples: "Samples"
    number: int
    entry: dict[str, Any]
    low: int
    high: int
    rest: Ids

    def __len__(self) -> int:
        return self.high - self.low

    @property
    def ids(self) -> int:
        """Ids in it, the remainder included."""
        return len(self) * self.samples.seq_len + len(self.rest)

    def blocks(self) -> Iterator[tuple[int, Ids, Ids | None]]:
        """Its samples in order: the number of the first, counting from 0 here; (rows, N), uint16 or uint32; and whether
        each is to be learned, bool (rows, N), or None for all of them.

        Raises RunError if the file has fewer of them.
        """
        path, first, samples = self._path("samples"), 0, self.samples
        for ids, learned in self._rows():
            if ids.shape[1:] != (samples.seq_len,):
                raise _damaged(path, f"its samples have {ids.shape[1:]} ids instead of {samples.seq_len}")
            yield first, ids, learned
            first += len(ids)
        if first != len(self):
            raise _damaged(path, f"it has {first + self.low} samples instead of {self.entry['samples']}")

    def _rows(self) -> Iterator[tuple[Ids, Ids | None]]:
        samples, path = self.samples, self._path("samples")
        if path.endswith(".parquet"):
            yield from _parquet_rows(path, self.low, self.high, samples)
            return
        stored, loss = _load(path), _load(self._path("loss")) if samples.masked else None
        if stored.dtype != samples.dtype:
            raise _damaged(path, f"its ids are {stored.dtype}, not {samples.dtype}")
        for start in range(self.low, min(self.high, len(stored)), samples.rows):
            part = slice(start, min(start + samples.rows, self.high))
            yield np.asarray(stored[part], samples.dtype), None if loss is None else np.asarray(loss[part])

    def flat_learned(self) -> Iterator[Ids]:
        """Whether the ids that `flat` yields are to be learned; nothing without a mask."""
        for _, _, learned in self.blocks():
            if learned is not None:
                yield learned.reshape(-1)
        if self.samples.masked and len(self.rest):
            yield self.samples.rest_learned

    def flat(self) -> Iterator[Ids]:
        """All its ids one after the other, the remainder last."""
        for _, block, _ in self.blocks():
            yield block.reshape(-1)
        if len(self.rest):
            yield self.rest

    @property
    def spans(self) -> int:
        """How many segments its samples have."""
        return int(self._bounds[-1] - self._bounds[0])

    def segments(self, first: int, rows: int) -> Ids:
        """The segments of the samples `first` to `first + rows`, with samples numbered from this shard's first."""
        part = self._segments[self._bounds[first] : self._bounds[first + rows]].copy()
        part["sample"] -= self.low
        return part

    def runs(self, first: int, rows: int) -> Runs:
        """Whose ids the samples `first` to `first + rows` are."""
        segments = self.segments(first, rows)
        return runs_of(segments, rows, self.samples.seq_len, first, self.samples.pad_left)

    def steps(self) -> Iterator[tuple[int, int]]:
        """Samples to look at together: (number of the first, how many)."""
        for first in range(0, len(self), self.samples.rows):
            yield first, min(self.samples.rows, len(self) - first)

    def flat_runs(self) -> Iterator[Runs]:
        """Whose ids `flat` yields."""
        for step in self.steps():
            yield self.runs(*step)
        if len(self.rest):
            yield self.samples.rest_runs

    @cached_property
    def _segments(self) -> Ids:
        return _load(self._path("segments"))

    @cached_property
    def _bounds(self) -> Ids:
        return np.searchsorted(self._segments["sample"], np.arange(self.low, self.high + 1))

    def _path(self, kind: str) -> str:
        return os.path.join(self.samples.folder, self.entry["files"][kind]["name"])


class Samples:
    """The samples of `subset` in the run folder `folder`, whose `settings` and `entry` its manifest has."""

    def __init__(self, folder: str, subset: str, settings: dict[str, Any], entry: dict[str, Any]) -> None:
        self.folder, self.subset, self.settings = folder, subset, settings
        self.padded = can_pad(settings)
        self.masked = has_mask(settings)
        self.seq_len = int(settings["seq_len"])
        self.pad_left = settings["pad_side"] == "left"
        self.vocab_size = int(settings["tokenizer"]["vocab_size"]) if settings["tokenizer"] else None
        self.dtype = np.dtype("<u2" if self.vocab_size is not None and self.vocab_size <= 1 << 16 else "<u4")
        self.rows = max(1, BLOCK_IDS // self.seq_len)  # samples that are looked at together
        self._entry = entry

    def __len__(self) -> int:
        return sum(shard["samples"] for shard in self._entry["shards"])

    @property
    def padding(self) -> int:
        """Ids in samples that are padding."""
        return sum(shard["padding"] for shard in self._entry["shards"])

    @property
    def kept(self) -> int:
        """Ids in the remainder, where it was kept."""
        remainder = self._entry["remainder"]
        return int(remainder["ids"]) if "name" in remainder else 0

    @property
    def ids(self) -> int:
        """Ids there are to write: those of all samples, padding too, and of the kept remainder."""
        return len(self) * self.seq_len + self.kept

    @property
    def shards(self) -> Iterator[Shard]:
        """All of them in order; none without samples, unless there is a remainder and nothing else."""
        limit = max(1, SHARD_IDS // self.seq_len)
        entries = self._entry["shards"]
        pieces = [
            (entry, low, min(low + limit, entry["samples"]))
            for entry in entries
            for low in range(0, entry["samples"], limit)
        ]
        if self.kept and not pieces:
            pieces = [(entries[-1], 0, 0)]
        nothing = np.empty(0, self.dtype)
        for number, piece in enumerate(pieces):
            yield Shard(self, number, *piece, self._rest() if number == len(pieces) - 1 else nothing)

    @property
    def rest_runs(self) -> Runs:
        """Whose ids the remainder is; its segments stand in the last output shard, after those of the samples."""
        entry = self._entry["shards"][-1]
        segments = _load(os.path.join(self.folder, entry["files"]["segments"]["name"]))
        part = segments[np.searchsorted(segments["sample"], entry["samples"]) :]
        return runs_of(part, 1, self.kept, entry["samples"])

    @property
    def rest_learned(self) -> Ids:
        """Which ids of the remainder are to be learned."""
        return np.asarray(_load(os.path.join(self.folder, self._entry["remainder"]["loss"]["name"])))

    def _rest(self) -> Ids:
        if not self.kept:
            return np.empty(0, self.dtype)
        path = os.path.join(self.folder, self._entry["remainder"]["name"])
        rest = _load(path)
        if len(rest) != self.kept:
            raise _damaged(path, f"it has {len(rest)} ids instead of {self.kept}")
        return np.asarray(rest, self.dtype)


def samples_of(folder: str, manifest: dict[str, Any]) -> list[Samples]:
    """The samples of every subset of a run, as exports see them."""
    settings, subsets = manifest["settings"], manifest["subsets"]
    return [Samples(folder, name, settings, entry) for name, entry in subsets.items()]


def can_pad(settings: dict[str, Any]) -> bool:
    """Whether samples of a run with these settings can have padding."""
    return bool(settings["strategy"] != "concat" or settings["remainder"] == "pad")


def has_mask(settings: dict[str, Any]) -> bool:
    """Whether a run with these settings stores which ids are to be learned."""
    chat = settings.get("chat")
    return chat is not None and chat["loss"] != "all"


def narrow(ids: Ids, dtype: str) -> Ids:
    """`ids` as a type that has the same values; a view if it is theirs already. Raises RequestError for what is lost.

    >>> narrow(np.array([1, 2], np.uint32), "<i4").dtype.name
    'int32'
    """
    wanted = np.dtype(dtype)
    limit = np.iinfo(wanted).max
    if limit < np.iinfo(ids.dtype).max and ids.size and int(ids.max()) > limit:
        raise RequestError(
            f"id {int(ids.max()):,} is larger than this format's {limit:,}; npy, datatrove and llm.c take 32 bits"
        )
    return ids.astype(wanted, copy=False)


def _parquet_rows(path: str, low: int, high: int, samples: Samples) -> Iterator[tuple[Ids, Ids | None]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    start, columns = 0, ["input_ids", *(["labels"] if samples.masked else [])]
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(samples.rows, columns=columns):
                part = slice(max(low - start, 0), min(high - start, batch.num_rows))
                if part.start < part.stop:
                    flat = [batch[name].flatten().to_numpy().reshape(batch.num_rows, -1)[part] for name in columns]
                    ids = flat[0].astype(samples.dtype)
                    if (ids != flat[0]).any():
                        raise _damaged(path, f"id {int(flat[0][ids != flat[0]][0])} does not fit {samples.dtype}")
                    yield ids, flat[1] != IGNORED if samples.masked else None
                start += batch.num_rows
    except (OSError, pa.ArrowInvalid) as error:
        raise _damaged(path, str(error)) from error


def _load(path: str) -> Ids:
    try:
        loaded: Ids = np.load(path, mmap_mode="r")
    except (EOFError, OSError, ValueError) as error:
        raise _damaged(path, str(error)) from error
    return loaded


def _damaged(path: str, why: str) -> RunError:
    return RunError(f"{path} cannot be used: {why}; 'millstream verify' says what is wrong")
