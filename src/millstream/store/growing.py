"""An object that lines are appended to. A bucket has no append: what is added goes up in parts of their own."""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

from millstream.store.contract import SHORTER, UNNAMED, Listed, Store
from millstream.store.held import Held

FULL = 1 << 20
"""Bytes from which on a part stays as it is; a shorter one is written again with what follows."""
MOST = 8 << 20
_EVERY = 10.0
"""Seconds after which what was appended goes up, where nobody asks for it before."""


class Pouring(Store, Protocol):
    """A store that makes one object of many pieces."""

    def pour(self, name: str, pieces: Callable[[], Iterator[bytes]], size: int) -> None:
        """A new object of so many bytes, in place of what has the name."""


class Piece(NamedTuple):
    start: int
    stop: int
    name: str


class Growing:
    """An object and its parts beside it, which become one when it is closed; see `contract.Appender`.

    A part is called by its place in the whole. So no harm is done by a kill: those that the object has already are
    known by that. What is appended survives this process once it is flushed, and else after ten seconds, with the next
    line.
    """

    def __init__(
        self, store: Pouring, name: str, at: int | None, lease: Held | None, after: contextlib.ExitStack
    ) -> None:
        self._store, self._name, self._lease, self._after = store, name, lease, after
        self._folder = name + UNNAMED
        self._open, self._at_last = True, time.monotonic()
        self._parts: list[Piece] = []
        self._base = self._join(at)
        self._part, self._sent = bytearray(), 0

    def _join(self, at: int | None) -> int:
        """Make one object of what there is, `at` bytes of it; how long it is."""
        there = self._store.found(self._folder)
        size = self._store.size(self._name) if self._store.exists(self._name) else None
        pieces = in_order(size or 0, there)
        whole = pieces[-1].stop if pieces else 0
        if at is not None and at > whole:
            raise OSError(errno.EIO, SHORTER, f"{self._store.url}/{self._name}")
        at = whole if at is None else at
        if size != at:
            named = [piece._replace(name=piece.name or self._name) for piece in pieces]
            self._store.pour(self._name, lambda: blocks(self._store, named, at), at)
        if there:
            self._store.delete(self._folder)
        return at

    @property
    def _begin(self) -> int:
        """Where the part begins that still grows."""
        return self._parts[-1].stop if self._parts else self._base

    def write(self, data: bytes) -> None:
        self._part += data
        if len(self._part) - self._sent > MOST or time.monotonic() - self._at_last > _EVERY:
            self.flush()

    def flush(self) -> None:
        self._at_last = time.monotonic()
        if self._lease:
            self._lease.check()
        if len(self._part) == self._sent:
            return
        name = f"{self._folder}/{self._begin:020d}"
        self._store.put(name, bytes(self._part))
        self._sent = len(self._part)
        if self._sent >= FULL:
            self._parts.append(Piece(self._begin, self._begin + self._sent, name))
            self._part, self._sent = bytearray(), 0

    def read(self, start: int, stop: int) -> bytes:
        self.flush()
        pieces = [Piece(0, self._base, self._name), *self._parts]
        data = b"".join(
            self._store.read(piece.name, max(start - piece.start, 0), stop - piece.start)
            for piece in pieces
            if piece.start < stop and start < piece.stop
        )
        return data + bytes(self._part[max(start - self._begin, 0) : max(stop - self._begin, 0)])

    def size(self) -> int:
        return self._begin + len(self._part)

    def truncate(self, size: int) -> None:
        self.flush()
        self._base = self._join(size)
        self._parts, self._part, self._sent = [], bytearray(), 0

    def sync(self) -> None:
        self.flush()

    def close(self) -> None:
        if self._open:
            self._open = False
            with self._after:
                self.flush()
                if self._parts or self._part:
                    self._join(None)

    def __enter__(self) -> "Growing":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def in_order(size: int, there: Sequence[Listed]) -> list[Piece]:
    """The pieces of the whole: the object, called "", and the parts that follow it.

    >>> def part(start, size):
    ...     return Listed(f"a/{start:020d}", State("file", size, 0, 0, (0, 0)))
    >>> from millstream.store.contract import State
    >>> found = in_order(5, [part(0, 5), part(5, 2), part(7, 1), part(9, 1)])  # it has the first; 8 is missing
    >>> [(piece.start, piece.stop) for piece in found]
    [(0, 5), (5, 7), (7, 8)]
    """
    found = [Piece(0, size, "")]
    for name, state in there:
        start = int(os.path.basename(name))
        if start == found[-1].stop and state.size:
            found.append(Piece(start, start + state.size, name))
    return found if size else found[1:]


def blocks(store: Store, pieces: list[Piece], stop: int) -> Iterator[bytes]:
    """The bytes of pieces, to before `stop`."""
    for piece in pieces:
        for start in range(piece.start, min(piece.stop, stop), MOST):
            yield store.read(piece.name, start - piece.start, min(start + MOST, piece.stop, stop) - piece.start)
