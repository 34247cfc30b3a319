"""Documents in, samples out: shuffled if asked for, packed by one of the strategies, and going on from a state."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from millstream.records import TokenBatch
from millstream.stream.bestfit import WINDOW, BestFit
from millstream.stream.pack import Concat, Packed, Packer, Remainder, Split, State, Where, nowhere
from millstream.stream.shuffle import Shuffle

STRATEGIES = ("concat", "split", "best-fit")


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


class Line:
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
        state = state or {}
        samples = state.get("samples", 0)
        self._first = samples + state.get("drop", 0)  # earlier samples were handed out before
        self._rows, self._used = state.get("rows", 0), state.get("used", 0)  # what the packer had before
        self.packer = strategy.packer(dtype, samples)
        self._shuffle = None
        if strategy.shuffle is not None:
            self._shuffle = Shuffle(strategy.shuffle, strategy.shuffle_window, dtype)

    def feed(self, batch: TokenBatch, where: Where = nowhere) -> Iterator[Packed]:
        """What becomes complete with a batch; to be taken before the next one is fed."""
        for rows, place in self._shuffle.feed(batch, where) if self._shuffle else [(batch, where)]:
            yield from self._pack(rows, place)

    def flush(self) -> Iterator[Packed]:
        """What was held back, at the end of the input."""
        for rows, place in self._shuffle.flush() if self._shuffle else []:
            yield from self._pack(rows, place)
        yield from self._new(self.packer.flush())

    def finish(self) -> Remainder:
        return self.packer.finish()

    def _pack(self, batch: TokenBatch, where: Where) -> Iterator[Packed]:
        low = min(self._rows, len(batch))
        if low:
            self._rows -= low - (batch.open and low == len(batch))
            batch = batch.rows(low, len(batch))
        if not len(batch):
            return
        if self._used:
            one_goes_on = batch.open and len(batch) == 1
            batch = _without(batch, self._used)
            self._used = self._used if one_goes_on else 0
        yield from self._new(self.packer.feed(batch, lambda row: where(low + row)))

    def _new(self, some: Iterator[Packed]) -> Iterator[Packed]:
        for packed in some:
            yield packed if packed.first >= self._first else packed.between(self._first, packed.stop + 1)


def _without(batch: TokenBatch, used: int) -> TokenBatch:
    """`batch` without those of its first document's ids that are among the document's first `used`."""
    drop = min(max(used - int(batch.start[0]), 0), int(batch.length[0]))
    length, start = batch.length.copy(), batch.start.copy()
    length[0] -= drop
    start[0] += drop
    return replace(batch, ids=batch.ids[drop:], length=length, start=start)
