"""Lines of JSON, in slices: those that begin in a range of bytes, wherever its ends fall."""

import itertools
from collections.abc import Iterator

from millstream.corpus.kinds import BYTE_ORDER_MARK
from millstream.corpus.limits import Buffer, too_long
from millstream.corpus.reader import Reader, regroup
from millstream.corpus.seen import Watch
from millstream.corpus.sources import chunks
from millstream.errors import Unusable
from millstream.records import Slice


def line_slices(reader: Reader, start: int = 0, stop: int | None = None, *, known: bool = True) -> Iterator[Slice]:
    """The lines that begin from byte `start` to before `stop`, in slices of about a block, cut at line ends.

    `known`: a line is known to begin at `start`. Else the byte before it is looked at too, by a reader that watches
    from there on, and the rest of a line that goes on there belongs to those who read where it begins. A line that is
    too long, and damage, are slices with a fault. Raises OSError.
    """
    shard = reader.shard
    if not shard.seekable:
        pieces = _passed_over(reader, start)
    elif known or not start:
        pieces = chunks(shard, start, stop=stop)
    else:
        pieces = chunks(shard, start - 1, stop=stop)
        found = _next_line(reader.watch, pieces, start - 1, stop)
        if found is None:
            return
        start, rest = found
        pieces = itertools.chain([rest], pieces)
    yield from slices_of_lines(reader, regroup(_until(pieces, start, stop), reader.manner.block), start)


def _passed_over(reader: Reader, left: int) -> Iterator[bytes]:
    """What cannot be sought is read from its beginning; the first `left` bytes are only watched."""
    pieces = chunks(reader.shard)
    while left and (piece := next(pieces, b"")):
        reader.watch.take(piece[:left])
        if left < len(piece):
            yield piece[left:]
        left = max(0, left - len(piece))
    yield from pieces


def _next_line(watch: Watch, pieces: Iterator[bytes], position: int, stop: int | None) -> tuple[int, bytes] | None:
    """(where the first line begins behind `position`, what is read of it already); None if none does before `stop`."""
    for piece in pieces:
        end = piece.find(b"\n") + 1
        watch.take(piece[: end or len(piece)])
        position += end or len(piece)
        if stop is not None and position >= stop:
            return None
        if end:
            return position, piece[end:]
    return None


def _until(pieces: Iterator[bytes], position: int, stop: int | None) -> Iterator[bytes]:
    """Pieces that begin at `position`, to the end of the last line that begins before `stop`."""
    if stop is None:
        yield from pieces
        return
    for piece in pieces:
        if position + len(piece) >= stop:
            end = piece.find(b"\n", max(0, stop - 1 - position)) + 1
            if end:
                yield piece[:end]
                return
        yield piece
        position += len(piece)


def blocks_of(data: Buffer, size: int) -> Iterator[bytes]:
    """Bytes, or what has them mapped, in blocks."""
    for start in range(0, len(data), size):
        yield bytes(data[start : start + size])


def slices_of_lines(reader: Reader, blocks: Iterator[bytes], position: int) -> Iterator[Slice]:
    """Blocks of bytes, of which the first begins at `position` with a line, cut behind the last line end of each."""
    longest = reader.manner.limits.document
    line = _Unfinished(reader.watch, longest, at_front=position == 0)

    def made(rest: Buffer = b"", ended: int = 0) -> Slice:
        nonlocal position
        data, size = line.end(rest)
        start, position = position, position + size
        fault = too_long(size - ended - line.mark, longest) if size and not data else None
        return reader.slice(start, position, data, fault=fault)

    try:
        for block in blocks:
            low = 0
            if line.passing:
                low = block.find(b"\n") + 1
                line.add(block[: low or len(block)])
                if not low:
                    continue
                yield made(ended=1)
            cut = block.rfind(b"\n") + 1
            if cut > low:
                yield made(memoryview(block)[low:cut])
                low = cut
            line.add(block[low:])
    except Unusable as unusable:
        yield reader.slice(position, position, fault=(unusable.reason, unusable.message), over=True)
        return
    if line.size:
        yield made()


class _Unfinished:
    """The line that goes on behind what was read: its bytes, or how many they are once nobody wants so many.

    It is over `longest` only if it is so without the byte order mark of a file, and without a line end.
    """

    def __init__(self, watch: Watch, longest: int, *, at_front: bool) -> None:
        self._watch, self._longest, self._at_front = watch, longest, at_front
        self._held: list[bytes] = []
        self.size = 0
        self.mark = 0
        self.passing = False

    def add(self, data: bytes) -> None:
        if data:
            self._held.append(data)
            self.size += len(data)
        if self.passing:
            self._take()
        elif self.size > self._longest + 1:  # one more for a "\r" that does not count
            front = b"".join(self._held) if self._at_front else b""
            self.mark = len(BYTE_ORDER_MARK) if front.startswith(BYTE_ORDER_MARK) else 0
            self.passing = self.size > self._longest + 1 + self.mark
            if self.passing:
                self._take()

    def _take(self) -> None:
        for piece in self._held:
            self._watch.take(piece)
        self._held.clear()

    def end(self, rest: Buffer) -> tuple[bytes, int]:
        """(its bytes and `rest`, which ends with a line end if any does; how many): no bytes of what was too long."""
        data = b"".join((*self._held, rest))
        size = self.size + len(rest)
        self._held.clear()
        self._watch.take(data)
        self.size, self.passing, self._at_front = 0, False, False
        return data, size
