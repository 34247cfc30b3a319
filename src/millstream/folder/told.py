"""What those who join one run tell one another: the counts of parts, the output shards that are written, and what they
unpack for all.

Each is a record, which is made once, by whoever comes first: whoever else does the same makes the same. They stay to
the end of the run, since whoever joins late counts from the beginning.
"""

import hashlib
import os
from typing import TypeVar

import msgspec

from millstream.corpus.unpacked import Unpacked
from millstream.errors import RunError
from millstream.folder.entries import InputEntry, RemainderEntry, ShardEntry
from millstream.folder.manifest import RECORDS
from millstream.records import Part
from millstream.store import Store

_ENDING = ".told"


class InputTold(msgspec.Struct, frozen=True, array_like=True):
    """Input shard `number`, as whoever read a part of it found it."""

    number: int
    entry: InputEntry


class ToldCounts(msgspec.Struct, frozen=True, kw_only=True):
    """The `counts` of some pieces of a part, `by` whoever tokenized it, which lie there; and its `inputs`."""

    by: str
    inputs: list[InputTold]
    counts: list[msgspec.Raw]


class ToldShards(msgspec.Struct, frozen=True, kw_only=True):
    """The output shards of a task, `by` whoever wrote them; the last one of a subset has its `remainder`."""

    by: str
    shards: list[ShardEntry]
    remainder: RemainderEntry | None = None


class ToldUnpacked(msgspec.Struct, frozen=True, kw_only=True):
    """What follows of a packed file, `by` whoever unpacked it; None behind its end. And the file, as it was `read`."""

    by: str
    read: InputTold
    found: Unpacked | None = None


T = TypeVar("T", ToldCounts, ToldShards, ToldUnpacked)


def part_label(part: Part) -> str:
    """The name of a part among those of one run, which all plan in the same way.

    >>> from millstream.records import Range
    >>> part_label(Part(3, (Range(0, 1024, 2048),))), part_label(Part(4, (Range(0, 2048), Range(1)), limit=7))
    ('part-0-1024-2048', 'part-0-2048-end-7')
    """
    first = part.ranges[0]
    end = "end" if first.stop is None else first.stop
    limit = "" if part.limit is None else f"-{part.limit}"
    return f"part-{first.source}-{first.start}-{end}{limit}"


def tell(store: Store, name: str, record: ToldCounts | ToldShards | ToldUnpacked) -> None:
    """Make a record, unless it is there."""
    data = msgspec.msgpack.encode(record)
    data = hashlib.sha256(data).digest() + data
    # Where a disk has no links, a file is empty for a moment; and for ever, if its maker was killed in it.
    if not store.create(_file(name), data) and not _read(store, name):
        store.put(_file(name), data)


def told(store: Store, name: str, type: type[T]) -> T | None:
    """A record, or None if it is not there. Raises RunError if it is damaged."""
    data = _read(store, name)
    if not data:
        return None
    try:
        if hashlib.sha256(data[32:]).digest() != data[:32]:
            raise msgspec.DecodeError("its own SHA-256 does not fit its content")
        return msgspec.msgpack.decode(data[32:], type=type)
    except msgspec.MsgspecError as error:
        path = os.path.join(store.url, _file(name))
        raise RunError(f"{path} is damaged: {error}; delete it, and it is made again") from None


def _read(store: Store, name: str) -> bytes:
    try:
        return store.read(_file(name))
    except (FileNotFoundError, NotADirectoryError):
        return b""


def _file(name: str) -> str:
    return f"{RECORDS}/{name}{_ENDING}"
