"""What the readers of all kinds of input share: how slices are made, and pieces of bytes joined."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from millstream.corpus.limits import Manner
from millstream.corpus.seen import Watch
from millstream.corpus.sources import InputShard
from millstream.errors import Unusable
from millstream.records import Cursor, Slice

DocumentFault = tuple[str, str]


@dataclass(frozen=True)
class Reader:
    """Input shard number `source` while it is read; `watch` follows."""

    source: int
    shard: InputShard
    manner: Manner
    watch: Watch

    def slice(
        self,
        start: int,
        stop: int,
        data: Any = b"",
        *,
        begins: bool = True,
        ends: bool = True,
        fault: DocumentFault | None = None,
        over: bool = False,
    ) -> Slice:
        """What lies from `start` to `stop` of the shard, with all that was read by now. `over`: nothing follows."""
        shard, rows = self.shard, self.shard.kind == "parquet"
        seen = self.watch.seen
        prefix = seen.sha256 if seen and not seen.start and (rows or not shard.seekable) else None
        return Slice(
            source=self.source,
            uri=shard.uri,
            name=shard.name,
            kind="rows" if rows else shard.kind,
            start=start,
            stop=stop,
            data=data,
            begins=begins,
            ends=ends,
            fault=fault,
            after=Cursor(self.source + 1) if over else Cursor(self.source, stop, prefix),
            seen=seen,
        )


def regroup(pieces: Iterator[bytes], size: int) -> Iterator[bytes]:
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
