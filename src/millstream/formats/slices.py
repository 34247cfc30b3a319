"""Cut the corpus into slices that any worker can decode without its neighbours.

The cuts never show in the output: lines are cut at line ends, plain text only where every pre-tokenizer we know
certainly splits, so the ids of the pieces are the ids of the whole.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from millstream.errors import ResumeRefused
from millstream.formats.sources import READ, InputShard, Truncated, chunks
from millstream.records import Cursor, Slice

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
    shards: list[InputShard], cursor: Cursor, limits: Limits, columns: tuple[str, str], block: int = BLOCK
) -> Iterator[Slice]:
    """The corpus from `cursor` on. `columns` are the (text, id) columns to take from Parquet files.

    What cannot be read becomes a slice with `fault` set. Raises ResumeRefused if the bytes before `cursor` are not the
    ones that `cursor.prefix` was made from.
    """
    for source in range(cursor.source, len(shards)):
        shard = shards[source]
        at = cursor if source == cursor.source else Cursor(source)
        end = Cursor(source + 1)
        try:
            if shard.kind == "parquet":
                yield from _row_slices(source, shard, at, columns, block)
            elif shard.kind == "jsonl":
                yield from _line_slices(source, shard, at, limits, block)
            else:
                yield from _text_slices(source, shard, limits, block)
        except OSError as error:
            message = f"cannot be read: {error.strerror or error}"
            yield Slice(source, shard.uri, shard.name, shard.kind, 0, 0, b"", fault=("unreadable", message), after=end)


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
    return "too_long", f"a {what} of {size:,} bytes; --max-document is {limit:,}"


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
    except (Truncated, OSError) as error:
        failure = error
    if held:
        yield b"".join(held)
    if failure:
        raise failure


def _from(shard: InputShard, cursor: Cursor, block: int, digest: Any) -> Iterator[bytes]:
    """The shard's bytes from `cursor`; what cannot be sought is read again up to there and compared."""
    if shard.seekable:
        yield from _regroup(chunks(shard, cursor.offset), block)
        return
    left = cursor.offset
    for chunk in _regroup(chunks(shard), block):
        if left:
            digest.update(chunk[:left])
            passed = min(left, len(chunk))
            left -= passed
            chunk = chunk[passed:]
            if not left:
                _compare(shard, cursor, digest)
        if chunk:
            yield chunk
    if left:
        raise ResumeRefused(
            f"{shard.name} now ends {left:,} bytes before the place where the run stopped; "
            "give the same stream again, or start anew with --overwrite"
        )


def _compare(shard: InputShard, cursor: Cursor, digest: Any) -> None:
    if cursor.prefix != digest.hexdigest():
        raise ResumeRefused(
            f"{shard.name} has changed before the place where the run stopped (byte {cursor.offset:,}); "
            "give the same input again, or start anew with --overwrite"
        )


def _line_slices(source: int, shard: InputShard, cursor: Cursor, limits: Limits, block: int) -> Iterator[Slice]:
    digest = hashlib.sha256()
    position = cursor.offset
    held: list[bytes] = []
    size = 0  # of the unfinished line in `held`, or passed over
    passing = False  # over a line that is too long

    def made(data: bytes, length: int, fault: tuple[str, str] | None = None) -> Slice:
        nonlocal position
        start, position = position, position + length
        prefix = None if shard.seekable else digest.hexdigest()
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

    def taken(data: bytes) -> None:
        if not shard.seekable:
            digest.update(data)

    failure = None
    try:
        for chunk in _from(shard, cursor, block, digest):
            if passing:
                end = chunk.find(b"\n") + 1
                taken(chunk[: end or len(chunk)])
                size += end or len(chunk)
                if not end:
                    continue
                yield made(b"", size, too_long(size - 1, limits.document))
                passing, size, chunk = False, 0, chunk[end:]
            cut = chunk.rfind(b"\n") + 1
            if cut:
                taken(b"".join(held))
                taken(chunk[:cut])
                data = b"".join((*held, chunk[:cut]))
                yield made(data, len(data))
                held, size, chunk = [], 0, chunk[cut:]
            if chunk:
                held.append(chunk)
                size += len(chunk)
            if size > limits.document + 1:  # one more for a "\r" that would not count
                taken(b"".join(held))
                held, passing = [], True
    except Truncated as error:
        failure = error
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
            fault=("truncated", str(failure)),
            after=after,
        )
    elif passing:
        yield made(b"", size, too_long(size, limits.document))
    elif held:
        data = b"".join(held)
        taken(data)
        yield made(data, len(data))


def _text_slices(source: int, shard: InputShard, limits: Limits, block: int) -> Iterator[Slice]:
    """One file, one document; a long one in pieces, after a first pass that finds what is wrong with it."""
    end = Cursor(source + 1)

    def made(start: int, data: bytes, begins: bool, ends: bool, fault: tuple[str, str] | None = None) -> Slice:
        stop = start + len(data)
        after = end if ends else Cursor(source, 0)
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
    except Truncated as error:
        yield made(0, b"", True, True, ("truncated", str(error)))
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
            raise _NoCut(f"no place to cut it safely in {size:,} bytes; --max-document is {limits.document:,}")
    if size:
        yield b"".join(held)


def _decode_message(error: Exception) -> str:
    return f"not valid UTF-8: {error.reason}" if isinstance(error, UnicodeDecodeError) else str(error)


def _row_slices(
    source: int, shard: InputShard, cursor: Cursor, columns: tuple[str, str], block: int
) -> Iterator[Slice]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    end = Cursor(source + 1)

    def bad(reason: str, message: str, row: int = 0) -> Slice:
        return Slice(source, shard.uri, shard.name, "rows", row, row, b"", fault=(reason, message), after=end)

    row = 0
    try:
        with pq.ParquetFile(shard.uri, pre_buffer=False, buffer_size=block) as file:
            names = file.schema_arrow.names
            if columns[0] not in names:
                yield bad("missing_field", f"no column {columns[0]!r}; it has {', '.join(names)}")
                return
            wanted = [name for name in columns if name in names]
            seen = hashlib.sha256()
            for group in range(file.num_row_groups):
                meta = file.metadata.row_group(group)
                last = row + meta.num_rows
                whole = seen.copy()
                whole.update(f"{meta.num_rows},{meta.total_byte_size};".encode())
                if last > cursor.offset:
                    if row <= cursor.offset and cursor.prefix not in (None, seen.hexdigest()):
                        _compare(shard, cursor, seen)
                    rows = max(1, block * meta.num_rows // max(1, meta.total_byte_size))
                    for batch in file.iter_batches(rows, row_groups=[group], columns=wanted):
                        skip = max(0, cursor.offset - row)
                        start, row = row, row + batch.num_rows
                        if skip >= batch.num_rows:
                            continue
                        sink = pa.BufferOutputStream()
                        with pa.ipc.new_stream(sink, batch.schema) as writer:
                            writer.write_batch(batch.slice(skip))
                        after = Cursor(source, row, (whole if row == last else seen).hexdigest())
                        yield Slice(
                            source,
                            shard.uri,
                            shard.name,
                            "rows",
                            start + skip,
                            row,
                            sink.getvalue().to_pybytes(),
                            after=after,
                        )
                else:
                    row = last
                seen = whole
    except pa.ArrowInvalid as error:
        yield bad("corrupt", f"damaged or no Parquet: {error}", row)
    except pa.ArrowException as error:
        yield bad("corrupt", f"cannot be read as Parquet: {error}", row)
