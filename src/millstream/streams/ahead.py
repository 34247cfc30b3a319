"""Batches of documents encoded ahead in other processes, in order, with a bound on what is held."""

import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from typing import Any, NamedTuple, TypeVar

from millstream.engines.ordered import map_ordered
from millstream.streams.columns import Texts

R = TypeVar("R")

_UNIT = 1 << 20  # bytes of text, about: enough to be worth sending, and little enough that all have some


class Unit(NamedTuple):
    """Documents for one call; `first` and `last` are their ids."""

    texts: list[Any]
    first: str
    last: str


def encoded_ahead(
    encode: Callable[[Unit], R], batches: Iterable[Texts], *, workers: int, ahead: int
) -> Generator[tuple[Texts, R]]:
    """Each batch, in pieces where it is large, with what `encode` makes of it in one of so many processes.

    At most about `ahead` bytes of text are with the processes, or encoded and not handed out. What `batches` raises
    comes after all that came before it.
    """
    sent: deque[Texts] = deque()
    failed: list[Exception] = []
    limit = max(1, min(_UNIT, ahead // (2 * workers)))

    def units() -> Iterator[Unit]:
        try:
            for batch in batches:
                for piece in _pieces(batch, limit):
                    sent.append(piece)
                    yield Unit(piece.texts, piece.ids[0], piece.ids[-1])
        except Exception as error:
            failed.append(error)

    found = map_ordered(encode, units(), workers=workers, window_bytes=ahead, size=_bytes_of, named=_named)
    with closing(found):
        for encoded in found:
            yield sent.popleft(), encoded
    if failed:
        raise failed[0]


def _pieces(batch: Texts, limit: int) -> Iterator[Texts]:
    start, size = 0, 0
    for row, text in enumerate(batch.texts, 1):
        size += _memory(text)
        if size >= limit or row == len(batch.texts):
            yield batch.rows(start, row)
            start, size = row, 0


def _bytes_of(unit: Unit) -> int:
    return sum(map(_memory, unit.texts))


def _memory(text: Any) -> int:
    """Bytes that a text takes, or a rendered conversation."""
    return sys.getsizeof(text if isinstance(text, str) else text.text)


def _named(unit: Unit) -> str:
    return f"document {unit.first!r}" if unit.first == unit.last else f"documents {unit.first!r} to {unit.last!r}"
