"""What an unfinished run keeps of itself: `run.json`, and in `records/` a file for each output shard that is sealed and
for each part of the input that is tokenized.

None of them is ever changed. What has no record does not exist, and is deleted by the next call that goes on; once the
manifest is there, the records count no more.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple, TypeVar

import msgspec

from millstream.corpus.objects import side_by_side
from millstream.errors import RequestError, RunError, setting
from millstream.folder.entries import FileEntry, Identity, InputEntry, RemainderEntry, ShardEntry
from millstream.folder.journal import FileState
from millstream.folder.manifest import FORMAT, RECORDS, RUN, read_sealed, sealed
from millstream.records import Cursor, Range
from millstream.store import Store, is_far

VERSION = 1
"""Of the records' form: a folder is gone on with in its own only."""

_PART = ".part"
_INPUTS = f"{RECORDS}/inputs-"
_T = TypeVar("_T")


def this_version() -> str:
    """What records say of who made them."""
    return version("millstream")


@dataclass(frozen=True)
class Mark:
    """The state of the reading side before a unit: what a resumed run goes on with.

    `ordinal`: documents read so far; `line`: of the input shard at `cursor`; `text_ids`, `special_ids`: as in the
    ledger; `fault_bytes`: how long faults.jsonl is; `bytes`: of input; `learned`: ids that are to be learned, and
    `learned_cut_off`, those of them that documents longer than a sample do not keep.
    """

    cursor: Cursor = field(default_factory=Cursor)
    ordinal: int = 0
    line: int = 0
    text_ids: int = 0
    special_ids: int = 0
    fault_bytes: int = 0
    faults: dict[str, int] = field(default_factory=dict)
    bytes: int = 0
    learned: int = 0
    learned_cut_off: int = 0

    def plus(self, more: "Mark") -> "Mark":
        """The mark behind what adds `more` to this one; `more.cursor` is where reading goes on, unless it is there now:
        a part within a line that an earlier one has read ends before that does.

        >>> more = Mark(Cursor(0, 50), ordinal=2, line=3, text_ids=40, faults={"empty": 1}, bytes=50)
        >>> there = Mark(Cursor(), ordinal=1, line=1, faults={"empty": 1}).plus(more)
        >>> there.cursor.offset, there.ordinal, there.line, there.text_ids, there.faults
        (50, 3, 4, 40, {'empty': 2})
        >>> there.plus(Mark(Cursor(1), line=1)).line  # of another input shard
        1
        >>> there.plus(Mark(Cursor(0, 20))).cursor.offset
        50
        """
        return Mark(
            cursor=max(more.cursor, self.cursor, key=lambda cursor: cursor[:2]),
            ordinal=self.ordinal + more.ordinal,
            line=more.line + (self.line if more.cursor.source == self.cursor.source else 0),
            text_ids=self.text_ids + more.text_ids,
            special_ids=self.special_ids + more.special_ids,
            fault_bytes=self.fault_bytes + more.fault_bytes,
            faults=dict(sorted((Counter(self.faults) + Counter(more.faults)).items())),
            bytes=self.bytes + more.bytes,
            learned=self.learned + more.learned,
            learned_cut_off=self.learned_cut_off + more.learned_cut_off,
        )


class Resume(msgspec.Struct, frozen=True):
    """Where packing goes on: reading from `mark` on, documents from number `ordinal` on are fed again, the first of
    them without its first `used` ids.

    The packer has handed out `samples` samples before that, and had `rows` documents of the shuffle's window; `drop`
    samples of what follows were written already.
    """

    mark: Mark = msgspec.field(default_factory=Mark)
    ordinal: int = 0
    used: int = 0
    samples: int = 0
    drop: int = 0
    rows: int = 0

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Resume":
        """Of the state that a packer gave (`stream.pack.continued`)."""
        return cls(**state)

    @property
    def state(self) -> dict[str, Any]:
        """As packers take it."""
        return {name: getattr(self, name) for name in self.__struct_fields__}


