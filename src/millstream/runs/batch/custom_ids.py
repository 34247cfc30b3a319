"""Which line has which custom_id: 16 bytes of hash and a number for each."""

import hashlib
from array import array
from collections.abc import Sequence

import numpy as np

from millstream.corpus.sources import InputShard
from millstream.errors import DataError, RequestError
from millstream.records import Ids

UNKNOWN = -1


class CustomIds:
    """custom_ids in order, by hash; after `sort`, `find` tells the numbers of many at once.

    >>> ids, shard = CustomIds(), InputShard("a.jsonl", "a.jsonl", "jsonl")
    >>> for line, custom_id in enumerate("xyz", 1):
    ...     ids.add(custom_id, shard, line)
    >>> ids.sort()
    >>> ids.find(["z", "w", "x"]).tolist()
    [2, -1, 0]
    """

    def __init__(self) -> None:
        self._hashes = bytearray()
        self._lines = array("Q")
        self._shards: list[tuple[int, InputShard]] = []  # with the number of the first custom_id in each

    def __len__(self) -> int:
        return len(self._lines)

    def add(self, custom_id: str, shard: InputShard, line: int) -> None:
        if not self._shards or self._shards[-1][1] is not shard:
            self._shards.append((len(self), shard))
        self._hashes += _hash(custom_id)
        self._lines.append(line)

    def sort(self) -> None:
        """Call it once, before `find`. Raises DataError if a custom_id came twice, RequestError if none came."""
        # Compared as text of 16 bytes: zeros at the end count for nothing, and all are of one length.
        hashes = np.frombuffer(self._hashes, "S16")
        self._order = np.argsort(hashes, kind="stable")
        self._sorted = hashes[self._order]
        self._hashes = bytearray()
        if not len(self._order):
            raise RequestError("there are no requests: the input is empty")
        twice = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if len(twice):
            first = twice[np.argmin(self._order[twice + 1])]
            before, again = (self._place(int(number)) for number in self._order[first : first + 2])
            raise DataError(f"{again}: the same custom_id as {before}; each must be unique")

    def find(self, custom_ids: Sequence[str]) -> Ids:
        """i64 (n,): the number of each custom_id in order of adding, -1 where it was not added."""
        hashes = np.frombuffer(b"".join(map(_hash, custom_ids)), "S16")
        where = np.minimum(np.searchsorted(self._sorted, hashes), len(self) - 1)
        return np.where(self._sorted[where] == hashes, self._order[where], UNKNOWN)

    def _place(self, number: int) -> str:
        shard = next(shard for first, shard in reversed(self._shards) if first <= number)
        return f"{shard.name}, line {self._lines[number]}"


def _hash(custom_id: str) -> bytes:
    return hashlib.blake2b(custom_id.encode(), digest_size=16).digest()
