"""Training items as the Python API hands them out: their ids, whose they are, and the views that trainers ask for."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, overload

import numpy as np

from millstream.errors import RequestError
from millstream.records import Ids

IGNORED = -100
"""The label of what is not to be predicted, which PyTorch's loss leaves out."""


class Segment(NamedTuple):
    """One document's run inside one sample: `length` ids from the document's id number `start`."""

    document: int
    start: int
    length: int


class Segments(Sequence[Segment]):
    """The segments of one sample, as they are stored: a `Segment` is made when one is asked for.

    `columns` has fields `document`, `start` and `length`. Equal to any sequence of the same segments.

    >>> columns = np.array([(0, 5, 2), (1, 0, 1)], [("document", "u8"), ("start", "u8"), ("length", "u4")])
    >>> Segments(columns)[-1], Segments(columns) == ((0, 5, 2), (1, 0, 1)), Segments(columns).length.tolist()
    (Segment(document=1, start=0, length=1), True, [2, 1])
    """

    __slots__ = ("columns",)

    def __init__(self, columns: Ids) -> None:
        self.columns = columns

    @property
    def length(self) -> Ids:
        """i64: the ids of each."""
        return self.columns["length"].astype(np.int64)

    def __len__(self) -> int:
        return len(self.columns)

    @overload
    def __getitem__(self, index: int) -> Segment: ...
    @overload
    def __getitem__(self, index: slice) -> "Segments": ...
    def __getitem__(self, index: int | slice) -> "Segment | Segments":
        if isinstance(index, slice):
            return Segments(self.columns[index])
        row = self.columns[index]
        return Segment(int(row["document"]), int(row["start"]), int(row["length"]))

    def __iter__(self) -> Iterator[Segment]:
        columns = (self.columns[name].tolist() for name in Segment._fields)
        return map(Segment, *columns)

    def __eq__(self, other: object) -> bool:
        return tuple(self) == tuple(other) if isinstance(other, Sequence) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))


class _Runs(NamedTuple):
    """Runs that cover every id, in order: `number` i32, which segment, from 1, or 0 for padding; `length` i64."""

    number: Ids
    length: Ids

    @property
    def segment_ids(self) -> Ids:
        return np.repeat(self.number, self.length)

    @property
    def position_ids(self) -> Ids:
        begins = np.cumsum(self.length) - self.length
        found: Ids = np.arange(int(self.length.sum()), dtype=np.int32)
        found -= np.repeat(begins.astype(np.int32), self.length)
        padding = self.number == 0
        if padding.any():
            found[np.repeat(padding, self.length)] = 0
        return found

    @property
    def cu_seqlens(self) -> Ids:
        return np.concatenate([[0], np.cumsum(self.length)]).astype(np.int32)

    @property
    def loss_mask(self) -> Ids:
        """All but padding and each segment's first id."""
        found: Ids = np.repeat(self.number > 0, self.length)
        found[np.cumsum(self.length) - self.length] = False
        return found


@dataclass(frozen=True)
class Sample:
    """One training item of `seq_len` token ids (fewer only in a kept remainder: then `complete` is False).

    `segments` lists whose ids these are, in order; padding belongs to no segment, and is left of them or right. Views
    of their lengths follow.

    >>> s = Sample(np.array([7, 8, 9, 0]), (Segment(0, 5, 2), Segment(1, 0, 1)))
    >>> s.segment_ids.tolist(), s.position_ids.tolist(), s.cu_seqlens.tolist()
    ([1, 1, 2, 0], [0, 1, 0, 0], [0, 2, 3, 4])
    >>> s.loss_mask.tolist(), s.labels.tolist()
    ([False, True, False, False], [-100, 8, -100, -100])
    """

    token_ids: Ids
    segments: Sequence[Segment]
    complete: bool = True
    pad_left: int = 0
    loss: Ids | None = None
    """bool (N,): which ids are to be learned, where the run has a loss mask; None: all of them."""

    def __len__(self) -> int:
        return len(self.token_ids)

    @cached_property
    def _runs(self) -> _Runs:
        return _runs_of([self], len(self.token_ids))

    @property
    def segment_ids(self) -> Ids:
        """int32 (N,): 1 for the first document's ids, 2 for the next, 0 for padding."""
        return self._runs.segment_ids

    @property
    def position_ids(self) -> Ids:
        """int32 (N,): from 0 in each segment, and 0 for padding."""
        return self._runs.position_ids

    @property
    def cu_seqlens(self) -> Ids:
        """int32: 0, the end of each segment, ... N; padding is a segment of its own here."""
        return self._runs.cu_seqlens

    @property
    def loss_mask(self) -> Ids:
        """bool (N,): which ids a model is asked to predict.

        Not padding, nor the first id of a segment: nothing of its document comes before it here, and another document's
        last id must not be asked for it. And only what `loss` marks, where there is one.
        """
        mask = self._runs.loss_mask
        return mask if self.loss is None else mask & np.asarray(self.loss)

    @property
    def labels(self) -> Ids:
        """int64 (N,): `token_ids` where `loss_mask`, else -100; not shifted: Hugging Face trainers shift themselves."""
        return np.where(self.loss_mask, self.token_ids.astype(np.int64), IGNORED)


