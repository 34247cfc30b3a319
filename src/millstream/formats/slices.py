"""Cut the corpus into slices that any worker can decode without its neighbours.

The cuts never show in the output: lines are cut at line ends, plain text only where every pre-tokenizer we know
certainly splits, so the ids of the pieces are the ids of the whole.
"""

import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from millstream.errors import ResumeRefused, Unusable, setting
from millstream.formats.parquet import as_stream, record_batches, row_hashes
from millstream.formats.sources import READ, InputShard, chunks
from millstream.records import Cursor, Seen, Slice

BLOCK = READ
LONG_TEXT = 4 << 20
"""Plain text files above this many bytes are handed on in pieces, if they can be cut safely."""

_SAFE_CUT = re.compile(rb"[A-Za-z](?=[ \n])")


@dataclass(frozen=True)
class Limits:
    """`document`: bytes of the longest document that is held whole. `text`: the same for plain text that can be cut
    (None: no limit). `cut`: whether the tokenizer allows cutting plain text."""

    document: int
    text: int | None = None
    cut: bool = False


def slices(
    shards: list[InputShard],
    cursor: Cursor,
    limits: Limits,
    columns: tuple[str, ...],
    block: int = BLOCK,
    used: Cursor | None = None,
) -> Iterator[Slice]:
    """The corpus from `cursor` on. `columns` are those to take from Parquet files: of the text, and last of the id.

    What cannot be read becomes a slice with `fault` set. `used` is how far an earlier run has read: raises
    ResumeRefused when that is reached and the bytes (or rows) before it are not those that `used.prefix` was made from.
    """
    for source in range(cursor.source, len(shards)):
        shard = shards[source]
        at = cursor if source == cursor.source else Cursor(source)
        start = at.offset if shard.seekable and shard.kind == "jsonl" else 0  # all else is read from the beginning
        running = _Running(shard, start, used if used and used.source == source else None)
        end = Cursor(source + 1)
        try:
            if shard.kind == "parquet":
                pieces = _row_slices(source, shard, at, columns, block, running)
            elif shard.kind == "jsonl":
                pieces = _line_slices(source, shard, at, limits, block, running)
            else:
                pieces = _text_slices(source, shard, limits, block, running)
            for piece in pieces:
                yield replace(piece, seen=running.seen(source))
        except OSError as error:
            message = f"cannot be read: {error.strerror or error}"
            yield Slice(source, shard.uri, shard.name, shard.kind, 0, 0, b"", fault=("unreadable", message), after=end)
        running.finish()


class _Running:
    """A running hash over what is read of an input shard, from byte or row `start` on; of what cannot be sought (packed
    files, standard input, rows) it is compared where `used` says."""

    def __init__(self, shard: InputShard, start: int, used: Cursor | None) -> None:
        seen_at_once = shard.seekable and shard.kind != "parquet"  # and compared before the run went on
        self._shard = shard
        self._used = used if used and used.prefix and not seen_at_once else None
        self._digest = hashlib.sha256()
        self._start = self._position = start

    def seen(self, source: int) -> Seen:
        return Seen(source, self._start, self._position, self.prefix)

    @property
    def prefix(self) -> str:
        return self._digest.hexdigest()

    def take(self, data: bytes) -> None:
        self.take_rows(len(data), lambda low, high: data[low:high])

    def take_rows(self, count: int, content: Callable[[int, int], bytes]) -> None:
        """The next `count` bytes or rows; `content(low, high)` is what to hash of a part of them."""
        low = 0
        if self._used and self._position < self._used.offset <= self._position + count:
            low = self._used.offset - self._position
            self._digest.update(content(0, low))
            if self.prefix != self._used.prefix:
                raise ResumeRefused(
                    f"{self._shard.called} has changed before {self._used.offset:,}, which the run has read; "
                    f"give the same input again, or start anew with {setting('overwrite', True)}"
                )
            self._used = None
        if low < count:
            self._digest.update(content(low, count))
        self._position += count

    def finish(self) -> None:
        if self._used:
            raise ResumeRefused(
                f"{self._shard.called} now ends at {self._position:,}, and the run has read to {self._used.offset:,}; "
                f"give the same input again, or start anew with {setting('overwrite', True)}"
            )


