"""The samples of one subset, as an export sees them: shard by shard, in blocks of rows, with whose ids they are."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from millstream.errors import RequestError
from millstream.folder import reader
from millstream.folder.documents import DocumentTable
from millstream.folder.entries import Identity, Manifest, ShardEntry, SubsetEntry
from millstream.folder.reader import unusable
from millstream.records import Ids
from millstream.store import at

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
class ShardSamples:
    """Samples `low` to `high` of one output shard, `number` counting from 0 over the subset.

    The subset's last one has the kept remainder (fewer than N ids) as `rest`, and no samples if there are none at all.
    """

    samples: "Samples"
    number: int
    entry: ShardEntry
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
        first, samples, shard = 0, self.samples, self._shard
        for ids, learned in shard.blocks(self.low, self.high, samples.rows, samples.dtype):
            if ids.shape[1:] != (samples.seq_len,):
                told = f"its samples have {ids.shape[1:]} ids instead of {samples.seq_len}"
                raise unusable(shard.store, shard.name, told)
            yield first, ids, learned
            first += len(ids)
        if first != len(self):
            told = f"it has {first + self.low} samples instead of {self.entry.samples}"
            raise unusable(shard.store, shard.name, told)

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
        return len(self._shard.segments_of(self.low, self.high))

    def segments(self, first: int, rows: int) -> Ids:
        """The segments of the samples `first` to `first + rows`, with samples numbered from this shard's first."""
        part = self._shard.segments_of(self.low + first, self.low + first + rows).copy()
        part["sample"] -= self.low
        return part

    @property
    def rest_segments(self) -> Ids:
        """Those of the kept remainder, if this is the last output shard."""
        return self._shard.segments_of(self.entry.samples)

    @property
    def all_segments(self) -> Ids:
        """All of the output shard, as they are stored."""
        return self._shard.segments

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
    def _shard(self) -> reader.OutputShard:
        return reader.OutputShard(self.samples.store, self.samples.settings, self.entry)

    def documents(self) -> Iterator[DocumentTable]:
        """The documents of the output shard."""
        return self._shard.documents()


class Samples:
    """The samples of `subset` in the run folder `folder`, whose `settings` and `entry` its manifest has."""

    def __init__(self, folder: str, subset: str, settings: Identity, entry: SubsetEntry) -> None:
        self.store, self.subset, self.settings, self.entry = at(folder), subset, settings, entry
        self.padded, self.masked = settings.padded, settings.masked
        self.seq_len, self.vocab_size = settings.seq_len, settings.vocab_size
        self.pad_left = settings.pad_side == "left"
        self.dtype = np.dtype(settings.dtype)
        self.rows = max(1, BLOCK_IDS // self.seq_len)  # samples that are looked at together

    def __len__(self) -> int:
        return self.entry.samples

    @property
    def padding(self) -> int:
        """Ids in samples that are padding."""
        return sum(shard.padding for shard in self.entry.shards)

    @property
    def kept(self) -> int:
        """Ids in the remainder, where it was kept."""
        return self.entry.remainder.ids if self.entry.remainder.file else 0

    @property
    def ids(self) -> int:
        """Ids there are to write: those of all samples, padding too, and of the kept remainder."""
        return len(self) * self.seq_len + self.kept

    @property
    def shards(self) -> Iterator[ShardSamples]:
        """All of them in order; none without samples, unless there is a remainder and nothing else."""
        held = None
        for shard in self.sealed():
            if held is not None:
                yield held
            held = shard
        if held is not None or self.kept:
            yield self.with_rest(held)

    @property
    def output_shards(self) -> int:
        """How many are sealed."""
        return len(self.entry.shards)

    def sealed(self, first: int = 0, number: int = 0) -> Iterator[ShardSamples]:
        """The samples of the output shards from `first` on, numbered from `number`; none has the remainder yet."""
        limit, nothing = max(1, SHARD_IDS // self.seq_len), np.empty(0, self.dtype)
        for entry in self.entry.shards[first:]:
            alone = self.alone(entry)
            for low in range(0, entry.samples, limit):
                yield ShardSamples(alone, number, entry, low, min(low + limit, entry.samples), nothing)
                number += 1

    def with_rest(self, last: ShardSamples | None) -> ShardSamples:
        """The last of all with the remainder, if there is one; its segments may be in an output shard without samples.

        Without a last one the remainder is all there is.
        """
        entry = self.entry.shards[-1]
        if last is None:
            last = ShardSamples(self, 0, entry, 0, 0, np.empty(0, self.dtype))
        return replace(last, samples=self.alone(last.entry, entry), rest=self._rest())

    def alone(self, *entries: ShardEntry) -> "Samples":
        """The same, with no more than these output shards: what a worker is sent."""
        return Samples(self.store.url, self.subset, self.settings, SubsetEntry(list(entries), self.entry.remainder))

    @property
    def rest_runs(self) -> Runs:
        """Whose ids the remainder is; its segments stand in the last output shard, after those of the samples."""
        shard = reader.OutputShard(self.store, self.settings, self.entry.shards[-1])
        return runs_of(shard.segments_of(len(shard), len(shard) + 1), 1, self.kept, len(shard))

    @property
    def rest_learned(self) -> Ids:
        """Which ids of the remainder are to be learned."""
        _, learned = reader.remainder(self.store, self.entry.remainder)
        assert learned is not None
        return learned

    def _rest(self) -> Ids:
        if not self.kept:
            return np.empty(0, self.dtype)
        rest, _ = reader.remainder(self.store, self.entry.remainder)
        if len(rest) != self.kept:
            name = str(self.entry.remainder.name)
            raise reader.unusable(self.store, name, f"it has {len(rest)} ids instead of {self.kept}")
        return np.asarray(rest, self.dtype)


def samples_of(folder: str, manifest: Manifest) -> list[Samples]:
    """The samples of every subset of a run, as exports see them."""
    return [Samples(folder, name, manifest.settings, entry) for name, entry in manifest.subsets.items()]


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
