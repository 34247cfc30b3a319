"""Training items as the Python API hands them out: their ids, whose they are, and the views that trainers ask for."""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

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
    def _alone(self) -> "Batch":
        return Batch(columns_of([self]))

    @property
    def segment_ids(self) -> Ids:
        """int32 (N,): 1 for the first document's ids, 2 for the next, 0 for padding."""
        row: Ids = self._alone.segment_ids[0]
        return row

    @property
    def position_ids(self) -> Ids:
        """int32 (N,): from 0 in each segment, and 0 for padding."""
        row: Ids = self._alone.position_ids[0]
        return row

    @property
    def cu_seqlens(self) -> Ids:
        """int32: 0, the end of each segment, ... N; padding is a segment of its own here."""
        return self._alone.cu_seqlens

    @property
    def loss_mask(self) -> Ids:
        """bool (N,): which ids a model is asked to predict.

        Not padding, nor the first id of a segment: nothing of its document comes before it here, and another document's
        last id must not be asked for it. And only what `loss` marks, where there is one.
        """
        row: Ids = self._alone.loss_mask[0]
        return row

    @property
    def labels(self) -> Ids:
        """int64 (N,): `token_ids` where `loss_mask`, else -100; not shifted: Hugging Face trainers shift themselves."""
        row: Ids = self._alone.labels[0]
        return row


