"""Plain text, one document a file; long ones in pieces, cut only where every pre-tokenizer we know certainly splits, so
that the ids of the pieces are the ids of the whole."""

import re
from collections.abc import Iterator

from millstream.corpus.limits import Limits, Manner, too_long
from millstream.corpus.reader import Reader, regroup
from millstream.corpus.sources import InputShard, chunks
from millstream.errors import Unusable
from millstream.records import Slice

LONG_TEXT = 4 << 20
"""Plain text files above this many bytes are handed on in pieces, if they can be cut safely."""

_SAFE_CUT = re.compile(rb"[A-Za-z](?=[ \n])")


def can_cut(shard: InputShard, limits: Limits) -> bool:
    """Whether a text may be handed on in pieces."""
    return limits.cut and shard.kind == "text"


def text_slices(reader: Reader, start: int = 0, stop: int | None = None) -> Iterator[Slice]:
    """The text of a file, or of one that can be cut what lies between the first safe cuts at `start` and at `stop`, or
    behind. From 0 to 0 it is only checked. What is wrong with it is a slice with a fault. Raises OSError."""
    try:
        if stop == 0:
            check_text(reader.shard, reader.manner)
        elif start or stop is not None:
            yield from _between_cuts(reader, start, stop)
        else:
            yield from _whole_text(reader)
    except Unusable as unusable:
        yield reader.slice(0, 0, fault=(unusable.reason, unusable.message), over=True)


def check_text(shard: InputShard, manner: Manner) -> int:
    """The size in bytes of a text that can be cut, which is read once for that.

    Raises Unusable if it is not UTF-8 throughout, has no safe cuts or is longer than it may be; OSError.
    """
    size, most = 0, manner.limits.text
    for piece in _cut(regroup(chunks(shard), manner.block), manner.limits):
        try:
            piece.decode()
        except UnicodeDecodeError as error:
            told = f"not valid UTF-8: {error.reason} at byte {size + error.start:,}"
            raise Unusable("invalid_utf8", told) from None
        size += len(piece)
    if most is not None and size > most:
        raise Unusable(*too_long(size, most, "text"))
    return size


def _whole_text(reader: Reader) -> Iterator[Slice]:
    """One slice; or several, after a first pass that finds what is wrong with it, of a long one that can be cut."""
    shard, manner = reader.shard, reader.manner
    cut = can_cut(shard, manner.limits)
    limit = None if cut or manner.limits.endless else manner.limits.document
    data = _text(reader, limit, LONG_TEXT if cut else None)
    if data is not None:
        if cut and manner.limits.text is not None and len(data) > manner.limits.text:
            raise Unusable(*too_long(len(data), manner.limits.text, "text"))
        reader.watch.take(data)
        yield reader.slice(0, len(data), data, over=True)
        return
    check_text(shard, manner)
    yield from _pieces(reader, regroup(chunks(shard), manner.block), 0)


def _text(reader: Reader, limit: int | None, long: int | None) -> bytes | None:
    """The bytes of a text; None if it has more than `long`. Raises Unusable if it has more than `limit`."""
    held: list[bytes] = []
    size = 0
    for piece in regroup(chunks(reader.shard), reader.manner.block):
        size += len(piece)
        if long is not None and size > long:
            return None
        if limit is None or size <= limit:
            held.append(piece)
        else:
            held.clear()
    if limit is not None and size > limit:
        raise Unusable(*too_long(size, limit, "text"))
    return b"".join(held)


def _between_cuts(reader: Reader, start: int, stop: int | None) -> Iterator[Slice]:
    """Of a text that was checked; `reader` watches from the byte before `start` on."""
    begin = max(0, start - 1)
    text = _Text(chunks(reader.shard, begin, stop=stop), begin)
    if start:
        for piece in text.up_to(start):
            reader.watch.take(piece)
    yield from _pieces(reader, regroup(text.up_to(stop), reader.manner.block), text.position, text)


def _pieces(reader: Reader, blocks: Iterator[bytes], start: int, text: "_Text | None" = None) -> Iterator[Slice]:
    """Blocks of a text from byte `start` on, in slices cut safely; the last one ends it, if `text` has ended."""

    def made(data: bytes, ends: bool) -> Slice:
        reader.watch.take(data)
        return reader.slice(start, start + len(data), data, begins=start == 0, ends=ends, over=ends)

    last = b""
    for piece in _cut(blocks, reader.manner.limits):
        if last:
            yield made(last, False)
            start += len(last)
        last = piece
    if last:
        yield made(last, text is None or text.ended)


class _Text:
    """Bytes of a text from `position` on, taken up to safe cuts."""

    def __init__(self, pieces: Iterator[bytes], position: int) -> None:
        self.position, self._pieces = position, pieces
        self._rest = self._before = b""
        self.ended = False

    def up_to(self, place: int | None) -> Iterator[bytes]:
        """What follows, up to the first safe cut at byte `place` or behind, or to the end."""
        while piece := self._rest or next(self._pieces, b""):
            found = None
            if place is not None and self.position + len(piece) > place:
                # A cut can also lie between two pieces, so the last byte before goes along.
                at = max(0, place - 1 - self.position + len(self._before))
                found = _SAFE_CUT.search(self._before + piece, at)
            cut = found.end() - len(self._before) if found else len(piece)
            piece, self._rest = piece[:cut], piece[cut:]
            self.position += cut
            self._before = (self._before + piece)[-1:]
            if piece:
                yield piece
            if found:
                return
        self.ended = True


def safe_cut(data: bytes) -> int:
    """The last place in `data` between an ASCII letter and a following blank or line end; 0 if there is none.

    The split patterns of GPT-2, cl100k, o200k, Llama 3 and Qwen all end a match there, look no further back than the
    match's start, and start the next match with the blank: so both sides tokenize as they do together.

    >>> safe_cut(b"one two, three"), safe_cut(b"1, 2")
    (3, 0)
    """
    return _last_cut(data, 0, len(data))


def _last_cut(data: bytes, low: int, high: int) -> int:
    """The last safe cut between `low` and `high`; `low` if there is none."""
    for window in (1 << 12, high - low):
        last = None
        for last in _SAFE_CUT.finditer(data, max(low, high - window), high):  # noqa: B007
            pass
        if last is not None:
            return last.end()
    return low


def _cut(blocks: Iterator[bytes], limits: Limits) -> Iterator[bytes]:
    """Blocks of a text, cut at the last safe place of each that has one.

    Raises Unusable if more than `limits.document` bytes have none, wherever blocks end.
    """
    held: list[bytes] = []
    size = 0
    for block in blocks:
        before = held[-1][-1:] if held else b""  # a cut can also lie between two blocks
        at = _cut_in(before + block, size - len(before), limits.document)
        held.append(block)
        size += len(block)
        if at:
            data = b"".join(held)
            yield data[:at]
            held, size = [data[at:]], size - at
    if size:
        yield b"".join(held)


def _cut_in(block: bytes, start: int, longest: int) -> int:
    """The last safe cut in a block that begins `start` bytes behind the last one, counted from that; 0 without."""
    at = 0
    while start + len(block) - at > longest:
        low = max(0, at - start)
        found = _last_cut(block, low, at + longest + 1 - start)
        if found == low:
            raise Unusable("too_long", f"no place to cut it safely in {longest:,} bytes, which max-document is")
        at = start + found
    low = max(0, at - start)
    found = _last_cut(block, low, len(block))
    return at if found == low else start + found
