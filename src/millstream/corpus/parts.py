"""Plan the corpus as parts, each of which a worker reads for itself: by the sizes of files and the footers of Parquet,
never by reading data."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby

from millstream.corpus import texts
from millstream.corpus.limits import Buffer, Manner
from millstream.corpus.objects import at_hand, growing, of_each
from millstream.corpus.parquet import group_sizes
from millstream.corpus.slices import range_slices, unpacked_slices
from millstream.corpus.sources import InputShard, rough_size
from millstream.records import Cursor, Part, Range, Slice

PART = 16 << 20
"""Bytes of input in a part, about."""
_ALONE = math.inf
"""The weight of a range that shares its part with no other: an input that ends early takes its later parts with it."""
TOGETHER = 1 << 10
"""No part has ranges of inputs from both sides of a multiple of this number, so that a run that goes on need look at no
more of the earlier ones to find the parts that it would have come to."""


def parts(
    shards: Sequence[InputShard], cursor: Cursor, manner: Manner, size: int = PART, *, whole_texts: bool = False
) -> Iterator[Part]:
    """The corpus from `cursor` on in parts of about `size` bytes of input, planned as they are wanted.

    Small files are joined. Larger ones are cut at multiples of `size`, Parquet between row groups; what is packed, or
    comes from a pipe, is one range. A long text is cut if it can be and unless `whole_texts`; the part before says
    whether it is good. Whatever the cursor, the parts behind the one that it is in are the same, but for their numbers.
    """
    first = cursor.source // TOGETHER * TOGETHER
    if cursor.source < len(shards) and shards[cursor.source].kind not in ("jsonl", "parquet"):
        cursor = Cursor(cursor.source)  # a text is read from its beginning
    number = 0
    for _, sources in groupby(range(first, len(shards)), lambda source: source // TOGETHER):
        planned = (
            each
            for source, groups in _with_groups(sources, shards)
            for each in _ranges(source, shards[source], groups, manner=manner, size=size, whole_texts=whole_texts)
        )
        for ranges in _joined(planned, size):
            left = tuple(_from(each, cursor, shards[each.source]) for each in ranges if not _before(each, cursor))
            if left:
                yield Part(number, left)
                number += 1


def slices_of(
    part: Part,
    shards: Sequence[InputShard] | Mapping[int, InputShard],
    manner: Manner,
    *,
    data: Buffer | None = None,
    used: Cursor | None = None,
) -> Iterator[Slice]:
    """What `slices` gives of the documents that begin in a part; of none where none begins.

    `shards` has those of its ranges, by number; `data` the bytes that `part.data` has. Raises ResumeRefused where a
    packed file is read again up to `used` and is another one.

    All bytes that decide a range are among what its slices have `seen`. Without a slice nothing tells that they are
    still the same, and looking again costs little.
    """
    if data is not None or part.fault:
        yield from unpacked_slices(part, shards[part.ranges[0].source], manner, data or b"")
        return
    over: set[int] = set()  # inputs that ended early
    for each, shard in at_hand((each, shards[each.source]) for each in part.ranges):
        if each.source in over:
            continue
        for piece in range_slices(each, shard, manner, used=used):
            if piece.fault and piece.after.source > each.source:
                over.add(each.source)
            yield piece


def _joined(ranges: Iterator[tuple[Range, float]], size: int) -> Iterator[list[Range]]:
    """Ranges, each with its bytes, in groups of at most `size` bytes or of one."""
    held: list[Range] = []
    total = 0.0
    for each, weight in ranges:
        if held and total + weight > size:
            yield held
            held, total = [], 0.0
        held.append(each)
        total += weight
    if held:
        yield held


def _before(each: Range, cursor: Cursor) -> bool:
    """Whether a range ends before the cursor; one that is only checked does not, nor does a text, read as a whole."""
    if each.source != cursor.source:
        return each.source < cursor.source
    return each.stop is not None and 0 < each.stop <= cursor.offset


def _from(each: Range, cursor: Cursor, shard: InputShard) -> Range:
    """What is left of a range behind the cursor."""
    if each.source != cursor.source or each.start >= cursor.offset:
        return each
    return Range(each.source, cursor.offset, each.stop)


def _with_groups(sources: Iterable[int], shards: Sequence[InputShard]) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """The numbers of input shards, each with the row groups of one that has such."""
    for some in growing(sources):
        groups = iter(of_each(group_sizes, [shards[source] for source in some if shards[source].kind == "parquet"]))
        for source in some:
            yield source, next(groups) if shards[source].kind == "parquet" else []


def _ranges(
    source: int,
    shard: InputShard,
    groups: list[tuple[int, int]],
    *,
    manner: Manner,
    size: int,
    whole_texts: bool,
) -> Iterator[tuple[Range, float]]:
    """The ranges of an input shard in order, with their bytes: those of input, roughly unpacked."""
    if shard.kind == "parquet":
        yield from _row_ranges(source, groups, size)
    elif not shard.seekable:
        yield Range(source), _ALONE if shard.uri == "-" else rough_size(shard)
    elif shard.kind == "jsonl":
        yield from _spans(source, _size(shard), size)
    else:
        yield from _text_ranges(source, shard, manner, size, whole_texts)


def _size(shard: InputShard) -> int:
    try:
        return shard.size()
    except OSError:
        return 0  # a fault when it is read


def _spans(source: int, total: int, size: int) -> Iterator[tuple[Range, float]]:
    """Ranges of bytes; the last one is open, as a file may have grown when it is read."""
    last = max(0, total - 1) // size * size
    for start in range(0, last, size):
        yield Range(source, start, start + size), _ALONE
    yield Range(source, last), _ALONE if last else total


def _text_ranges(
    source: int, shard: InputShard, manner: Manner, size: int, whole_texts: bool
) -> Iterator[tuple[Range, float]]:
    total, most = _size(shard), manner.limits.text
    too_long = most is not None and total > most
    if whole_texts or too_long or total <= texts.LONG_TEXT or not texts.can_cut(shard, manner.limits):
        yield Range(source), total
    else:
        yield Range(source, 0, 0), _ALONE
        yield from ((each, _ALONE) for each, _ in _spans(source, total, size))


def _row_ranges(source: int, groups: list[tuple[int, int]], size: int) -> Iterator[tuple[Range, float]]:
    """Row groups that follow one another, together up to `size`; the last range is open."""
    start = row = total = 0
    for rows, weight in groups[:-1]:
        row, total = row + rows, total + weight
        if total >= size:
            yield Range(source, start, row), _ALONE
            start, total = row, 0
    yield Range(source, start), _ALONE if start else total + (groups[-1][1] if groups else 0)