class Arrays:
    """Where the arrays of batches are put: in memory that nobody looks at any more, as new memory costs more than what
    is written into it.

    An array is taken again once nothing refers to it or to a view of it. With `reuse` it is the same each time, so that
    a batch is valid until the next.
    """

    def __init__(self, reuse: bool = False) -> None:
        self._reuse = reuse
        self._kept: dict[str, list[Ids]] = {}

    def __reduce__(self) -> tuple[type["Arrays"], tuple[bool]]:
        return Arrays, (self._reuse,)

    def take(self, name: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Ids:
        """An array to write into; what is in it is of no meaning."""
        kept = self._kept.setdefault(name, [])
        at = 0 if self._reuse and kept else _free(kept)
        if at is not None and kept[at].shape == shape:
            return kept[at]
        if at is not None:
            del kept[at]
        kept.append(np.empty(shape, dtype))
        del kept[:-_MOST_KEPT]
        return kept[-1]


def _free(arrays: list[Ids]) -> int | None:
    """Which of them nothing else refers to; None: there is none."""
    return next((at for at in range(len(arrays)) if sys.getrefcount(arrays[at]) == _UNSHARED), None)


_MOST_KEPT = 4
_alone = [np.empty(0)]
_UNSHARED = sys.getrefcount(_alone[0])
"""What that function says of an array that only a list refers to; versions of Python differ."""


class Columns(NamedTuple):
    """B samples of N ids each, side by side.

    `token_ids` i64 (B, N); `length` i64 has the ids of each segment, in order, and `segments` i64 (B,) how many of them
    a sample has; `left` i64 (B,): padding before the first. `loss` bool (B, N): what is to be learned; None: all of it.
    """

    token_ids: Ids
    length: Ids
    segments: Ids
    left: Ids
    loss: Ids | None


@dataclass(frozen=True)
class _Runs:
    """Runs that cover every id, in order: `length` i64, and `segment` bool, whether it is one or padding (None: all of
    them are); `count` i64 has how many segments each sample has."""

    length: Ids
    segment: Ids | None
    count: Ids

    @property
    def number(self) -> Ids:
        """i32: which segment of its sample each is, from 1, or 0 for padding."""
        ends = np.cumsum(self.count)
        numbers = np.arange(1, self.count.sum() + 1) - np.repeat(ends - self.count, self.count)
        found = np.zeros(len(self.length), np.int32)
        found[slice(None) if self.segment is None else self.segment] = numbers
        return found

    @cached_property
    def begin(self) -> Ids:
        begins: Ids = np.cumsum(self.length) - self.length
        return begins

    @cached_property
    def padding(self) -> list[tuple[int, int]]:
        """From where to before where there is padding; few stretches, where a mask would look at every id."""
        if self.segment is None:
            return []
        none = np.flatnonzero(~self.segment)
        begin = self.begin[none]
        return list(zip(begin.tolist(), (begin + self.length[none]).tolist(), strict=True))


class Batch:
    """B samples of N ids as arrays that models and attention kernels take; `collate` makes one.

    `token_ids` and `labels` int64, `segment_ids` and `position_ids` int32, `loss_mask` bool, all of them (B, N) and as
    `Sample` has them. `cu_seqlens` int32 bounds all segments of the batch laid flat, from 0 to B x N: padding is one of
    its own, and none goes on from one sample to the next. The longest of them has `max_seqlen` ids.

    Each is made when it is asked for, and kept.
    """

    def __init__(self, columns: Columns, arrays: Arrays | None = None) -> None:
        self.token_ids = columns.token_ids
        self._columns, self._arrays = columns, arrays or Arrays()

    def __len__(self) -> int:
        return len(self.token_ids)

    def __repr__(self) -> str:
        return "<Batch of {} samples of {} ids>".format(*self.token_ids.shape)

    def _array(self, name: str, dtype: npt.DTypeLike) -> Ids:
        return self._arrays.take(name, self.token_ids.shape, dtype)

    @cached_property
    def _runs(self) -> _Runs:
        return _runs_of(self._columns)

    @cached_property
    def segment_ids(self) -> Ids:
        return np.repeat(self._runs.number, self._runs.length).reshape(self.token_ids.shape)

    @cached_property
    def position_ids(self) -> Ids:
        found = self._array("position_ids", np.int32)
        n = found.shape[1]
        begin = (self._runs.begin % n).astype(np.int32)  # no run goes on in the next sample
        np.subtract(_numbers(n), np.repeat(begin, self._runs.length).reshape(found.shape), out=found)
        self._pad(found, 0)
        return found

    @cached_property
    def cu_seqlens(self) -> Ids:
        found = np.empty(len(self._runs.length) + 1, np.int32)
        found[:-1], found[-1] = self._runs.begin, self.token_ids.size
        return found

    @property
    def max_seqlen(self) -> int:
        return int(self._runs.length.max(initial=0))

    @cached_property
    def loss_mask(self) -> Ids:
        found = self._array("loss_mask", np.bool_)
        found.fill(True)
        return self._with_what_is_not_asked(found, False)

    @cached_property
    def labels(self) -> Ids:
        found = self._array("labels", np.int64)
        np.copyto(found, self.token_ids)
        return self._with_what_is_not_asked(found, IGNORED)

    def _with_what_is_not_asked(self, found: Ids, value: int) -> Ids:
        """Set to `value`: the first id of each run, all padding, and what is not to be learned."""
        flat = found.reshape(-1)
        flat[self._runs.begin] = value
        self._pad(found, value)
        if self._columns.loss is not None:
            np.copyto(found, value, where=~self._columns.loss)
        return found

    def _pad(self, found: Ids, value: int) -> None:
        flat = found.reshape(-1)
        for begin, end in self._runs.padding:
            flat[begin:end] = value


@lru_cache(maxsize=2)
def _numbers(count: int) -> Ids:
    """The numbers from 0, i32: they are the same for every batch."""
    return np.arange(count, dtype=np.int32)


def _runs_of(columns: Columns) -> _Runs:
    length, count, left = columns.length, columns.segments, columns.left
    samples, n = columns.token_ids.shape
    if length.sum() == samples * n:  # no sample has more than n
        return _Runs(length, None, count)
    ends = np.cumsum(count)
    sums = np.diff(np.append(0, np.cumsum(length))[np.append(0, ends)])
    # Between the segments of two samples stand the padding on the right of one and on the left of the next.
    places = 2 * np.arange(samples) + ends
    runs = np.zeros(len(length) + 2 * samples, np.int64)
    segment = np.zeros(len(runs), np.bool_)
    runs[places - count], runs[places + 1] = left, n - left - sums
    inside = np.repeat(2 * np.arange(samples) + 1, count) + np.arange(len(length))
    runs[inside], segment[inside] = length, True
    filled = runs > 0
    return _Runs(runs[filled], segment[filled], count)


def columns_of(samples: Sequence[Sample], arrays: Arrays | None = None) -> Columns:
    """Samples of one length side by side."""
    shape = len(samples), len(samples[0])
    token_ids = (arrays or Arrays()).take("token_ids", shape, np.int64)
    for row, sample in zip(token_ids, samples, strict=True):
        row[:] = sample.token_ids
    lengths = [_lengths(sample.segments) for sample in samples]
    left = np.array([sample.pad_left for sample in samples], np.int64)
    losses = {row: sample.loss for row, sample in enumerate(samples) if sample.loss is not None}
    return side_by_side(token_ids, lengths, left, losses)


def side_by_side(token_ids: Ids, lengths: Sequence[Ids], left: Ids, losses: Mapping[int, Ids]) -> Columns:
    """Samples of these ids (B, N) and, for each, the lengths of its segments and padding on the left (i64); the loss
    masks of those that have one."""
    loss = None
    if losses:
        loss = np.ones(token_ids.shape, np.bool_)
        for row, one in losses.items():
            loss[row] = one
    length = np.concatenate(lengths, dtype=np.int64)
    segments = np.fromiter(map(len, lengths), np.int64, len(lengths))
    return Columns(token_ids, length, segments, left, loss)


def _lengths(segments: Sequence[Segment]) -> Ids:
    if isinstance(segments, Segments):
        length: Ids = segments.columns["length"]
        return length
    return np.fromiter((segment.length for segment in segments), np.int64, len(segments))


def collate(samples: Iterable[Sample], arrays: Arrays | None = None) -> Batch:
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
    for number, sample in enumerate(samples):
        if len(sample) != len(samples[0]):
            kept = "" if all(one.complete for one in samples) else "; a kept remainder is shorter: leave it out"
            raise RequestError(
                f"samples in a batch have the same length, but number 0 has {len(samples[0]):,} ids and number "
                f"{number} has {len(sample):,}{kept}"
            )
    return Batch(columns_of(samples, arrays), arrays)
