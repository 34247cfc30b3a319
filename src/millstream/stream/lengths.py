"""How many samples come out of documents, and where packing can go on before each, told from their lengths alone.

What the packers and the shuffle do to ids, done to numbers: the arithmetic is theirs, and only the copying is missing.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from typing import NamedTuple, Protocol

import numpy as np

from millstream.records import Ids, not_used
from millstream.stream.bestfit import Windows, states_within
from millstream.stream.bins import opened
from millstream.stream.line import InLine, Strategy
from millstream.stream.pack import SamplePlaces, State, Where, nowhere, split_up, states, with_held
from millstream.stream.shuffle import ShuffleWindows, permutation, shuffled, through


@dataclass(slots=True)
class Lengths:
    """What a TokenBatch says without its ids: the columns that decide how its documents are packed."""

    length: Ids
    ordinal: Ids
    start: Ids
    open: bool = False

    @classmethod
    def of(cls, length: Ids) -> "Lengths":
        """Documents 0, 1, ... of these lengths."""
        return cls(length, np.arange(len(length)), np.zeros(len(length), np.int64))

    def __len__(self) -> int:
        return len(self.length)

    def rows(self, low: int, high: int) -> "Lengths":
        part = slice(low, high)
        return Lengths(self.length[part], self.ordinal[part], self.start[part], self.open and high == len(self))

    def after(self, ordinal: int) -> "Lengths":
        """The documents from number `ordinal` on."""
        return self.rows(int(np.searchsorted(self.ordinal, ordinal)), len(self))

    def without(self, used: int) -> "Lengths":
        """All but those of the first row's ids that are among its document's first `used`."""
        length, start = not_used(used, self.length, self.start)
        return replace(self, length=length, start=start)


class Span(NamedTuple):
    """Samples `first` to before `stop` became complete; `state(number)`, for first < number <= stop, as in `Packed`."""

    first: int
    stop: int
    state: Callable[[int], State]

    def between(self, low: int, high: int) -> "Span":
        return Span(min(max(low, self.first), self.stop), max(min(high, self.stop), self.first), self.state)


class Counting(Protocol):
    """A packer without ids: `samples` have come out so far."""

    samples: int

    def feed(self, batch: Lengths, where: Where = nowhere) -> Iterator[Span]: ...

    def flush(self) -> Iterator[Span]: ...


class _Concat:
    def __init__(self, n: int, samples: int) -> None:
        self._n, self.samples = n, samples
        self._filled = 0

    def feed(self, batch: Lengths, where: Where = nowhere) -> Iterator[Span]:
        number, before = self.samples, self._filled
        complete, self._filled = divmod(before + int(batch.length.sum()), self._n)
        self.samples += complete

        @cache
        def told() -> Callable[[int], State]:
            # Most batches have no boundary that matters, so that nobody asks, and nothing is summed up.
            return states(batch, where, SamplePlaces.joined(batch.length, before, self._n), number, self._n)

        yield Span(number, self.samples, lambda sample: told()(sample))

    def flush(self) -> Iterator[Span]:
        return iter(())


class _Split:
    def __init__(self, n: int, samples: int) -> None:
        self._n, self.samples = n, samples
        self._held = 0  # ids of the unfinished piece of a document that goes on

    def feed(self, batch: Lengths, where: Where = nowhere) -> Iterator[Span]:
        length, start = with_held(self._held, batch.length, batch.start)
        flat, number = replace(batch, length=length, start=start), self.samples
        at, self._held = split_up(flat, self._n)
        self.samples += int((-(-flat.length // self._n)).sum())
        yield Span(number, self.samples, states(flat, where, at, number, self._n))

    def flush(self) -> Iterator[Span]:
        return iter(())


class _BestFit:
    """Of a window only the histogram of the ends is kept, and how many full samples are in it."""

    def __init__(self, n: int, window: int, most: int | None, samples: int) -> None:
        self._n, self._most, self.samples = n, most, samples
        self._windows = Windows(n, window)
        self._begin()

    def _begin(self) -> None:
        self._ends, self._full = np.zeros(self._n + 1, np.int64), 0
        self._first: tuple[State, int] | None = None  # the window's state, and samples before it

    def feed(self, batch: Lengths, where: Where = nowhere) -> Iterator[Span]:
        for taken in self._windows.take(batch):
            if self._first is None:
                self._first = (where(taken.low), self.samples)
            self._full += int(taken.full.sum())
            ended = len(taken.rest) - (batch.open and taken.high == len(batch))
            self._ends += np.bincount(taken.rest[:ended], minlength=self._n + 1)
            if taken.beyond:
                yield self._span(taken.beyond, states_within(*self._first))
            if taken.closes:
                yield from self._close(where(taken.high))

    def _close(self, behind: State | None = None) -> Iterator[Span]:
        assert self._first
        self._ends[0] = 0  # a document of full samples alone has no end
        count = self._full + opened(self._ends, self._n, self._most)
        yield self._span(count, states_within(*self._first, self.samples + count, behind))
        self._begin()

    def _span(self, count: int, state: Callable[[int], State]) -> Span:
        self.samples += count
        return Span(self.samples - count, self.samples, state)

    def flush(self) -> Iterator[Span]:
        if self._first:
            yield from self._close()


_COLUMNS = ("length", "ordinal")
"""What a window of the shuffle keeps; documents in it are whole."""


@dataclass
class _Shuffle:
    seed: int
    window: int
    _rows: list[Lengths] = field(default_factory=list)
    _first: State = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._windows = ShuffleWindows(self.window, _whole)

    def feed(self, batch: Lengths, where: Where = nowhere) -> Iterator[tuple[Lengths, Where]]:
        for rows, place, alone in self._windows.place(batch, where):
            if rows is None:
                yield from self._close(place(0))
            elif alone:
                yield rows, through(place)
            else:
                self._first = self._first if self._rows else place(0)
                self._rows.append(rows)

    def _close(self, behind: State | None = None) -> Iterator[tuple[Lengths, Where]]:
        if not self._rows:
            return
        length, ordinal = (np.concatenate([getattr(rows, name) for rows in self._rows]) for name in _COLUMNS)
        order = permutation(len(length), self.seed, int(ordinal[0]), "documents")
        self._rows = []
        whole = Lengths(length[order], ordinal[order], np.zeros(len(order), np.int64))
        yield whole, shuffled(self._first, len(order), behind)

    def flush(self) -> Iterator[tuple[Lengths, Where]]:
        yield from self._close()


def _whole(parts: list[Lengths]) -> Lengths:
    length = np.array([sum(int(part.length.sum()) for part in parts)])
    return replace(parts[0], length=length, open=False)


def _counting(strategy: Strategy, samples: int) -> Counting:
    if strategy.name == "concat":
        return _Concat(strategy.seq_len, samples)
    if strategy.name == "split":
        return _Split(strategy.seq_len, samples)
    return _BestFit(strategy.seq_len, strategy.window, strategy.max_segments, samples)


class LineOfLengths(InLine[Lengths, Span]):
    """What `Line` gives, without ids: the numbers of the samples, and the states between them.

    Fed the same documents in the same batches, states are equal; `samples` have come out so far. Memory: the lengths of
    one window of `shuffle`, and one number for each length below `seq_len` for best-fit.

    >>> line = LineOfLengths(Strategy("concat", 2))
    >>> [span] = line.feed(Lengths.of(np.array([3, 0, 4])), lambda row: {"row": row})
    >>> span.first, span.stop, span.state(2)
    (0, 3, {'row': 2, 'used': 1, 'samples': 2, 'drop': 0})
    """

    def __init__(self, strategy: Strategy, state: State | None = None) -> None:
        self._counting = _counting(strategy, (state or {}).get("samples", 0))
        shuffle = None if strategy.shuffle is None else _Shuffle(strategy.shuffle, strategy.shuffle_window)
        super().__init__(shuffle, self._counting, state)

    @property
    def samples(self) -> int:
        return self._counting.samples
