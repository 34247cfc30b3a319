"""Sums over ids and documents that are the same for the same ones, in whatever order they come."""

from typing import Any, NamedTuple

import numpy as np

from millstream.records import Ids

MOST = 1 << 20
"""Sums there are at most, of each kind: documents of larger corpora share them with their neighbours."""
_FLAT = 1 << 20  # ids that are looked at together


def mixed(values: Ids) -> Any:
    """Numbers that look like chance, one for each (splitmix64)."""
    made = values + np.uint64(0x9E3779B97F4A7C15)
    made = (made ^ (made >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    made = (made ^ (made >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return made ^ (made >> np.uint64(31))


class Key(NamedTuple):
    """Numbers drawn by chance, so that nothing can be made to have the same sum."""

    document: np.uint64
    position: np.uint64
    id: np.uint64

    @classmethod
    def draw(cls) -> "Key":
        return cls(*np.random.default_rng().integers(1, 1 << 63, 3, dtype=np.uint64) | np.uint64(1))


class Fingerprint:
    """Of `documents` documents: every id with its place in its document, and what is told of each document.

    >>> key, row = Key.draw(), np.array([0, 1], np.uint64)
    >>> one, two = Fingerprint(2, key), Fingerprint(2, key)
    >>> one.add(row, np.array([0, 0]), np.array([2, 1]), np.array([7, 8, 9]))
    >>> for at, some in ((1, [8]), (0, [7])):
    ...     two.add(row[:1], np.array([at]), np.array([1]), np.array(some))
    >>> two.add(row[1:], np.array([0]), np.array([1]), np.array([6]))
    >>> one.different_ids(two).tolist()
    [1]
    """

    def __init__(self, documents: int, key: Key) -> None:
        self.width = max(1, -(-documents // MOST))
        self._key = key
        count = max(1, -(-documents // self.width))
        self._ids, self._rows = np.zeros(count, np.uint64), np.zeros(count, np.uint64)

    def add(self, ordinal: Ids, start: Ids, length: Ids, ids: Ids) -> None:
        """Ids of documents, back to back: `length` of each, from its id number `start` on."""
        stops = np.cumsum(length)
        begins = stops - length
        of_document = mixed(ordinal.astype(np.uint64) ^ self._key.document)
        for low in range(0, len(ids), _FLAT):
            part = ids[low : low + _FLAT].astype(np.uint64)
            first, last = np.searchsorted(stops, [low, low + len(part) - 1], side="right").tolist()
            rows = np.arange(first, last + 1)
            sizes = np.minimum(stops[rows], low + len(part)) - np.maximum(begins[rows], low)
            row = np.repeat(rows, sizes)
            place = (np.arange(low, low + len(part)) - begins[row] + start[row]).astype(np.uint64)
            values = mixed(of_document[row] + place * self._key.position + part * self._key.id)
            some = sizes > 0
            sums = np.add.reduceat(values, (np.cumsum(sizes) - sizes)[some])
            np.add.at(self._ids, self._of(ordinal[rows[some]]), sums)

    def tell(self, ordinal: Ids, *facts: Ids) -> None:
        """What is known of documents, in columns of whole numbers."""
        value = ordinal.astype(np.uint64) ^ self._key.document
        for fact in facts:
            value = mixed(value) + fact.astype(np.uint64) * self._key.id
        np.add.at(self._rows, self._of(ordinal), mixed(value))

    def different_ids(self, other: "Fingerprint") -> Ids:
        """The numbers of the sums over ids that differ."""
        return np.flatnonzero(self._ids != other._ids)

    def different_rows(self, other: "Fingerprint") -> Ids:
        """The numbers of the sums over what is known of documents that differ."""
        return np.flatnonzero(self._rows != other._rows)

    def _of(self, ordinal: Ids) -> Ids:
        # A number that no document has makes a difference anywhere.
        return np.clip(ordinal.astype(np.int64) // self.width, 0, len(self._ids) - 1)


def hashed(texts: list[str]) -> Ids:
    """A number for each text, the same in this process."""
    return np.fromiter(map(hash, texts), np.int64, len(texts)).view(np.uint64)
