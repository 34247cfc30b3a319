"""An export as tasks: one a shard, or one that appends shards to the one file; then one for the index."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from millstream.errors import LedgerError
from millstream.exports.format import Format, Wrote
from millstream.exports.out import Out, Place
from millstream.folder.samples import Samples, ShardSamples
from millstream.records import Ids
from millstream.store import Store


@dataclass(frozen=True)
class Export:
    """What one format was given and what became of it, in ids; `files` are named from the folder it is in.

    `ids` = `written` + `left_out`; `padding` are those that are none, `left_out` the kept remainder.
    """

    format: str
    ids: int
    written: int
    left_out: int
    padding: int
    files: list[dict[str, Any]]


class Task(Protocol):
    """Something to do for an export, anywhere: it can be pickled, and done a second time it gives the same files."""

    @property
    def words(self) -> str:
        """What it is."""
        ...

    def do(self) -> Wrote: ...


def do(task: Task) -> Wrote:
    """What an engine is given to do."""
    return task.do()


def named(task: Task) -> str:
    """What an engine calls it."""
    return task.words


@dataclass(frozen=True)
class WriteShard:
    """The files of one shard."""

    format: Format
    place: Place
    shard: ShardSamples

    @property
    def words(self) -> str:
        return f"shard {self.shard.number} of {self.place.name}"

    def do(self) -> Wrote:
        assert self.format.shard
        out = Out(self.place)
        ids = self.format.shard(self.shard, out)
        return Wrote(len(self.shard), ids, out.files)


@dataclass(frozen=True)
class Append:
    """The next shards in a subset's one file, which has `size` bytes; `last` if nothing comes behind them."""

    format: Format
    place: Place
    shards: tuple[ShardSamples, ...]
    size: int
    last: bool

    @property
    def words(self) -> str:
        return f"shards {self.shards[0].number} to {self.shards[-1].number} of {self.place.name}"

    def do(self) -> Wrote:
        assert self.format.file
        out, name, ids, size = Out(self.place), self.format.file(self.shards[0].samples), 0, self.size
        whole = self.last and not size  # written at once, it is hashed on the way
        with out.create(name) if whole else out.go_on(name, size) as file:
            for block in self._blocks():
                data = block.tobytes()
                file.write(data)
                ids, size = ids + block.size, size + len(data)
        if self.last and not whole:
            out.finish(name, size)
        return Wrote(sum(map(len, self.shards)), ids, out.files, size)

    def _blocks(self) -> Iterator[Ids]:
        assert self.format.append
        for shard in self.shards:
            yield from self.format.append(shard)


@dataclass(frozen=True)
class WriteIndex:
    """What stands beside the shards of a subset, or in front of them."""

    format: Format
    place: Place
    samples: Samples
    wrote: list[Wrote]

    @property
    def words(self) -> str:
        return f"the index of {self.place.name}"

    def do(self) -> Wrote:
        assert self.format.index
        out = Out(self.place)
        self.format.index(self.samples, self.wrote, out)
        return Wrote(files=out.files)


class _Subset:
    """The tasks of one subset: which are out, and what came of those that are done, by their number."""

    def __init__(self, format: Format, place: Place) -> None:
        self.format, self.place = format, place
        self.samples: Samples | None = None
        self.over = False
        self.wrote: dict[int, Wrote] = {}
        self.index: Wrote | None = None
        self._seen = 0  # output shards
        self._numbers = 0
        self._held: ShardSamples | None = None  # perhaps the last one, which is to have the remainder
        self._ready: deque[ShardSamples] = deque()
        self._size = 0  # of the one file
        self._out = 0
        self._index_is_out = False

    def add(self, samples: Samples, over: bool) -> None:
        for shard in samples.sealed(self._seen, self._numbers):
            self._numbers += 1
            self._hold(shard)
        self._seen, self.samples, self.over = samples.output_shards, samples, over
        if over and (self._held is not None or (samples.kept and self.format.flat)):
            self._held = samples.with_rest(self._held)
            self._hold(None)

    def _hold(self, shard: ShardSamples | None) -> None:
        if self._held is not None:
            self._ready.append(self._held)
        self._held = shard

    def tasks(self) -> Iterator[tuple[int, Task]]:
        """What can be done now, numbered by the shard with which it begins; the index comes last."""
        if self.format.append:
            yield from self._append()
        while self._ready and not self.format.append:
            shard = self._ready.popleft()
            self._out += 1
            yield shard.number, WriteShard(self.format, self.place, shard)
        if self.format.index and self.wrote and self._all_written and not self._index_is_out:
            assert self.samples is not None
            self._index_is_out = True
            yield self._numbers, WriteIndex(self.format, self.place, self.samples.alone(), self._in_order())

    def _append(self) -> Iterator[tuple[int, Task]]:
        if self._ready and not self._out:
            shards = tuple(self._ready)
            self._ready.clear()
            self._out += 1
            yield shards[0].number, Append(self.format, self.place, shards, self._size, self.over)

    def took(self, number: int, wrote: Wrote) -> None:
        if self._index_is_out:
            self.index = wrote
        else:
            self._out -= 1
            self._size = wrote.size
            self.wrote[number] = wrote

    @property
    def _all_written(self) -> bool:
        return self.over and not self._out and not self._ready

    @property
    def done(self) -> bool:
        return self._all_written and (self.index is not None or not (self.format.index and self.wrote))

    def _in_order(self) -> list[Wrote]:
        return [self.wrote[number] for number in sorted(self.wrote)]

    def files(self) -> list[dict[str, Any]]:
        last = [self.index] if self.index else []
        return [file for wrote in [*self._in_order(), *last] for file in wrote.files]


Number = tuple[str, int]
"""Of a task: its subset and its place in it."""


class Exporting:
    """The export `name` of a run with these subsets on its way into `store`, for the caller to publish.

    `add` what is sealed, do the `tasks` in any order and anywhere, tell each with `took`, until it is `done`.
    """

    def __init__(self, name: str, format: Format, store: Store, subsets: Sequence[str]) -> None:
        self.name, self.place = name, Place(store, name)
        self._subsets = {subset: _Subset(format, self.place) for subset in subsets}
        self._flat = format.flat
        self.place.begin()

    def add(self, samples: Samples, *, over: bool) -> None:
        """The samples of a subset as far as they are sealed, those added before too; all of them if `over`."""
        self._subsets[samples.subset].add(samples, over)

    def tasks(self) -> Iterator[tuple[Number, Task]]:
        """What can be done now and was not handed out before."""
        for subset, part in self._subsets.items():
            for number, task in part.tasks():
                yield (subset, number), task

    def took(self, number: Number, wrote: Wrote) -> None:
        """A task has been done."""
        subset, its = number
        self._subsets[subset].took(its, wrote)

    @property
    def done(self) -> bool:
        return all(part.done for part in self._subsets.values())

    def export(self) -> Export:
        """What it is, once it is `done`. Raises LedgerError if not every id is written or left out with the
        remainder."""
        subsets = [part.samples for part in self._subsets.values() if part.samples is not None]
        written = sum(wrote.ids for part in self._subsets.values() for wrote in part.wrote.values())
        left_out = 0 if self._flat else sum(samples.kept for samples in subsets)
        ids = sum(samples.ids for samples in subsets)
        if ids != written + left_out:
            raise LedgerError(f"{self.name}: {ids:,} ids came in, {written:,} were written and {left_out:,} left out")
        files = [file for part in self._subsets.values() for file in part.files()]
        return Export(self.name, ids, written, left_out, sum(samples.padding for samples in subsets), files)
