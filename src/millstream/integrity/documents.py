"""Documents against segments: every document's ids are in samples once, from its first to its last, and nobody else's.

Both come in the order of the samples and are matched as they come, so that what is held is what is still incomplete.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from millstream.records import Ids
from millstream.runs.pack.fingerprint import mixed


class Wrong(Exception):
    """What does not fit, in words."""


class Spans(NamedTuple):
    """Stretches of documents, in columns: the ids of `document` from `start` to before `stop`.

    `first` and `last` are the ids at its ends; `pieces`: in how many segments it is; `at` is the number of the last of
    these.
    """

    document: Ids
    start: Ids
    stop: Ids
    first: Ids
    last: Ids
    pieces: Ids
    at: Ids

    def where(self, rows: Ids) -> "Spans":
        """The rows that a mask or a list of numbers chooses."""
        return Spans(*(column[rows] for column in self))

    def and_then(self, others: "Spans") -> "Spans":
        """These and the others."""
        return Spans(*(np.concatenate(both) for both in zip(self, others, strict=True)))

    def merged(self) -> "Spans":
        """By document and start, with neighbours joined. Raises Wrong if two have the same ids.

        >>> one, two = np.array([1, 1]), np.array([0, 1])
        >>> Spans(one, np.array([3, 0]), np.array([5, 3]), two, two, one, two).merged()[1:3]
        (array([0]), array([5]))
        """
        spans = self.where(np.lexsort((self.start, self.document)))
        same = spans.document[1:] == spans.document[:-1]
        twice = same & (spans.start[1:] < spans.stop[:-1])
        if twice.any():
            row = int(np.flatnonzero(twice)[0])
            raise Wrong(f"id {spans.start[row + 1]} of document {spans.document[row]} is in two places")
        begins = np.flatnonzero(np.concatenate([[True], ~same | (spans.start[1:] != spans.stop[:-1])])[: len(same) + 1])
        if not len(spans.document):
            return spans
        ends = np.append(begins[1:], len(spans.document)) - 1
        count, at = np.add.reduceat(spans.pieces, begins), np.maximum.reduceat(spans.at, begins)
        document, start = spans.document[begins], spans.start[begins]
        return Spans(
            document=document,
            start=start,
            stop=spans.stop[ends],
            first=spans.first[begins],
            last=spans.last[ends],
            pieces=count,
            at=at,
        )


NOTHING = Spans(np.zeros(0, np.uint64), *(np.zeros(0, np.int64) for _ in range(6)))


class Rows(NamedTuple):
    """Documents that have ids, in columns, as their table has them."""

    ordinal: Ids
    length: Ids
    split: Ids


@dataclass(frozen=True)
class Rules:
    """What holds at the ends of documents: the ids there, if any.

    `ordered`: documents stand in the order of the samples that have the last of their ids.
    """

    bos: int | None
    eos: int | None
    ordered: bool = True


class Matching:
    """Takes spans and rows, a block at a time, and raises Wrong at the first that do not fit."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._spans = NOTHING
        self._rows = Rows(np.zeros(0, np.uint64), np.zeros(0, np.int64), np.zeros(0, bool))
        self._at = -1  # of the last document that was complete

    @property
    def wants_rows(self) -> bool:
        """Whether only rows can tell more: there are spans, and no row without its ids."""
        return len(self._spans.document) > 0 and not len(self._rows.ordinal)

    def take(self, spans: Spans) -> None:
        """The next segments."""
        self._spans = self._spans.and_then(spans).merged()
        self._match()

    def rows(self, rows: Rows) -> None:
        """The next documents."""
        self._rows = Rows(*(np.concatenate(both) for both in zip(self._rows, rows, strict=True)))
        self._match()

    def end(self, dropped: int = 0) -> dict[int, int]:
        """Everything has been handed over, but `dropped` ids: how many there are of each document without its last."""
        rows, spans = self._rows, self._spans
        unknown = ~np.isin(spans.document, rows.ordinal)
        if unknown.any():
            raise Wrong(f"document {spans.document[unknown][0]} has segments, and no row")
        kept = np.zeros(len(rows.ordinal), np.int64)
        for ordinal, start, stop in zip(spans.document, spans.start, spans.stop, strict=True):
            if start:
                raise Wrong(f"document {ordinal} has no ids before its id {start}")
            kept[rows.ordinal == ordinal] = stop
        missing = int((rows.length - kept).sum())
        if missing != dropped or (kept[1:] > 0).any():
            ordinal, length, here = (int(column[0]) for column in (rows.ordinal, rows.length, kept))
            raise Wrong(f"document {ordinal} has {length:,} ids, its segments {here:,}")
        if (rows.split != (kept > 0)).any():
            raise Wrong(f"document {rows.ordinal[0]} is not in as many samples as its row says")
        return dict(zip(rows.ordinal.tolist(), kept.tolist(), strict=True))

    def settled(self) -> None:
        """All ids of the documents that were handed over must have come. Raises Wrong if not."""
        if len(self._rows.ordinal):
            ordinal, length = int(self._rows.ordinal[0]), int(self._rows.length[0])
            mine = self._spans.document == ordinal
            here = int((self._spans.stop - self._spans.start)[mine].sum())
            raise Wrong(f"document {ordinal} has {length:,} ids, its segments {here:,}")

    def _match(self) -> None:
        spans, rows = self._spans, self._rows
        if not len(spans.document) or not len(rows.ordinal):
            return
        by_ordinal = np.argsort(rows.ordinal, kind="stable")
        place = np.minimum(np.searchsorted(rows.ordinal[by_ordinal], spans.document), len(by_ordinal) - 1)
        row = by_ordinal[place]
        known = rows.ordinal[row] == spans.document
        beyond = known & (spans.stop > rows.length[row])
        if beyond.any():
            number = int(np.flatnonzero(beyond)[0])
            told = f"document {spans.document[number]} has {rows.length[row[number]]:,} ids"
            raise Wrong(f"{told}, its segments {spans.stop[number]:,}")
        whole = known & (spans.start == 0) & (spans.stop == rows.length[row])
        chosen = np.flatnonzero(whole)[np.argsort(row[whole], kind="stable")]  # in the order of the rows
        self._check(spans.where(chosen), rows.split[row[chosen]], row[chosen])
        done = np.zeros(len(rows.ordinal), bool)
        done[row[chosen]] = True
        self._rows = Rows(*(column[~done] for column in rows))
        self._spans = spans.where(~whole)

    def _check(self, spans: Spans, split: Ids, row: Ids) -> None:
        """What is known of documents that are complete; `row` is where they stand among those that wait."""
        if not len(row):
            return
        for mask, what in self._tests(spans, split, row):
            if mask.any():
                raise Wrong(f"document {spans.document[np.flatnonzero(mask)[0]]} {what}")
        self._at = int(spans.at[-1])

    def _tests(self, spans: Spans, split: Ids, row: Ids) -> Iterator[tuple[Ids, str]]:
        rules = self._rules
        if rules.ordered:
            order = (row != np.arange(len(row))) | (spans.at <= np.concatenate([[self._at], spans.at[:-1]]))
            yield order, "does not stand where its last ids are"
        if rules.bos is not None:
            yield spans.first != rules.bos, "does not begin with BOS"
        if rules.eos is not None:
            yield spans.last != rules.eos, "does not end with EOS"
        yield split != (spans.pieces > 1), "is not in as many samples as its row says"


class Ordinals:
    """Whether numbers that come in any order are those below a bound, each once: told by a sum that holds for no others
    but by a chance of 2^-64, so that nothing is kept of them.

    >>> seen = Ordinals()
    >>> seen.add(np.array([2, 0], np.uint64))
    >>> seen.are_those_below(2), seen.add(np.array([1], np.uint64)), seen.are_those_below(3)
    (False, None, True)
    """

    def __init__(self) -> None:
        self._key = np.random.default_rng().integers(1, 1 << 63, dtype=np.uint64)
        self._sum = 0
        self._count = 0

    def add(self, ordinals: Ids) -> None:
        self._sum += self._of(ordinals.astype(np.uint64))
        self._count += len(ordinals)

    def are_those_below(self, stop: int) -> bool:
        if self._count != stop:
            return False
        steps = range(0, stop, 1 << 20)
        expected = sum(self._of(np.arange(low, min(low + (1 << 20), stop), dtype=np.uint64)) for low in steps)
        return (expected - self._sum) % (1 << 64) == 0

    def _of(self, ordinals: Ids) -> int:
        return int(mixed(ordinals ^ self._key).sum(dtype=np.uint64))