def _runs_of(samples: Sequence[Sample], n: int) -> _Runs:
    """The runs of samples of `n` ids each, one sample after the other."""
    length = np.concatenate([_lengths(sample.segments) for sample in samples])
    count = np.fromiter((len(sample.segments) for sample in samples), np.int64, len(samples))
    ends = np.cumsum(count)
    sums = np.diff(np.concatenate([[0], np.cumsum(length)])[np.concatenate([[0], ends])])
    left = np.fromiter((sample.pad_left for sample in samples), np.int64, len(samples))
    # Between the segments of two samples stand the padding on the right of one and on the left of the next.
    places = 2 * np.arange(len(samples)) + ends
    runs = np.zeros(len(length) + 2 * len(samples), np.int64)
    number = np.zeros(len(runs), np.int32)
    runs[places - count], runs[places + 1] = left, n - left - sums
    inside = np.repeat(2 * np.arange(len(samples)) + 1, count) + np.arange(len(length))
    runs[inside] = length
    number[inside] = np.arange(1, len(length) + 1) - np.repeat(ends - count, count)
    filled = runs > 0
    return _Runs(number[filled], runs[filled])


def _lengths(segments: Sequence[Segment]) -> Ids:
    if isinstance(segments, Segments):
        return segments.length
    return np.fromiter((segment.length for segment in segments), np.int64, len(segments))


@dataclass(frozen=True, eq=False)
class Batch:
    """B samples of N ids as arrays that models and attention kernels take; `collate` makes one.

    `token_ids` and `labels` int64, `segment_ids` and `position_ids` int32, `loss_mask` bool, all of them (B, N) and as
    `Sample` has them. `cu_seqlens` int32 bounds all segments of the batch laid flat, from 0 to B x N: padding is one of
    its own, and none goes on from one sample to the next. The longest of them has `max_seqlen` ids.
    """

    token_ids: Ids
    segment_ids: Ids
    position_ids: Ids
    loss_mask: Ids
    labels: Ids
    cu_seqlens: Ids
    max_seqlen: int

    def __len__(self) -> int:
        return len(self.token_ids)


def collate(samples: Iterable[Sample]) -> Batch:
    """One batch of samples. Raises RequestError if there is none, or if they differ in length.

    >>> a = Sample(np.array([7, 8, 9, 0]), (Segment(0, 5, 2), Segment(1, 0, 1)))
    >>> b = Sample(np.array([4, 5, 6, 7]), (Segment(1, 1, 4),))
    >>> batch = collate([a, b])
    >>> batch.position_ids.tolist(), batch.cu_seqlens.tolist(), batch.max_seqlen
    ([[0, 1, 0, 0], [0, 1, 2, 3]], [0, 2, 3, 4, 8], 4)
    >>> batch.labels.tolist()
    [[-100, 8, -100, -100], [-100, 5, 6, 7]]
    """
    samples = list(samples)
    if not samples:
        raise RequestError("there is nothing to collate: give at least one sample")
    shape = len(samples), len(samples[0])
    for number, sample in enumerate(samples):
        if len(sample) != shape[1]:
            kept = "" if all(one.complete for one in samples) else "; a kept remainder is shorter: leave it out"
            raise RequestError(
                f"samples in a batch have the same length, but number 0 has {shape[1]:,} ids and number {number} has "
                f"{len(sample):,}{kept}"
            )
    token_ids = np.empty(shape, np.int64)
    for row, sample in zip(token_ids, samples, strict=True):
        row[:] = sample.token_ids
    runs = _runs_of(samples, shape[1])
    mask = runs.loss_mask.reshape(shape)
    for row, sample in zip(mask, samples, strict=True):
        if sample.loss is not None:
            row &= sample.loss
    return Batch(
        token_ids,
        runs.segment_ids.reshape(shape),
        runs.position_ids.reshape(shape),
        mask,
        np.where(mask, token_ids, IGNORED),
        runs.cu_seqlens,
        int(runs.length.max(initial=0)),
    )
