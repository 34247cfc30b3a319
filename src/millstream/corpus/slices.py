"""Cut the corpus into slices that any worker can decode without its neighbours.

The cuts never show in the output: lines are cut at line ends, rows between rows, plain text where it can be.
"""

import platform
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from millstream.corpus.limits import BLOCK, Buffer, Manner
from millstream.corpus.lines import blocks_of, line_slices, slices_of_lines
from millstream.corpus.objects import at_hand
from millstream.corpus.parquet import record_batches
from millstream.corpus.reader import Reader
from millstream.corpus.seen import Watch
from millstream.corpus.sources import InputShard, chunks
from millstream.corpus.texts import text_slices
from millstream.errors import RunError, Unusable
from millstream.records import Cursor, Part, Range, Seen, Slice

_NOT_READ = "cannot be read"


def slices(shards: Sequence[InputShard], cursor: Cursor, manner: Manner, used: Cursor | None = None) -> Iterator[Slice]:
    """The corpus from `cursor` on.

    What cannot be read becomes a slice with `fault` set. `used` is how far an earlier run has read: raises
    ResumeRefused when that is reached and the bytes (or rows) before it are not those that `used.prefix` was made from.
    """
    for source, shard in at_hand((source, shards[source]) for source in range(cursor.source, len(shards))):
        start = cursor.offset if source == cursor.source and shard.kind in ("jsonl", "parquet") else 0
        # What can be sought was compared before the run went on; all else is read from its beginning, to be compared.
        at_once = shard.seekable and (shard.kind != "parquet" or not manner.hashed)
        watch = Watch(source, shard, start if at_once else 0, used=None if at_once else used, hashed=manner.hashed)
        yield from _read(Reader(source, shard, manner, watch), Range(source, start), known=True)
        watch.finish()


def range_slices(wanted: Range, shard: InputShard, manner: Manner, *, used: Cursor | None = None) -> Iterator[Slice]:
    """What begins in a range of a shard, as `slices` reads it. `used` is compared where a packed file is read again up
    to it."""
    looked_at = wanted.start
    if shard.kind != "parquet":
        looked_at = max(0, wanted.start - 1) if shard.seekable else 0
    watch = Watch(wanted.source, shard, looked_at, used=None if shard.seekable else used, hashed=manner.hashed)
    yield from _read(Reader(wanted.source, shard, manner, watch), wanted, known=False)
    watch.finish()


def surely(pieces: Iterator[Slice]) -> Iterator[Slice]:
    """The same slices, each once there is another one. Raises RunError for what this machine cannot read: where others
    read as well, that is no fault of the input, and whoever can read it cuts the slice before it elsewhere."""
    before: Slice | None = None
    for piece in pieces:
        reason, message = piece.fault or ("", "")
        if reason == "unreadable" and message.startswith(_NOT_READ):
            raise RunError(not_read(piece.name, message.removeprefix(_NOT_READ)))
        if before:
            yield before
        before = piece
    if before:
        yield before


def not_read(called: str, why: str = "") -> str:
    """What those are told who cannot read what others may."""
    return (
        f"{called} {_NOT_READ} on {platform.node()}{why}; where several machines work on a run, each has to read all "
        "of its inputs: see that this one can, and run the same command again"
    )


def unpacked_slices(part: Part, shard: InputShard, manner: Manner, data: Buffer) -> Iterator[Slice]:
    """The same of lines that are in `data`, or that are a fault, as was found by whom `part` is from.

    What the part says of the bytes before is said behind them all.
    """
    (wanted,) = part.ranges
    reader = Reader(wanted.source, shard, manner, Watch(wanted.source, shard, wanted.start, hashed=False))
    if part.fault:
        stop = wanted.start if wanted.stop is None else wanted.stop
        pieces = iter([reader.slice(wanted.start, stop, fault=part.fault, over=wanted.stop is None)])
    else:
        pieces = slices_of_lines(reader, blocks_of(data, manner.block), wanted.start)
    for piece in pieces:
        if part.prefix is None or piece.stop != wanted.stop:
            yield piece
        else:
            seen = Seen(wanted.source, 0, piece.stop, part.prefix)
            yield replace(piece, after=Cursor(wanted.source, piece.stop, part.prefix), seen=seen)


def _read(reader: Reader, wanted: Range, *, known: bool) -> Iterator[Slice]:
    """`known`: what begins at the start of the range is not in question."""
    try:
        if reader.shard.kind == "parquet":
            yield from _row_slices(reader, wanted.start, wanted.stop)
        elif reader.shard.kind == "jsonl":
            yield from line_slices(reader, wanted.start, wanted.stop, known=known)
        else:
            yield from text_slices(reader, wanted.start, wanted.stop)
    except OSError as error:
        message = f"{_NOT_READ}: {error.strerror or error}"
        yield reader.slice(0, 0, fault=("unreadable", message), over=True)


def _row_slices(reader: Reader, start: int, stop: int | None) -> Iterator[Slice]:
    """Rows `start` to `stop`; those before are only watched, where they are."""
    watch, manner = reader.watch, reader.manner
    row = watch.position
    try:
        for first, batch in record_batches(reader.shard, manner.columns, manner.block, start=watch.position, stop=stop):
            watch.take(batch)
            row = first + batch.num_rows
            skip = max(0, start - first)
            if skip < batch.num_rows:
                yield reader.slice(first + skip, row, batch.slice(skip))
    except Unusable as unusable:
        yield reader.slice(row, row, fault=(unusable.reason, unusable.message), over=True)


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


def content_hash(shard: InputShard, columns: tuple[str, ...], start: int, stop: int) -> str:
    """The SHA-256 of what a run reads of an input shard from `start` to `stop`, as in `Seen`; of a shorter one, of what
    there is. Raises OSError."""
    watch = Watch(0, shard, start)
    try:
        if shard.kind == "parquet":
            for _, batch in record_batches(shard, columns, BLOCK, start=start, stop=stop):
                watch.take(batch)
        else:
            for chunk in chunks(shard, start):
                watch.take(chunk[: stop - watch.position])
                if watch.position == stop:
                    break
    except Unusable:  # damaged behind what was read, or else the hash is another one
        pass
    return watch.prefix or ""
