"""What of the corpus is wanted: so many documents, and of inputs that are over early nothing behind that."""

from dataclasses import replace

from millstream.records import Part
from millstream.runs.pack.counts import Counts
from millstream.runs.pack.subset import Mark


class Wanted:
    """Told of the `counts` of parts in the order of the corpus, it says which parts and counts are not wanted, where
    `limit` documents are."""

    def __init__(self, limit: int | None) -> None:
        self._limit = limit
        self._ended: set[int] = set()  # input shards that are over early, as they are damaged
        self._open = False  # whether the last document goes on

    def count(self, counts: Counts, mark: Mark) -> None:
        """These were counted, which is as far as `mark`."""
        self._open = self._open if counts.empty else counts.open
        if counts.ends:
            self._ended.add(mark.cursor.source - 1)

    def is_over(self, part: Part) -> bool:
        """Whether its input has ended before it."""
        return part.ranges[0].source in self._ended

    def is_enough(self, mark: Mark) -> bool:
        """Whether nothing behind `mark` is wanted."""
        return self._limit is not None and mark.ordinal >= self._limit and not self._open

    def is_too_much(self, part: Part, counts: Counts, mark: Mark) -> bool:
        """Whether the counts behind `mark` hold documents that are not wanted, so that the part is to be done again."""
        return self._limit is not None and mark.ordinal + counts.mark.ordinal > self._limit and part.limit is None

    def of(self, part: Part, start: Mark) -> Part:
        """The part that begins at `start`, with the documents that are wanted of it."""
        return part if self._limit is None else replace(part, limit=self._limit - start.ordinal)