class Joint(msgspec.Struct, frozen=True):
    """How those do it who join one run: bytes of a `part`, a `piece` and a `block`. `token`: a name that no other run
    has. `unpack`: whether large packed files are unpacked by one of them for all."""

    part: int
    piece: int
    block: int
    token: str
    unpack: bool = False


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """`run.json`: what was asked for. `inputs` by name and kind, as the first call found them; those of a run that is
    joined, with their sizes."""

    format: str = FORMAT
    v: int = VERSION
    millstream: str
    settings: Identity
    inputs: list[InputEntry]
    joint: Joint | None = None


class ShardRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A sealed output shard: its `entry` for the manifest; the states before its first sample and behind its last.

    When it was sealed, the inputs had been read to `read`. The last shard of a subset has its `remainder`.
    """

    format: str = FORMAT
    v: int = VERSION
    subset: str
    entry: ShardEntry
    begin: Resume
    end: Resume
    read: Cursor
    remainder: RemainderEntry | None = None

    @property
    def files(self) -> list[FileEntry]:
        return [*self.entry.files, *(self.remainder or ())]


class InputsRecord(msgspec.Struct, frozen=True, kw_only=True):
    """What was found of `inputs` while they were read, the first of them number `first`; of the last one, which is read
    now, only its name. Later records are right where two differ: behind where a run goes on, inputs may change."""

    format: str = FORMAT
    v: int = VERSION
    first: int
    inputs: list[InputEntry]


class PartInput(NamedTuple):
    """Input shard `number`, which a part has a range of, and the state of its file before the part was read."""

    number: int
    name: str
    kind: str
    file: FileState


class PartRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the input that is tokenized: `counts` of its pieces, as they came; its `inputs`, one for each range.

    `made_by`: millstream's version, and the sizes of blocks and pieces: others would not make the same pieces of it.
    """

    v: int = VERSION
    made_by: tuple[str, int, int]
    ranges: tuple[Range, ...]
    inputs: list[PartInput]
    counts: list[msgspec.Raw]

    @property
    def name(self) -> str:
        return part_name(self.ranges)


def part_name(ranges: Sequence[Range]) -> str:
    """The name of the record of a part: its ranges say which it is, however many parts came before."""
    return hashlib.sha256(msgspec.msgpack.encode(ranges)).hexdigest()[:32] + _PART


# Writing


def begin_run(store: Store, run: RunRecord) -> bool:
    """Write `run.json`, with which the folder is this run's; False if it was there."""
    return store.create(RUN, sealed(msgspec.to_builtins(run)))


def record_shard(store: Store, record: ShardRecord) -> None:
    """Write the record of a shard; its files, what was used of the inputs and the faults before it are durable.

    A shard that is sealed once more (workers may do one twice) has the same bytes, and keeps its first record.
    """
    store.create(_shard(record), sealed(msgspec.to_builtins(record)))


def record_inputs(store: Store, number: int, record: InputsRecord) -> None:
    """Write record number `number` of the inputs, before those of the shards that were made of them."""
    store.put(f"{_INPUTS}{number:05d}.json", sealed(msgspec.to_builtins(record)))


def record_part(store: Store, record: PartRecord) -> None:
    """Write the record of a part; its pieces are there. In place of an earlier one, which no longer fits its inputs."""
    data = msgspec.msgpack.encode(record)
    with store.write(f"{RECORDS}/{record.name}", brief=True) as file:
        file.write(hashlib.sha256(data).digest() + data)


# Reading


def read_run(store: Store) -> RunRecord | None:
    """`run.json`, or None if there is none. Raises RequestError if it is none of ours or of another form, RunError if
    it is damaged."""
    told = read_sealed(store, RUN)
    if told is None:
        return None
    if (told["format"], told.get("v")) != (FORMAT, VERSION):
        by = told.get("millstream", "another version")
        raise RequestError(
            f"{store.url} was begun by millstream {by}, and this version cannot go on with it: finish it with that "
            f"one, or pack it anew with {setting('overwrite', True)}"
        )
    return _converted(store, RUN, told, RunRecord)


def read_shards(store: Store) -> list[ShardRecord]:
    """The records of all sealed shards. Raises RunError for a damaged one."""
    names = [name for name in store.list(RECORDS) if name.endswith(".json") and not name.startswith(_INPUTS)]
    return _read_all(store, names, ShardRecord)


