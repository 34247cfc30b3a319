"""Documents in columns, as one stage hands them to the next, and how items are gathered for them."""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np

from millstream.errors import DataError
from millstream.records import Ids, TokenBatch
from millstream.streams.base import After, At, Pair

T = TypeVar("T")
Where = Callable[[int], At]
BATCH = 4 << 20
"""Bytes in a batch, about."""
MOST_ITEMS = 1 << 16
PATIENCE = 0.05
"""Seconds after which what has come is handed on."""


class Texts:
    """A batch of documents; `states(i)` is where reading goes on after i of them."""

    __slots__ = ("ids", "states", "texts")

    def __init__(self, texts: list[Any], ids: list[str], states: Where) -> None:
        self.texts, self.ids, self.states = texts, ids, states

    def rows(self, start: int, stop: int) -> "Texts":
        """The documents from one row to before another."""
        if start == 0 and stop == len(self.texts):
            return self
        return Texts(self.texts[start:stop], self.ids[start:stop], lambda row: self.states(start + row))


class Tokens:
    """A `TokenBatch` with `states(i)`: where reading goes on after i of its documents.

    `plain`: its ids have LEARNED set where they are to be learned, and are of this type without it. `eos`: what ends
    every document that has ids, if anything does.
    """

    __slots__ = ("batch", "eos", "plain", "states")

    def __init__(
        self, batch: TokenBatch, states: Where, plain: "np.dtype[Any] | None" = None, eos: int | None = None
    ) -> None:
        self.batch, self.states, self.plain, self.eos = batch, states, plain, eos


def token_batch(ids: Ids, length: Ids, ordinal: int, names: list[str]) -> TokenBatch:
    """Whole documents, numbered from `ordinal` on."""
    rows = np.arange(ordinal, ordinal + len(length), dtype=np.uint64)
    zeros = np.zeros(len(length), np.int64)
    return TokenBatch(ids, length, rows, zeros, names, source=zeros, offset=rows)


def apart(flat: Ids, length: Ids) -> list[Ids]:
    """Each document's ids, as views.

    >>> [ids.tolist() for ids in apart(np.arange(3), np.array([2, 0, 1]))]
    [[0, 1], [], [2]]
    """
    return [flat[begin:end] for begin, end in itertools.pairwise([0, *np.cumsum(length).tolist()])]


def behind(begin: After, pairs: Sequence[Pair[Any]]) -> Where:
    """Where to go on after so many of these items, of which `begin` says where the first is."""
    return lambda row: (pairs[row - 1][1] if row else begin)()


def filled(items: Iterable[T], size: Callable[[T], int], limit: int = BATCH) -> Iterator[list[T]]:
    """Items in lists: of at most 1, 2, 4, ..., so that the first comes soon, and of not much more than `limit` bytes.

    What took `PATIENCE` seconds to come is not held back for more: so a live source is handed on as it comes. Where
    lists end is never seen in what is made of them.
    """
    held: list[T] = []
    total, most, begun = 0, 1, time.monotonic()
    try:
        for item in items:
            held.append(item)
            total += size(item)
            if total >= limit or len(held) >= most or time.monotonic() - begun >= PATIENCE:
                yield held
                held, total, most, begun = [], 0, min(2 * most, MOST_ITEMS), time.monotonic()
    except DataError:
        if held:  # what came before it is handed out first
            yield held
        raise
    if held:
        yield held
