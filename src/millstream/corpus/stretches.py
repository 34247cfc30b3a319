"""Stretches of an input shard, as a plan reads them: its lines, its rows, its front; and how large it is, unpacked."""

import contextlib
import io
import os
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np

from millstream.corpus.parquet import as_stream, decoded_sizes, opened, rows_at_once, said
from millstream.corpus.sources import READ, InputShard, chunks, gunzip, unzstd
from millstream.corpus.texts import safe_cut
from millstream.errors import Unusable
from millstream.records import Slice

_SIP = 1 << 10


def text_size(shard: InputShard, columns: tuple[str, ...], most: int) -> int:
    """Bytes of text in an input shard, of a Parquet file in these `columns`; something above `most` if it has more.
    0 where it cannot be told."""
    if shard.uri == "-":
        return 0
    if shard.kind == "parquet":
        return sum(group.size for group in row_groups(shard, columns) or [])
    size = 0
    with contextlib.suppress(OSError, Unusable):
        if shard.packed is None:
            return shard.size()
        for chunk in chunks(shard):
            size += len(chunk)
            if size > most:
                break
    return size


def lines_between(shard: InputShard, low: int, high: int, longest: int) -> Iterator[Slice]:
    """The lines that begin at bytes from `low` to before `high`, in one slice; no more is read than that, and of the
    last one no more is held than shows that it is over `longest` bytes. Raises OSError."""
    with shard.open(until=high) as file:
        if low:
            file.seek(low - 1)
            _pass_line(file)
        start = file.tell()
        if start >= high:
            return
        data = file.read(high - start)
        if data[-1:] != b"\n":
            data += file.readline(longest + 2)
        if data[-1:] != b"\n":
            _pass_line(file)
        if data:
            yield Slice(
                source=0, uri=shard.uri, name=shard.name, kind="jsonl", start=start, stop=file.tell(), data=data
            )


def _pass_line(file: BinaryIO) -> None:
    while (piece := file.readline(READ)) and not piece.endswith(b"\n"):
        pass


def text_front(shard: InputShard, size: int) -> Slice:
    """About the first `size` bytes of a text, cut where it can be cut, as if they were all of it. Raises OSError."""
    data = b""
    with contextlib.suppress(Unusable):
        for piece in chunks(shard, stop=size + 1):
            data += piece
            if len(data) > size:
                break
    stop = min(size, len(data) - 1)
    while stop > size - 4 and data[stop] & 0xC0 == 0x80:  # within a character
        stop -= 1
    stop = safe_cut(data[:stop]) or stop
    return Slice(source=0, uri=shard.uri, name=shard.name, kind=shard.kind, start=0, stop=stop, data=data[:stop])


def within(pieces: Iterator[Slice], stop: int) -> Iterator[Slice]:
    """The slices of documents that begin before byte `stop` of their shard; lines are cut off behind the last one."""
    for piece in pieces:
        if piece.start >= stop:
            return
        if piece.kind == "jsonl" and piece.stop > stop and piece.data:
            end = piece.data.find(b"\n", stop - 1 - piece.start) + 1 or len(piece.data)
            yield replace(piece, data=piece.data[:end], stop=piece.start + end)
            return
        yield piece


def lines_of(pieces: Iterator[Slice], size: int) -> Iterator[Slice]:
    """The same lines, in slices of about `size` bytes."""
    for piece in pieces:
        data, start = piece.data or b"", 0
        while piece.fault is None and len(data) - start > size:
            stop = data.find(b"\n", start + size - 1) + 1 or len(data)
            yield replace(piece, data=data[start:stop], start=piece.start + start, stop=piece.start + stop)
            start = stop
        if piece.fault or start < len(data):
            yield replace(piece, data=data[start:], start=piece.start + start)


class _Sips(io.BufferedReader):
    """Reads little at once, so that `tell` says how much was needed."""

    def read1(self, size: int = -1, /) -> bytes:
        return super().read1(_SIP)


def expansion(shard: InputShard, most: int) -> float:
    """Bytes that a packed shard unpacks to for each of its own, up to its byte `most` unpacked. Raises OSError."""
    unpacked = 0
    with contextlib.suppress(Unusable), _Sips(cast(io.RawIOBase, shard.open(-1 if shard.far else 0))) as file:
        for piece in (gunzip if shard.packed == "gzip" else unzstd)(file):
            unpacked += len(piece)
            if unpacked >= most:
                return unpacked / file.tell()
    return max(1, unpacked) / max(1, shard.size())


def told_size(shard: InputShard) -> int | None:
    """Bytes of text in an input shard, as far as the file itself tells, in its frames or at its end; None where it
    does not, or cannot be read.

    The end of a gzip file tells the size of its last member modulo 2^32: it is believed if that member may be the
    only one, packed at least as well as nothing and at most 20 times. So is the first frame of a zstd file that is far
    away, where all of them would be a request for each block.
    """
    if shard.uri == "-":
        return None
    with contextlib.suppress(OSError):
        size = shard.size()
        with shard.open() as file:
            if shard.packed == "zstd":
                return only_frame_size(file, size) if shard.far else frames_size(file, size)
            if shard.packed == "gzip" and size > 18:
                file.seek(-4, os.SEEK_END)
                told = int.from_bytes(file.read(4), "little")
                return told if _may_be_all(told, size) else None
            return size if shard.kind != "parquet" else None
    return None


