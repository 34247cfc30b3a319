"""Documents in another order: shuffled by a seed, within windows of ids."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from millstream.records import Ids, TokenBatch
from millstream.stream.bins import ordered
from millstream.stream.pack import CHUNK, HasLengths, IdRuns, State, Where, nowhere, take_names, weight

_PURPOSES = {"bins": 0, "documents": 1}


def permutation(count: int, seed: int, ordinal: int, purpose: str) -> Ids:
    """The numbers below `count` in an order that depends on the seed, a document's ordinal and the purpose alone.

    It is made from a bit generator's raw output, which is the same on every machine and in every version of numpy.

    >>> permutation(5, 0, 0, "documents").tolist()
    [4, 2, 0, 1, 3]
    """
    key = np.array([seed, ordinal], np.uint64)
    counter = np.array([0, 0, 0, _PURPOSES[purpose]], np.uint64)
    raw = np.random.Philox(key=key, counter=counter).random_raw(count)
    return _order(raw)


def _order(raw: Ids) -> Ids:
    """The stable order of random numbers of 64 bits.

    The lowest, which a place beside them needs, decide next to never.
    """
    high = raw >> np.uint64(len(raw).bit_length())
    order = ordered(high)
    high = high[order]
    if (high[1:] == high[:-1]).any():
        order = np.argsort(raw, kind="stable")
    return order


class Cuttable(HasLengths, Protocol):
    """Rows of which some can be taken: with ids, or without."""

    def rows(self, low: int, high: int) -> Any: ...


B = TypeVar("B", bound=Cuttable)


class Placed(NamedTuple, Generic[B]):
    """What windows do next: take `rows`, of which number k is at `where(k)`; let them through `alone`; or, without
    rows, close, and the next one begins at `where(0)`."""

    rows: B | None
    where: Where
    alone: bool = False


class ShuffleWindows(Generic[B]):
    """Which documents are shuffled together: each window has as many as fit into `window` ids, by `weight`.

    A longer document is a window by itself and goes through as it comes. `whole` makes one row of a document that came
    in several batches. Only lengths are looked at.
    """

    def __init__(self, window: int, whole: Callable[[list[B]], B]) -> None:
        self._window, self._whole = window, whole
        self._weight = 0
        self._parts: list[B] = []  # of a document that goes on
        self._long = False  # it is longer than the window

    def place(self, batch: B, where: Where) -> Iterator[Placed[B]]:
        low, high = 0, len(batch) - batch.open
        if len(batch) and (self._parts or self._long):
            yield from self._go_on(batch.rows(0, 1), where)
            low = 1
        if low < high:
            yield from self._take(batch.rows(low, high), lambda row: where(low + row))
        if batch.open and low <= high:
            yield from self._go_on(batch.rows(high, high + 1), lambda row: where(high + row))

    def _go_on(self, part: B, where: Where) -> Iterator[Placed[B]]:
        """Take a part of a document that is handed over in several batches."""
        if self._long:
            self._long = part.open
            yield Placed(part, where, alone=True)
            return
        self._parts.append(part)
        if not part.open:
            document, self._parts = self._whole(self._parts), []
            yield from self._take(document, where)
        elif sum(int(one.length.sum()) for one in self._parts) > self._window:
            yield from self._close(where)
            yield from (Placed(one, where, alone=True) for one in self._parts)
            self._parts, self._long = [], True

    def _take(self, batch: B, where: Where) -> Iterator[Placed[B]]:
        weights = np.cumsum(weight(batch.length))
        low = counted = 0
        while low < len(batch):
            high = int(np.searchsorted(weights, self._window - self._weight + counted, side="right"))
            begin = _behind(where, low)
            if high == low and self._weight:
                yield from self._close(begin)
                continue
            alone = high == low
            high = max(high, low + 1)
            yield Placed(batch.rows(low, high), begin, alone)
            upto = int(weights[high - 1])
            self._weight += 0 if alone else upto - counted
            low, counted = high, upto

    def _close(self, behind: Where) -> Iterator[Placed[B]]:
        if self._weight:
            self._weight = 0
            yield Placed(None, behind)


class Shuffle:
    """Shuffle documents within windows, as `ShuffleWindows` makes them.

    `feed` and `flush` give batches with their `where`, which has how many of the window's documents came before as
    `rows`.

    >>> import numpy as np
    >>> shuffle, row = Shuffle(0, 1000, np.dtype(np.uint32)), np.arange(5)
    >>> batch = TokenBatch(np.arange(5), row * 0 + 1, row, row * 0, [*"abcde"], row, row)
    >>> list(shuffle.feed(batch))
    []
    >>> [(batch.doc_ids, batch.ids.tolist()) for batch, where in shuffle.flush()]
    [(['e', 'c', 'a', 'b', 'd'], [4, 2, 0, 1, 3])]
    """

    def __init__(self, seed: int, window: int, dtype: "np.dtype[Any]") -> None:
        self._seed = seed
        self._windows = ShuffleWindows(window, _whole)
        self._ids = np.empty(window, dtype)  # memory that is not written to is not used
        self._first: State = {}  # where the window begins
        self._begin()

    def _begin(self) -> None:
        self._rows: list[TokenBatch] = []  # their ids are in `_ids`
        self._filled = 0

    def feed(self, batch: TokenBatch, where: Where = nowhere) -> Iterator[tuple[TokenBatch, Where]]:
        for rows, place, alone in self._windows.place(batch, where):
            if rows is None:
                yield from self._close(place(0))
            elif alone:
                yield rows, through(place)
            else:
                self._add(rows, place)

    def _add(self, batch: TokenBatch, where: Where) -> None:
        if not self._rows:
            self._first = where(0)
        self._ids[self._filled : self._filled + len(batch.ids)] = batch.ids
        self._filled += len(batch.ids)
        self._rows.append(replace(batch, ids=batch.ids[:0].copy()))

    def _close(self, behind: State | None = None) -> Iterator[tuple[TokenBatch, Where]]:
        """Hand out the window's documents, a chunk at a time; `behind` is where the next one begins."""
        if not self._rows:
            return
        length, ordinal, start, source, offset, cut_off = (
            np.concatenate([getattr(rows, name) for rows in self._rows])
            for name in ("length", "ordinal", "start", "source", "offset", "cut_off")
        )
        names = [name for rows in self._rows for name in rows.doc_ids]
        order = permutation(len(length), self._seed, int(ordinal[0]), "documents")
        runs = IdRuns(self._ids[: self._filled], np.concatenate([[0], np.cumsum(length)]))
        chunk = np.cumsum(length[order]) // CHUNK
        where = shuffled(self._first, len(order), behind)
        for low, high in pairwise([0, *(np.flatnonzero(np.diff(chunk)) + 1).tolist(), len(order)]):
            some = order[low:high]
            columns = (length[some], ordinal[some], start[some], take_names(names, some), source[some], offset[some])
            yield TokenBatch(runs.take(some), *columns, cut_off=cut_off[some]), _behind(where, low)
        self._begin()

    def flush(self) -> Iterator[tuple[TokenBatch, Where]]:
        """The documents of the last window, which the end of the input closes."""
        yield from self._close()


def shuffled(first: State, count: int, behind: State | None) -> Where:
    """`where` of a window of so many documents, once they are shuffled; `behind` it, which is where the next begins."""

    def where(row: int) -> State:
        if behind is not None and row == count:
            return {**behind, "rows": 0}
        return {**first, "rows": row}

    return where


def through(where: Where) -> Where:
    """`where` of documents that go through as they come."""
    return lambda row: {**where(row), "rows": 0}


def _behind(where: Where, low: int) -> Where:
    return lambda row: where(low + row)


def _whole(parts: list[TokenBatch]) -> TokenBatch:
    """A document that came in several batches, as one row."""
    ids = np.concatenate([part.ids for part in parts])
    return replace(parts[0], ids=ids, length=np.array([len(ids)]), open=False)