def read_inputs(store: Store) -> list[InputsRecord]:
    """The records of the inputs, in the order in which they were written. Raises RunError for a damaged one."""
    return _read_all(store, [name for name in store.list(RECORDS) if name.startswith(_INPUTS)], InputsRecord)


def read_parts(store: Store) -> Iterator[tuple[str, PartRecord | None]]:
    """(the name, the record, or None if it cannot be used) of all parts that have one."""
    for name in store.list(RECORDS):
        if name.endswith(_PART):
            yield name.removeprefix(f"{RECORDS}/"), _part(store.read(name))


def _part(data: bytes) -> PartRecord | None:
    if hashlib.sha256(data[32:]).digest() != data[:32]:  # parts are not durable: they can be made again
        return None
    try:
        found = msgspec.msgpack.decode(data[32:], type=PartRecord)
    except msgspec.MsgspecError:
        return None
    return found if found.v == VERSION else None


def _shard(record: ShardRecord) -> str:
    return f"{RECORDS}/{record.subset}-{record.entry.number:05d}.json"


def _read_all(store: Store, names: list[str], type: type[_T]) -> list[_T]:
    each = partial(_read, store, type=type)
    return side_by_side(each, names) if is_far(store.url) else list(map(each, names))


def _read(store: Store, name: str, type: type[_T]) -> _T:
    return _converted(store, name, read_sealed(store, name), type)


def _converted(store: Store, name: str, told: dict[str, Any] | None, type: type[_T]) -> _T:
    try:
        return msgspec.convert(told, type)
    except msgspec.ValidationError as error:
        path = os.path.join(store.url, name)
        raise RunError(f"{path} is damaged: {error}; {setting('overwrite', True)} starts anew") from None


# Deleting


def forget_shard(store: Store, record: ShardRecord) -> None:
    """Delete a shard's record, and then its files."""
    store.delete(_shard(record))
    for file in record.files:
        store.delete(file.name)


def forget_part(store: Store, name: str) -> None:
    """Delete the record of a part."""
    store.delete(f"{RECORDS}/{name}")


def forget_parts(store: Store) -> None:
    """Delete those of all parts."""
    for name in store.list(RECORDS):
        if name.endswith(_PART):
            store.delete(name)


def sweep_records(store: Store) -> None:
    """Delete what a crash left half written among the records."""
    if store.exists(RECORDS):
        store.below(RECORDS).sweep()


def delete_records(store: Store, *, and_run: bool = True) -> None:
    """Delete all records, and `run.json` after them."""
    store.delete(RECORDS)
    if and_run:
        store.delete(RUN)


# What they come to


@dataclass(frozen=True)
class SealedShards:
    """The output shards of a subset that an unfinished run has sealed: `records` from number 0 on without a gap.

    `later` are those behind a gap, or with the remainder, which only a run that writes shards in any order can use.
    """

    records: list[ShardRecord] = field(default_factory=list)
    later: list[ShardRecord] = field(default_factory=list)

    @property
    def entries(self) -> list[ShardEntry]:
        return [record.entry for record in self.records]

    @property
    def resume(self) -> Resume:
        """Where the first shard begins that is not sealed."""
        return self.records[-1].end if self.records else Resume()

    @property
    def all(self) -> list[ShardRecord]:
        return [*self.records, *self.later]

    @property
    def stretches(self) -> list[tuple[Mark, Mark]]:
        """Between which marks all that is read went into `later` shards."""
        found: list[tuple[Mark, Mark]] = []
        before = -1
        for record in self.later:
            begin = found.pop()[0] if record.entry.number == before + 1 and found else record.begin.mark
            found.append((begin, record.end.mark))
            before = record.entry.number
        return found


def sealed_shards(records: Iterable[ShardRecord]) -> dict[str, SealedShards]:
    """By subset.

    >>> [one, two] = [SealedShards(), SealedShards()]
    >>> sealed_shards([])
    {}
    """
    found: dict[str, SealedShards] = {}
    for record in sorted(records, key=lambda record: record.entry.number):
        here = found.setdefault(record.subset, SealedShards())
        follows = record.entry.number == len(here.records) and not record.remainder and not here.later
        (here.records if follows else here.later).append(record)
    return found