def _may_be_all(told: int, size: int) -> bool:
    return size <= told <= 20 * size


def only_frame_size(file: BinaryIO, size: int) -> int | None:
    """Bytes that a zstd file of `size` bytes unpacks to, if its first frame tells its own and may be the only one."""
    import zstandard

    try:
        told = int(zstandard.get_frame_parameters(file.read(18)).content_size)
    except zstandard.ZstdError:
        return None
    return told if _may_be_all(told, size) else None


def frames_size(file: BinaryIO, size: int) -> int | None:
    """Bytes that a zstd file of `size` bytes unpacks to, if every frame tells its own; its blocks are passed over.

    The form of frames and blocks: RFC 8878, section 3.1.
    """
    import zstandard

    total, at = 0, 0
    while at < size:
        file.seek(at)
        head = file.read(18)
        if head[1:4] == b"\x2a\x4d\x18" and head[0] >> 4 == 5:  # a frame to be skipped
            at += 8 + int.from_bytes(head[4:8], "little")
            continue
        try:
            frame = zstandard.get_frame_parameters(head)
        except zstandard.ZstdError:
            return None
        if frame.content_size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
            return None
        total += frame.content_size
        at += zstandard.frame_header_size(head)
        last = False
        while not last:
            file.seek(at)
            block = int.from_bytes(file.read(3), "little")
            last, kind, length = bool(block & 1), block >> 1 & 3, block >> 3
            at += 3 + (1 if kind == 1 else length)
            if at > size:
                return None
        at += 4 * frame.has_checksum
    return total


class RowGroup(NamedTuple):
    """Row group `number` of a Parquet file: its `rows`, their bytes in the columns asked for, and the file's footer,
    so that it is read once."""

    shard: InputShard
    number: int
    rows: int
    size: int
    footer: Any


def row_groups(shard: InputShard, columns: tuple[str, ...]) -> list[RowGroup] | None:
    """The row groups of a Parquet file that have rows; None if it has none of these columns or cannot be read."""
    import pyarrow as pa

    try:
        with opened(shard) as file:
            if not set(columns) & set(file.schema_arrow.names):
                return None
            footer = file.metadata
            rows = [footer.row_group(number).num_rows for number in range(file.num_row_groups)]
        sizes = decoded_sizes(shard, footer, columns)
        return [
            RowGroup(shard, number, count, size, footer)
            for number, (count, size) in enumerate(zip(rows, sizes, strict=True))
            if count
        ]
    except (OSError, pa.ArrowException, UnicodeDecodeError):
        return None


class Drawn(NamedTuple):
    """One of several stretches that follow one another, drawn by chance: it stands for `weight` of them."""

    piece: Slice
    weight: int


def drawn(pieces: Iterable[Slice], every: int, random: "np.random.Generator") -> Iterator[Drawn]:
    """One by chance of every `every` slices that follow one another, of fewer at the end; faults are always taken.

    How many slices there are need not be known beforehand: of those seen so far each is kept with the same chance
    (reservoir sampling; Vitter, "Random Sampling with a Reservoir", 1985).

    >>> slices = [Slice(0, "", "", "jsonl", n, n + 1, b"x") for n in range(5)]
    >>> [each.weight for each in drawn(slices, 2, np.random.default_rng(0))]
    [2, 2, 1]
    """
    kept, seen = None, 0
    for piece in pieces:
        if piece.fault:
            yield Drawn(piece, 1)
            continue
        seen += 1
        if random.integers(seen) == 0:
            kept = piece
        if kept is not None and seen == every:
            yield Drawn(kept, seen)
            kept, seen = None, 0
    if kept is not None:
        yield Drawn(kept, seen)


def rows_of(group: RowGroup, columns: tuple[str, ...], step: int) -> Iterator[Slice]:
    """The rows of a row group, `step` to a slice; what cannot be read is a slice with a fault."""
    import pyarrow as pa

    row, shard = 0, group.shard
    try:
        with opened(shard, metadata=group.footer, buffer_size=READ) as file:
            wanted = [name for name in columns if name in file.schema_arrow.names]
            step = min(step, rows_at_once(shard, file, group.number, wanted, READ))
            for batch in file.iter_batches(step, row_groups=[group.number], columns=wanted, use_threads=False):
                start, row = row, row + batch.num_rows
                yield Slice(
                    source=0, uri=shard.uri, name=shard.name, kind="rows", start=start, stop=row, data=as_stream(batch)
                )
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        fault = ("corrupt", f"row group {group.number} cannot be read: {said(error)}")
        yield Slice(source=0, uri=shard.uri, name=shard.name, kind="rows", start=row, stop=row, data=b"", fault=fault)
