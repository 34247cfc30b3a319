"""What reading an input shard holds at once, besides documents: the window of zstd, the pages of Parquet."""

import contextlib
from collections.abc import Iterable
from itertools import islice
from typing import BinaryIO, NamedTuple

from millstream.corpus.footer import Leaf, leaves_by_group
from millstream.corpus.objects import of_each
from millstream.corpus.pages import page_sizes
from millstream.corpus.parquet import DECODED, footer_of
from millstream.corpus.sources import InputShard, zstd_window
from millstream.errors import RequestError, sized

_COUNTED_WINDOW = 8 << 20  # a smaller one is within what a process was measured to need
_LOOKED_AT = 64
"""Large row groups whose pages are looked at, spread over all files: those of a corpus are alike."""
_FAR_LOOKED_AT, _FAR_PAGES = 4, 8
"""Of files far away fewer, and fewer of their pages, as each is a request."""
_COPIES = 2  # of a page, measured


class _Held(NamedTuple):
    """Bytes held at once by reading a shard, and why."""

    size: int
    shard: InputShard
    why: str
    instead: str


def unpacking_memory(shards: Iterable[InputShard], columns: Iterable[str], memory: int) -> int:
    """Bytes that unpacking needs beyond the usual, of the `memory` that there is; of Parquet, `columns` are read.

    Raises RequestError if it is more than half of it.
    """
    shards = list(shards)
    held = [*_windows(shards), *_pages([shard for shard in shards if shard.kind == "parquet"], list(columns))]
    most = max(held, default=None, key=lambda each: each.size)
    if most is None:
        return 0
    if most.size > memory // 2:
        raise RequestError(
            f"{most.shard.called} {most.why}, and there is {sized('memory', memory)}: "
            f"give {sized('memory', -(-2 * most.size >> 20) << 20)}, or {most.instead}"
        )
    return most.size


def _windows(shards: list[InputShard]) -> Iterable[_Held]:
    packed = [shard for shard in shards if shard.packed == "zstd"]
    for shard, window in zip(packed, of_each(_window, packed), strict=True):
        if window > _COUNTED_WINDOW:
            why = f"was packed with a window of {window >> 20:,} MiB, which is held while it is read"
            yield _Held(window, shard, why, "pack it again without zstd's --long")


def _window(shard: InputShard) -> int:
    with contextlib.suppress(OSError), shard.open(0) as file:
        return zstd_window(file)
    return 0


def _pages(shards: list[InputShard], columns: list[str]) -> Iterable[_Held]:
    """The largest pages of each file that is looked at, where they are larger than what is decoded of it at once."""
    import pyarrow as pa

    looked_at, pages = (_FAR_LOOKED_AT, _FAR_PAGES) if any(shard.far for shard in shards) else (_LOOKED_AT, None)
    for shard in shards[:: max(1, len(shards) // looked_at)]:
        try:
            footer = footer_of(shard)
            groups = range(0, footer.num_row_groups, max(1, footer.num_row_groups * len(shards) // looked_at))
            large = [group for group in groups if footer.row_group(group).total_byte_size > DECODED]
            leaves = leaves_by_group(shard, footer, columns) if large else []
            with shard.open() as file:
                largest = max((_page_of_each(file, leaves[group], pages) for group in large), default=0)
        except (OSError, pa.ArrowException, UnicodeDecodeError):
            continue  # a fault when it is read
        if largest > DECODED:
            why = f"stores {largest >> 20:,} MiB in one page, which is unpacked as a whole"
            yield _Held(_COPIES * largest, shard, why, "write it again with smaller pages (fewer rows at a time)")


def _page_of_each(file: BinaryIO, leaves: list[Leaf], most: int | None) -> int:
    """Bytes of the largest of the first `most` pages of each large column of a row group, together. Raises OSError."""
    large = [leaf for leaf in leaves if leaf.unpacked > DECODED]
    return sum(max(islice(page_sizes(file, leaf), most), default=0) for leaf in large)
