"""How far a cursor is into a corpus, as a share of its bytes on disk: those are known of packed files, too."""

import contextlib
import itertools

from millstream.corpus.parquet import footer_of
from millstream.corpus.sources import READ, InputShard
from millstream.corpus.stretches import expansion, told_size
from millstream.records import Cursor


class Extent:
    """The sizes on disk of input shards; ``extent.share(cursor)`` is None where standard input is among them."""

    def __init__(self, shards: list[InputShard]) -> None:
        self._shards = shards
        self._sizes = [_on_disk(shard) for shard in shards]
        self._before = [0, *itertools.accumulate(self._sizes)]
        self._total = 0 if any(shard.uri == "-" for shard in shards) else self._before[-1]
        self._length = (-1, 1.0)  # number of an input shard, and where a cursor is at its end

    def share(self, cursor: Cursor) -> float | None:
        """From 0 to 1. Within a packed file it is a guess, unless the file tells its unpacked size."""
        if not self._total:
            return None
        done = self._before[min(cursor.source, len(self._shards))]
        if cursor.offset and cursor.source < len(self._shards):
            done += round(self._sizes[cursor.source] * min(1.0, cursor.offset / self._end(cursor.source)))
        return done / self._total

    def _end(self, source: int) -> float:
        if self._length[0] != source:
            self._length = source, max(1.0, _end(self._shards[source], self._sizes[source]))
        return self._length[1]


def _on_disk(shard: InputShard) -> int:
    with contextlib.suppress(OSError):
        return 0 if shard.uri == "-" else shard.size()
    return 0


def _end(shard: InputShard, size: int) -> float:
    """Where a cursor is at the end of an input shard: its rows, or its bytes unpacked."""
    if shard.kind == "parquet":
        import pyarrow as pa

        with contextlib.suppress(OSError, pa.ArrowException):
            return float(footer_of(shard).num_rows)
        return 0.0
    with contextlib.suppress(OSError):
        return told_size(shard) or size * (expansion(shard, READ) if shard.packed else 1)
    return size
