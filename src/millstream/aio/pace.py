"""How much work is done in a second, and how sure that is."""

from math import hypot, sqrt

FEWEST = 16  # ends in a batch at least: the pace of fewer lognormal latencies (sigma 0.5) is off by more than an eighth
_BATCHES = 4  # before so many, their spread says nothing
_NOISE = 0.25  # what latencies vary at least (their deviation over their mean): few batches may agree by chance


class Pace:
    """Work per second, from batches of ends in a row, and how far it may be off.

    Ends at one time belong to one batch: many attempts of equal length end in step. The ends of the first `skip`, if
    any, are left out, as what was under way before.

    >>> pace = Pace(limit=64, time=0.0)
    >>> sum(pace.add(work=2.0, time=0.25 * end) for end in range(1, 66))  # a batch is a quarter of the limit
    4
    >>> pace.rate, pace.enough, round(pace.error, 3)
    (8.0, True, 0.031)
    """

    def __init__(self, limit: int, time: float, skip: int = 0) -> None:
        self._size, self._skip = max(limit // 4, FEWEST), skip
        self._since = self._at = time
        self._count, self._work = 0, 0.0  # of the batch that is open
        self._batches: list[tuple[float, float]] = []  # (work, seconds)
        self.seen = 0

    def again(self, limit: int) -> "Pace":
        """A new one that goes on with the batch that is open."""
        new = Pace(limit, self._since)
        new._at, new._count, new._work, new.seen = self._at, self._count, self._work, self._count
        return new

    def add(self, work: float, time: float) -> bool:
        """Whether a batch is complete: known at the first end of another time."""
        complete = time > self._at > self._since and self._count >= (self._skip or self._size)
        if complete:
            if not self._skip:
                self._batches.append((self._work, self._at - self._since))
            self._since, self._count, self._work, self._skip = self._at, 0, 0.0, 0
            if len(self._batches) == 4 * _BATCHES:  # fewer and longer ones: what is slow to vary must vary inside them
                pairs = zip(self._batches[::2], self._batches[1::2], strict=True)
                self._batches = [(a[0] + b[0], a[1] + b[1]) for a, b in pairs]
                self._size *= 2
        self._at = time
        self._count += 1
        self._work += work
        self.seen += 1
        return complete and bool(self._batches)

    def beats(self, other: "Pace") -> bool:
        """Whether it is faster for sure."""
        return self.rate * (1 - self.error) > other.rate * (1 + other.error)

    def joined(self, other: "Pace") -> "Pace":
        """Both as one, where they do not differ."""
        self._batches += other._batches
        self.seen += other.seen
        return self

    @property
    def enough(self) -> bool:
        return len(self._batches) >= _BATCHES

    @property
    def rate(self) -> float:
        return sum(work for work, _ in self._batches) / sum(seconds for _, seconds in self._batches)

    @property
    def error(self) -> float:
        """Of the rate: the standard error, as a share of it."""
        rate, number = self.rate, len(self._batches)
        off = hypot(*(work - rate * seconds for work, seconds in self._batches))
        total = sum(work for work, _ in self._batches)
        return max(off * sqrt(number / (number - 1)) / total if total else 0.0, _NOISE / sqrt(self.seen))
