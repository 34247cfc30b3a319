"""Documents in, samples out: shuffled if asked for, packed by one of the strategies, and going on from a state."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from millstream.options import Kind, is_count, one_of, or_none
from millstream.records import TokenBatch
from millstream.stream.bestfit import WINDOW, BestFit
from millstream.stream.overlong import OVERLONG
from millstream.stream.pack import Concat, Packed, Packer, Remainder, Split, State, Where, nowhere
from millstream.stream.shuffle import Cuttable, Shuffle

STRATEGIES = ("concat", "split", "best-fit")
KINDS = {
    "seq_len": Kind(is_count, "a sample needs at least one id"),
    "strategy": one_of(STRATEGIES),
    "remainder": one_of(("keep", "drop", "pad")),
    "overlong": one_of(OVERLONG),
    "pad_side": one_of(("right", "left")),
    **dict.fromkeys(("window", "max_segments", "shuffle_window"), or_none(Kind(is_count, "give at least 1"))),
    "shuffle": or_none(Kind(lambda seed: is_count(seed, 0) and seed < 1 << 64, "give a seed from 0 to 2^64 - 1")),
}
"""What each setting of packing may be."""


class Usable(Cuttable, Protocol):
    """Documents of which some ids may have been used before: with ids, or without."""

    def without(self, used: int) -> Any: ...


class Completed(Protocol):
    """Samples that became complete, from `first` to before `stop`: with ids, or without."""

    @property
    def first(self) -> int: ...

    @property
    def stop(self) -> int: ...

    def between(self, low: int, high: int) -> Any: ...


B = TypeVar("B", bound=Usable)
P = TypeVar("P", bound=Completed)
Taken = TypeVar("Taken", bound=Usable, contravariant=True)
Given = TypeVar("Given", bound=Completed, covariant=True)


@dataclass(frozen=True)
class Strategy:
    """What becomes of documents; windows are in ids, and `shuffle` is a seed (None: they stay in order)."""

    name: str
    seq_len: int
    pad_id: int = 0
    pad_side: str = "right"
    window: int = WINDOW
    max_segments: int | None = None
    shuffle: int | None = None
    shuffle_window: int = WINDOW

    def packer(self, dtype: "np.dtype[Any]", samples: int = 0) -> Packer:
        """A packer that has handed out so many samples before."""
        if self.name == "concat":
            return Concat(self.seq_len, dtype, samples)
        padding = (self.pad_id, self.pad_side)
        if self.name == "split":
            return Split(self.seq_len, dtype, *padding, samples)
        seed = self.shuffle or 0
        return BestFit(self.seq_len, dtype, *padding, self.window, self.max_segments, seed, samples)


class Stage(Protocol[Taken, Given]):
    """A packer, of which `feed` and `flush` are needed here."""

    def feed(self, batch: Taken, where: Where = nowhere) -> Iterator[Given]: ...

    def flush(self) -> Iterator[Given]: ...


class Reordering(Protocol[B]):
    """A shuffle."""

    def feed(self, batch: B, where: Where = nowhere) -> Iterator[tuple[B, Where]]: ...

    def flush(self) -> Iterator[tuple[B, Where]]: ...


class InLine(Generic[B, P]):
    """A shuffle, if there is one, and a packer in line, going on from a state: of documents with ids, or without."""

    def __init__(self, shuffle: Reordering[B] | None, stage: Stage[B, P], state: State | None) -> None:
        state = state or {}
        self._shuffle, self._stage = shuffle, stage
        self._first = state.get("samples", 0) + state.get("drop", 0)  # earlier samples were handed out before
        self._rows, self._used = state.get("rows", 0), state.get("used", 0)  # what the packer had before

    def feed(self, batch: B, where: Where = nowhere) -> Iterator[P]:
        """What becomes complete with a batch; to be taken before the next one is fed."""
        for rows, place in self._shuffle.feed(batch, where) if self._shuffle else [(batch, where)]:
            yield from self._pack(rows, place)

    def flush(self) -> Iterator[P]:
        """What was held back, at the end of the input."""
        for rows, place in self._shuffle.flush() if self._shuffle else []:
            yield from self._pack(rows, place)
        yield from self._new(self._stage.flush())

    def _pack(self, batch: B, where: Where) -> Iterator[P]:
        low = min(self._rows, len(batch))
        if low:
            self._rows -= low - (batch.open and low == len(batch))
            batch = batch.rows(low, len(batch))
        if not len(batch):
            return
        if self._used:
            one_goes_on = batch.open and len(batch) == 1
            batch = batch.without(self._used)
            self._used = self._used if one_goes_on else 0
        yield from self._new(self._stage.feed(batch, lambda row: where(low + row)))

    def _new(self, some: Iterator[P]) -> Iterator[P]:
        for packed in some:
            yield packed if packed.first >= self._first else packed.between(self._first, packed.stop + 1)


class Line(InLine[TokenBatch, Packed]):
    """`Shuffle` and a packer in line. `state` is one that a `Packed` gave: feed what its `where` says, and samples go
    on behind it.

    >>> row = np.arange(3)
    >>> batch = TokenBatch(np.arange(7), np.array([3, 0, 4]), row, row * 0, ["a", "b", "c"], row, row)
    >>> line = Line(Strategy("concat", 2), np.dtype(np.uint32))
    >>> [packed] = line.feed(batch, lambda row: {"row": row})
    >>> packed.ids.tolist()
    [[0, 1], [2, 3], [4, 5]]
    >>> packed.state(2)
    {'row': 2, 'used': 1, 'samples': 2, 'drop': 0}
    >>> [packed] = Line(Strategy("concat", 2), np.dtype(np.uint32), packed.state(2)).feed(batch.rows(2, 3))
    >>> packed.first, packed.ids.tolist()
    (2, [[4, 5]])
    """

    def __init__(self, strategy: Strategy, dtype: "np.dtype[Any]", state: State | None = None) -> None:
        self.packer = strategy.packer(dtype, (state or {}).get("samples", 0))
        shuffle = None
        if strategy.shuffle is not None:
            shuffle = Shuffle(strategy.shuffle, strategy.shuffle_window, dtype)
        super().__init__(shuffle, self.packer, state)

    def finish(self) -> Remainder:
        return self.packer.finish()
