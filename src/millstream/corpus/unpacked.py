"""Packed lines, and those from a pipe, unpacked once and put where any worker reads them, in pieces of whole lines."""

import itertools
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import msgspec

from millstream.corpus.limits import Manner
from millstream.corpus.parts import PART
from millstream.corpus.slices import range_slices, surely
from millstream.corpus.sources import InputShard
from millstream.records import Cursor, Part, Range, Ref, Slice

T = TypeVar("T")
_AHEAD = 4  # slices that are read while nobody waits for them
_END: Any = object()


class Unpacked(msgspec.Struct, frozen=True):
    """Lines of a packed input, `data` of which has the bytes; or one that is none, for the reason `fault`. `prefix` is
    the hash of all bytes to the end of the range; None behind a fault that ends the input."""

    range: Range
    data: Ref | None = None
    fault: tuple[str, str] | None = None
    prefix: str | None = None

    def part(self, number: int) -> Part:
        return Part(number, (self.range,), self.data, fault=self.fault, prefix=self.prefix)


@dataclass(frozen=True)
class Unpack:
    """`Unpack(...)(part)`: the lines of a part of one packed input, about `size` bytes at once; picklable.

    `put` is that of `Pieces`. Pieces are named by where they begin, so that unpacking twice leaves them there once.
    Raises ResumeRefused where an earlier run has read to `used`, and that is not the same. The first so many that are
    `known` are passed over. What is `shared` is read as `surely` does.
    """

    shards: Sequence[InputShard]
    manner: Manner
    put: Callable[[str, Iterable[Any]], Ref]
    size: int = PART
    used: Cursor | None = None
    known: int = 0
    shared: bool = False

    def __call__(self, part: Part) -> Iterator[Unpacked]:
        pieces = self._slices(part, self.manner)
        groups = filter(None, _groups(surely(pieces) if self.shared else pieces, self.size, math.inf))
        yield from map(self._put, itertools.islice(groups, self.known, None))

    def piped(self, part: Part, seconds: float = 1.0) -> Iterator[Unpacked | None]:
        """The same of standard input, where the driver reads it: what is there after `seconds` is handed on even if it
        is less, and None if nothing is, so that nobody waits longer than that."""
        pieces = self._slices(part, replace(self.manner, block=1))  # lines as they come
        for group in _groups(timed(pieces, seconds), self.size, seconds):
            yield self._put(group) if group else None

    def _slices(self, part: Part, manner: Manner) -> Iterator[Slice]:
        (wanted,) = part.ranges
        return range_slices(wanted, self.shards[wanted.source], manner, used=self.used)

    def _put(self, group: list[Slice]) -> Unpacked:
        first, last = group[0], group[-1]
        if first.fault:
            return _faulty(first)
        ref = self.put(f"unpacked-{first.source}-{first.start}", [piece.data for piece in group])
        return Unpacked(Range(first.source, first.start, last.stop), ref, prefix=last.after.prefix)


def _groups(pieces: Iterator[Slice | None], most: int, seconds: float) -> Iterator[list[Slice] | None]:
    """Slices of lines, together of `most` bytes or so, or what has come after so many seconds; one with a fault is by
    itself. None wherever none has come."""
    held: list[Slice] = []
    size, since = 0, 0.0
    for piece in pieces:
        lines = piece is not None and piece.fault is None
        if piece is not None and lines:
            since = since if held else time.monotonic()
            held.append(piece)
            size += piece.size
        late = held and time.monotonic() - since >= seconds
        if held and (size >= most or late or not lines):
            yield held
            held, size = [], 0
        elif piece is None:
            yield None
        if piece is not None and piece.fault:
            yield [piece]
    if held:
        yield held


def _faulty(piece: Slice) -> Unpacked:
    over = piece.after.source > piece.source
    stop = None if over else piece.stop
    return Unpacked(Range(piece.source, piece.start, stop), fault=piece.fault, prefix=piece.after.prefix)


def timed(items: Iterator[T], seconds: float) -> Iterator[T | None]:
    """The items as they come, read in a thread; None whenever none has come for so long.

    The thread ends with the process: a read that nothing will ever answer keeps nobody waiting.
    """
    wanted: queue.SimpleQueue[bool] = queue.SimpleQueue()
    came: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
    over = threading.Event()

    def work() -> None:
        while wanted.get() and not over.is_set():
            try:
                item = next(items, _END)
            except BaseException as error:
                came.put((_END, error))
                return
            came.put((item, None))

    threading.Thread(target=work, name="millstream-pipe", daemon=True).start()
    for _ in range(_AHEAD):
        wanted.put(True)
    try:
        while True:
            try:
                item, error = came.get(timeout=seconds)
            except queue.Empty:
                yield None
                continue
            if error:
                raise error
            if item is _END:
                return
            wanted.put(True)
            yield item
    finally:
        over.set()
        wanted.put(False)