def units(pieces: Iterable[Slice], block: int = BLOCK) -> Iterator[tuple[Slice, ...]]:
    """Join small slices into units of about `block` bytes; a text that goes on ends its unit.

    A slice that was cut at the last line end of a block is a little smaller than the block: half of it is enough.
    """
    held: list[Slice] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += piece.size
        if size >= block // 2 or not piece.ends:
            yield tuple(held)
            held, size = [], 0
    if held:
        yield tuple(held)


def too_long(size: int, limit: int, what: str = "line") -> tuple[str, str]:
    return "too_long", f"a {what} of {size:,} bytes; max-document is {limit:,}"


def safe_cut(data: bytes) -> int:
    """The last place in `data` between an ASCII letter and a following blank or line end; 0 if there is none.

    The split patterns of GPT-2, cl100k, o200k, Llama 3 and Qwen all end a match there, look no further back than the
    match's start, and start the next match with the blank: so both sides tokenize as they do together.

    >>> safe_cut(b"one two, three"), safe_cut(b"1, 2")
    (3, 0)
    """
    for window in (1 << 12, len(data)):
        base = max(0, len(data) - window)
        last = None
        for last in _SAFE_CUT.finditer(data, base):  # noqa: B007
            pass
        if last is not None:
            return last.end()
    return 0


