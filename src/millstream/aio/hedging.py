"""Hedging: ask a slow request a second time, elsewhere, and take the first success.

Dean and Barroso, "The Tail at Scale" (2013): a second request after the 95th percentile of the latency cut their p99.9
from 1,800 to 74 ms, for 2 % more requests.
"""

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

_SAMPLES = 1000  # latencies that are remembered
_LEAST = 20  # before so many are known, nothing is hedged
_MARGIN = 1.5  # times the median: latencies that hardly differ must not be hedged because they exceed p95 by a hair


class Hedge:
    """When a second attempt at a request begins: after the learned 95th percentile, for at most `share` of all.

    `function` makes the second attempt, at another place if there is one.

    >>> hedge = Hedge(print, share=0.05)
    >>> for number in range(100):
    ...     hedge.learn(0.1 if number % 10 else 2.0)
    >>> hedge.after
    2.0
    >>> Hedge(print).after is None  # nothing is known yet
    True
    """

    def __init__(self, function: Callable[[Any], Awaitable[Any]], share: float = 0.05, quantile: float = 0.95) -> None:
        self.function, self._share, self._quantile = function, share, quantile
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []
        self._attempts = 0
        self.made = 0

    @property
    def after(self) -> float | None:
        """Seconds after which a request counts as slow."""
        if len(self._sorted) < _LEAST:
            return None
        at = min(int(len(self._sorted) * self._quantile), len(self._sorted) - 1)
        return max(self._sorted[at], _MARGIN * self._sorted[len(self._sorted) // 2])

    @property
    def allowed(self) -> bool:
        """One more hedge stays within the share."""
        return self.made + 1 <= self._share * self._attempts

    def count(self) -> None:
        """An attempt began that is no hedge."""
        self._attempts += 1

    def learn(self, seconds: float) -> None:
        """How long a request took that was answered."""
        self._recent.append(seconds)
        insort(self._sorted, seconds)
        if len(self._recent) > _SAMPLES:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
