"""A shard task becomes output shards: what a worker does that packs and writes."""

import time
from dataclasses import dataclass
from typing import NamedTuple

from millstream.folder.entries import RemainderEntry
from millstream.folder.shards import Shape
from millstream.records import TokenBatch
from millstream.runs.pack.counts import ShardTask, TaskPiece
from millstream.runs.pack.pieces import Pieces, batch_of
from millstream.runs.pack.subset import Sealed, Subset
from millstream.stream.line import Strategy


@dataclass(frozen=True)
class Form:
    """How a subset's documents become samples, and its samples shards."""

    shape: Shape
    strategy: Strategy


class Written(NamedTuple):
    """The output shards of a task, in order; of the final one the remainder too, as the manifest has it. All of it took
    so many `seconds`."""

    shards: list[Sealed]
    remainder: RemainderEntry | None
    seconds: float


@dataclass(frozen=True)
class WriteShards:
    """`WriteShards(...)(task)`: write and publish a task's output shards into `folder`; picklable.

    `forms` by subset; `remainder`, `pad_id` and `pad_side` are for the ids that fill no sample. Doing a task twice,
    even at once, writes the same bytes under the same names. Raises PieceLost where a piece is not what was put.
    """

    folder: str
    forms: dict[str, Form]
    pieces: Pieces
    remainder: str
    pad_id: int
    pad_side: str

    def __call__(self, task: ShardTask) -> Written:
        start, form = time.perf_counter(), self.forms[task.subset]
        subset = Subset(
            task.subset,
            self.folder,
            form.shape,
            form.strategy,
            state=task.state,
            first=task.first,
            count=task.count,
            final=task.final,
        )
        try:
            for piece in task.pieces:
                if subset.full:
                    break
                subset.add(self.batch(piece), piece.begin, piece.end, piece.next)
            if task.final:
                subset.finish(self.remainder, self.pad_id, self.pad_side)
            elif task.over and not subset.full:
                subset.flush()
        finally:
            subset.close()
        return Written(subset.sealed, subset.remainder, time.perf_counter() - start)

    def batch(self, piece: TaskPiece) -> TokenBatch:
        """A piece's documents, with their places in the run."""
        return batch_of(self.pieces.get(piece.ref), piece.before.ordinal, piece.start)
