"""A place in a corpus, and whether what lies before it is still what was read.

A place has the number of an input and where in it to go on, and of what lies before so much that a change is seen: the
inputs before by name, kind and size, in few sums however many they are; of the input itself the last bytes
before the place, of one that cannot be sought all of them, of Parquet its row groups. What lies behind may change.
"""

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, NamedTuple

from millstream.corpus.parquet import group_sizes
from millstream.corpus.sources import InputShard
from millstream.errors import DataError, ResumeRefused
from millstream.records import Slice
from millstream.streams.base import At

TAIL = 64 << 10
"""Bytes before a place that are compared; of a line more or less before it nothing stays where it was."""
_SUMS = 16
_END = 64
"""Last bytes of packed inputs before that are compared: of gzip they have a sum of all that it holds. What is far away
has a name for its content instead."""


@dataclass(frozen=True)
class Behind:
    """What has been read of one input of lines: bytes, lines, the last bytes; of one that cannot be sought, a hash."""

    offset: int = 0
    line: int = 0
    tail: bytes = b""
    hash: Any = None

    def then(self, piece: Slice, size: int, lines: int | None = None) -> "Behind":
        """After the first `size` bytes of a piece, which has none of them if they are a line that was too long; `lines`
        of them, if that is known."""
        data = memoryview(piece.data or b"")[:size]
        tail = bytes(data[-TAIL:])
        if len(data) == size and size < TAIL:
            tail = (self.tail + tail)[-TAIL:]
        digest = self.hash and self.hash.copy()
        if digest:
            digest.update(data or str(size).encode())
        if lines is None:
            lines = bytes(data).count(b"\n") if data else 1
        return Behind(self.offset + size, self.line + lines, tail, digest)

    @property
    def told_hash(self) -> str:
        return str(self.hash.hexdigest())


class Awaited(NamedTuple):
    """What an input that cannot be sought has to have been up to a byte."""

    source: int
    offset: int
    hash: str


def begun(shard: InputShard) -> Behind:
    """Nothing of an input."""
    return Behind(hash=None if shard.seekable else hashlib.blake2b(digest_size=16))


def _short(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()


@dataclass
class InputPlaces:
    """The inputs of a stream, and sums of those that were read to their ends.

    `awaited`: what can only be compared when it is read again.
    """

    shards: Sequence[InputShard]
    awaited: list[Awaited] = field(default_factory=list)
    _sums: list[int] = field(default_factory=list)
    _groups: dict[int, list[tuple[int, int]]] = field(default_factory=dict)

    def read_to(self, source: int) -> None:
        """The inputs before this one are as they were just read."""
        while len(self._sums) < source:
            self._sums.append(_sum_of(self.shards[len(self._sums)], len(self._sums)))

    def place(self, source: int, **within: At) -> At:
        """That of input number `source`, and `within` it; 'name' is that of the last input that was read of."""
        last = source if within else source - 1
        return {"input": source, "name": self.shards[last].name, "before": self._before(source), **within}

    def in_lines(self, source: int, behind: Behind) -> At:
        if behind.hash:
            return self.place(source, offset=behind.offset, line=behind.line, hash=behind.told_hash)
        tail = [len(behind.tail), _short(behind.tail)]
        return self.place(source, offset=behind.offset, line=behind.line, tail=tail)

    def in_rows(self, source: int, row: int) -> At:
        return self.place(source, offset=row, groups=self._rows_before(source, row))

    def _before(self, source: int) -> str:
        """Sums of the inputs before, a number of them each."""
        step = _step(source)
        groups = (sum(self._sums[low : min(low + step, source)]) for low in range(0, source, step))
        return "".join(f"{group % (1 << 32):08x}" for group in groups)

    def _rows_before(self, source: int, row: int) -> str:
        """Of the row groups of a Parquet file up to the one that has the row before."""
        if source not in self._groups:
            self._groups[source] = group_sizes(self.shards[source])
        groups = self._groups[source]
        ends = list(accumulate(rows for rows, _ in groups))
        upto = sum(end < row for end in ends) + 1
        return _short(repr(groups[:upto]).encode())

    # Whether it is the same

    def check(self, at: At) -> None:
        """Raises ResumeRefused, with a name, if what lies before a place has changed."""
        source, offset = at["input"], at.get("offset", 0)
        last = source if offset else source - 1
        told = f"input {last + 1:,} was {at['name']}"
        if last >= len(self.shards):
            raise ResumeRefused(f"{told}, and there are {len(self.shards):,} now: {SAME}")
        if self.shards[last].name != at["name"]:
            raise ResumeRefused(f"{told}, and is {self.shards[last].name} now: {SAME}")
        self._sums.clear()
        self.read_to(source)
        self._check_before(source, at["before"])
        shard = self.shards[source] if offset else None
        if "hash" in at:
            self.awaited.append(Awaited(source, offset, at["hash"]))
        try:
            if shard and "tail" in at:
                _check_tail(shard, offset, *at["tail"])
            elif shard and "groups" in at and self._rows_before(source, offset) != at["groups"]:
                raise ResumeRefused(f"{shard.called} has changed before row {offset:,}: {SAME}")
        except OSError as error:
            raise DataError(f"{at['name']} cannot be read: {error.strerror or error}") from error

    def _check_before(self, source: int, before: str) -> None:
        now, step = self._before(source), _step(source)
        for number, low in enumerate(range(0, source, step)):
            if now[8 * number : 8 * number + 8] != before[8 * number : 8 * number + 8]:
                names = [shard.called for shard in self.shards[low : min(low + step, source)]]
                which = names[0] if len(names) == 1 else f"one of {names[0]} to {names[-1]}"
                raise ResumeRefused(f"{which} has changed, or its place among the inputs: {SAME}")


SAME = "what comes before the place of a state has to stay as it was"


def _step(source: int) -> int:
    """How many inputs are summed up together: a power of two, so that there are few sums."""
    step = 1
    while source > _SUMS * step:
        step *= 2
    return step


def _sum_of(shard: InputShard, number: int) -> int:
    size, end = 0, 0 if shard.far else b""
    with contextlib.suppress(OSError):
        if shard.uri != "-":
            size = shard.size()
            if shard.far:
                end = shard.state().identity[1]
            elif shard.packed:
                end = tail_of(shard, size, min(size, _END))
    told = repr((number, shard.name, shard.kind, size, end)).encode()
    return int.from_bytes(hashlib.blake2b(told, digest_size=4).digest(), "little")


def _check_tail(shard: InputShard, offset: int, count: int, digest: str) -> None:
    data = tail_of(shard, offset, count)
    if len(data) < count:
        raise ResumeRefused(f"{shard.called} was read to byte {offset:,} and is shorter now: {SAME}")
    if _short(data) != digest:
        raise ResumeRefused(f"{shard.called} has changed before byte {offset:,}: {SAME}")


def tail_of(shard: InputShard, offset: int, count: int) -> bytes:
    """The last bytes before a place. Raises OSError."""
    with shard.open(until=offset) as file:
        file.seek(offset - count)
        return file.read(count)
