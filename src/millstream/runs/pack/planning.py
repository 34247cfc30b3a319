"""The parts of a run, as the driver hands them out: those of the corpus, and those of what one worker unpacks."""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace

from millstream.corpus.sources import InputShard, rough_size
from millstream.corpus.unpacked import Unpack, Unpacked
from millstream.engines import Done
from millstream.records import Part

PART = 16 << 20
"""Bytes of input in a part, about, of a large corpus."""
LEAST_PART = 1 << 18
PIPED_PART = 1 << 19
PARTS = 64
"""How many parts a smaller corpus should have at least, so that all workers have something to do to the end."""
LARGE = 64 << 20
"""Bytes of text in a packed file, roughly, above which one worker unpacks it for all, where there are few of them."""
_PATIENCE = 0.1  # seconds that the driver waits for a pipe before it looks for what else there is to do
_WAITING = 2  # parts for each worker that are unpacked before anybody takes them

Start = Callable[[Unpack, Part, Callable[[Done], None]], Callable[[], None]]


class Planning:
    """`next` is the part that follows, or None if there is none yet; `over` tells that there is none at all.

    `start` has a part unpacked by a worker: it is given a function for the answers, and gives one that asks for another
    answer. Standard input is unpacked here.
    """

    def __init__(self, parts: Iterator[Part], shards: list[InputShard], *, unpack: Unpack, workers: int) -> None:
        self._plan, self._shards, self._unpack, self._workers = parts, shards, unpack, workers
        packed = sum(map(is_large, shards))
        self._few = 0 < packed < 2 * workers  # more of them keep all workers busy as they are
        self._number = 0
        self._piped: Iterator[Unpacked | None] | None = None
        self._unpacked: deque[Unpacked] | None = None  # of the input that a worker unpacks now
        self._ended = False
        self._error: BaseException | None = None
        self._more: Callable[[], None] = lambda: None
        self.over = False

    def next(self, start: Start) -> Part | None:
        """Raises what unpacking raised, once all parts before that are handed out."""
        if self._piped is not None:
            return self._from_pipe()
        if self._unpacked is not None:
            return self._from_worker()
        part = next(self._plan, None)
        if part is None:
            self.over = True
            return None
        shard = self._shards[part.ranges[0].source]
        if shard.uri == "-":
            self._piped = self._unpack.piped(part, _PATIENCE)
            return self.next(start)
        if self._few and len(part.ranges) == 1 and is_large(shard):
            self._unpacked, self._ended, self._error = deque(), False, None
            self._more = start(self._unpack, part, self._came)
            return None
        return self._numbered(part)

    @property
    def failed(self) -> bool:
        """Whether all that is left is an error, which `next` raises."""
        return self._error is not None and not self._unpacked

    def _numbered(self, part: Part) -> Part:
        self._number += 1
        return replace(part, number=self._number - 1)

    def _from_pipe(self) -> Part | None:
        assert self._piped is not None
        for found in self._piped:
            return self._numbered(found.part(0)) if found else None
        self._piped = None
        return None

    def _from_worker(self) -> Part | None:
        assert self._unpacked is not None
        if self._unpacked:
            found = self._unpacked.popleft()
            self._more()
            return self._numbered(found.part(0))
        if self._error:
            raise self._error
        if self._ended:
            self._unpacked = None
        return None

    def _came(self, done: Done) -> None:
        assert self._unpacked is not None
        if done.last:
            self._ended, self._error = True, done.error
        else:
            self._unpacked.append(done.result)

    @property
    def ahead(self) -> int:
        """Parts that may be unpacked before anybody takes one."""
        return _WAITING * self._workers


def is_large(shard: InputShard) -> bool:
    """Whether a packed file is worth being unpacked by one worker for all."""
    return shard.packed is not None and shard.kind == "jsonl" and rough_size(shard) > LARGE


def part_size(total: int | None, most: int = PART) -> int:
    """Bytes of input in a part, `most` at most, where `total` are to be read (None: nobody knows, as it comes from a
    pipe), whatever the workers are, so that a run that goes on with others meets the same parts.

    >>> [part_size(total) >> 10 for total in (None, 0, 100 << 20, 1 << 40)]
    [512, 256, 1024, 16384]
    """
    if total is None:
        return PIPED_PART
    return min(most, max(LEAST_PART, 1 << (total // PARTS).bit_length() - 1 if total >= PARTS else 0))