def _regroup(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
    """Join pieces to at least `size` bytes; when reading fails, hand out what came before it first."""
    held: list[bytes] = []
    total = 0
    failure: Exception | None = None
    try:
        for piece in pieces:
            held.append(piece)
            total += len(piece)
            if total >= size:
                yield b"".join(held)
                held, total = [], 0
    except (Unusable, OSError) as error:
        failure = error
    if held:
        yield b"".join(held)
    if failure:
        raise failure


def _from(shard: InputShard, offset: int, block: int, running: _Running) -> Iterator[bytes]:
    """The shard's bytes from `offset`; what cannot be sought is read again up to there."""
    if shard.seekable:
        yield from _regroup(chunks(shard, offset), block)
        return
    left = offset
    for chunk in _regroup(chunks(shard), block):
        passed = min(left, len(chunk))
        if passed:
            running.take(chunk[:passed])
            left -= passed
            chunk = chunk[passed:]
        if chunk:
            yield chunk


def _line_slices(
    source: int, shard: InputShard, cursor: Cursor, limits: Limits, block: int, running: _Running
) -> Iterator[Slice]:
    position = cursor.offset
    held: list[bytes] = []
    size = 0  # of the unfinished line in `held`, or passed over
    passing = False  # over a line that is too long

    def made(data: bytes, length: int, fault: tuple[str, str] | None = None) -> Slice:
        nonlocal position
        start, position = position, position + length
        prefix = None if shard.seekable else running.prefix
        return Slice(
            source,
            shard.uri,
            shard.name,
            "jsonl",
            start,
            position,
            data,
            fault=fault,
            after=Cursor(source, position, prefix),
        )

    failure = None
    try:
        for chunk in _from(shard, cursor.offset, block, running):
            if passing:
                end = chunk.find(b"\n") + 1
                running.take(chunk[: end or len(chunk)])
                size += end or len(chunk)
                if not end:
                    continue
                yield made(b"", size, too_long(size - 1, limits.document))
                passing, size, chunk = False, 0, chunk[end:]
            cut = chunk.rfind(b"\n") + 1
            if cut:
                running.take(b"".join(held))
                running.take(chunk[:cut])
                data = b"".join((*held, chunk[:cut]))
                yield made(data, len(data))
                held, size, chunk = [], 0, chunk[cut:]
            if chunk:
                held.append(chunk)
                size += len(chunk)
            if size > limits.document + 1:  # one more for a "\r" that would not count
                running.take(b"".join(held))
                held, passing = [], True
    except Unusable as unusable:
        failure = unusable
    if failure:
        after = Cursor(source + 1)
        yield Slice(
            source,
            shard.uri,
            shard.name,
            "jsonl",
            position,
            position,
            b"",
            fault=(failure.reason, failure.message),
            after=after,
        )
    elif passing:
        yield made(b"", size, too_long(size, limits.document))
    elif held:
        data = b"".join(held)
        running.take(data)
        yield made(data, len(data))


def _text_slices(source: int, shard: InputShard, limits: Limits, block: int, running: _Running) -> Iterator[Slice]:
    """One file, one document; a long one in pieces, after a first pass that finds what is wrong with it."""
    end = Cursor(source + 1)

    def made(start: int, data: bytes, begins: bool, ends: bool, fault: tuple[str, str] | None = None) -> Slice:
        stop = start + len(data)
        running.take(data)
        after = end if ends else Cursor(source, stop, None if shard.seekable else running.prefix)
        return Slice(source, shard.uri, shard.name, shard.kind, start, stop, data, begins, ends, fault, after)

    may_cut = limits.cut and shard.kind == "text"
    limit = limits.text if may_cut else limits.document
    held, size = [], 0
    try:
        for chunk in _regroup(chunks(shard), block):
            size += len(chunk)
            if limit is None or size <= limit:
                held.append(chunk)
            else:
                held = []
            if may_cut and size > LONG_TEXT:
                held = []
                size = _first_pass(shard, limits, block)
                break
    except Unusable as unusable:
        yield made(0, b"", True, True, (unusable.reason, unusable.message))
        return
    except (UnicodeDecodeError, _NoCut) as error:
        reason = "invalid_utf8" if isinstance(error, UnicodeDecodeError) else "too_long"
        yield made(0, b"", True, True, (reason, _decode_message(error)))
        return
    if limit is not None and size > limit:
        yield made(0, b"", True, True, too_long(size, limit, "text"))
    elif held or not size:
        yield made(0, b"".join(held), True, True)
    else:
        start, last = 0, b""
        for piece in _cut(shard, limits, block):
            if last:
                yield made(start, last, start == 0, False)
                start += len(last)
            last = piece
        yield made(start, last, start == 0, True)


def content_hash(shard: InputShard, columns: tuple[str, ...], start: int, stop: int) -> str:
    """The SHA-256 of what a run reads of an input shard from `start` to `stop`, as in `Seen`; of a shorter one, of what
    there is. Raises OSError."""
    running = _Running(shard, start, None)
    left = stop - start
    try:
        if shard.kind == "parquet":
            for batch in record_batches(shard, columns, BLOCK):
                running.take_rows(min(left, batch.num_rows), partial(row_hashes, batch))
                left -= min(left, batch.num_rows)
        else:
            for chunk in chunks(shard, start):
                running.take(chunk[:left])
                left -= min(left, len(chunk))
                if not left:
                    break
    except Unusable:  # damaged behind what was read, or else the hash is another one
        pass
    return running.prefix


class _NoCut(Exception):
    pass


def _first_pass(shard: InputShard, limits: Limits, block: int) -> int:
    """The size of a text in bytes, once it is known to be UTF-8 throughout and to have safe cuts."""
    size = 0
    for piece in _cut(shard, limits, block):
        try:
            piece.decode()
        except UnicodeDecodeError as error:
            reason = f"{error.reason} at byte {size + error.start:,}"
            raise UnicodeDecodeError("utf-8", error.object, error.start, error.end, reason) from None
        size += len(piece)
    return size


def _cut(shard: InputShard, limits: Limits, block: int) -> Iterator[bytes]:
    held: list[bytes] = []
    size = 0
    for chunk in _regroup(chunks(shard), block):
        held.append(chunk)
        size += len(chunk)
        # A cut can also lie between two chunks, so the last byte before goes along.
        tail = held[-2][-1:] if len(held) > 1 else b""
        at = safe_cut(tail + chunk) - len(tail)
        if at >= 0 and at + size > len(chunk):
            data = b"".join(held)
            at += size - len(chunk)
            yield data[:at]
            held, size = [data[at:]], size - at
        elif size > limits.document:
            raise _NoCut(f"no place to cut it safely in {size:,} bytes; max-document is {limits.document:,}")
    if size:
        yield b"".join(held)


def _decode_message(error: Exception) -> str:
    return f"not valid UTF-8: {error.reason}" if isinstance(error, UnicodeDecodeError) else str(error)


def _row_slices(
    source: int, shard: InputShard, cursor: Cursor, columns: tuple[str, ...], block: int, running: _Running
) -> Iterator[Slice]:
    row = 0
    try:
        for batch in record_batches(shard, columns, block):
            running.take_rows(batch.num_rows, partial(row_hashes, batch))
            skip = max(0, cursor.offset - row)
            start, row = row, row + batch.num_rows
            if skip < batch.num_rows:
                data = as_stream(batch.slice(skip))
                after = Cursor(source, row, running.prefix)
                yield Slice(source, shard.uri, shard.name, "rows", start + skip, row, data, after=after)
    except Unusable as unusable:
        fault, after = (unusable.reason, unusable.message), Cursor(source + 1)
        yield Slice(source, shard.uri, shard.name, "rows", row, row, b"", fault=fault, after=after)
