"""From the blocks of a corpus that were read to all of it: totals and ratios, each with its interval."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from millstream.records import Ids
from millstream.runs.plan.blocks import ENOUGH, Stratum

RESAMPLES = 1000
OUTSIDE = 0.5
"""Percent of the resamples that lie below an interval, and above."""
DOCUMENTS = "documents"
"""The total that may be known beforehand: of documents, the faulty ones among them."""


class Estimate(NamedTuple):
    """A number, and between which two it lies 95 times in 100; all three are equal if it was counted, and the two are
    NaN where nothing can be said."""

    value: float
    low: float
    high: float

    @property
    def exact(self) -> bool:
        return self.low == self.high

    @property
    def told(self) -> bool:
        """Whether anything is known of how far off it may be."""
        return not math.isnan(self.low)

    @property
    def error(self) -> float:
        """How far off it may be."""
        return max(self.high - self.value, self.value - self.low)

    def give_or_take(self, more: float) -> "Estimate":
        """The same, as far off again; no less than 0."""
        return self.within(self.low - more, self.high + more)

    def within(self, low: float, high: float) -> "Estimate":
        """The same, between these two at least; no less than 0."""
        return Estimate(self.value, max(min(low, self.low), 0), max(high, self.high)) if self.told else self


class _Drawn(NamedTuple):
    """Sums over a part, their variance, and for other choices of its blocks how far they are `off` with the variance
    that is estimated then."""

    total: Ids
    variance: Ids
    off: Ids
    variances: Ids


Sums = Ids
"""A sum over the documents of each block that was read (blocks,)."""


class Corpus:
    """The documents that were read, by `length` in ids; `weight` is how many of the whole corpus each stands for."""

    def __init__(self, parts: list[Stratum], seed: int) -> None:
        self._parts = parts
        self._random = np.random.default_rng([seed, 2])
        blocks = [(part.scale * block.weight, block) for part in parts for block in part.blocks]
        counts = [len(block.length) for _, block in blocks]
        self.length = np.concatenate([np.zeros(0, np.int64), *(block.length for _, block in blocks)])
        self._weights = np.array([weight for weight, _ in blocks])
        self.weight = np.repeat(self._weights, counts)
        self._block = np.repeat(np.arange(len(blocks)), counts)
        self.faulty: Sums = np.array([block.faulty for _, block in blocks], float)
        self.documents: Sums = np.array(counts) + self.faulty
        self.seconds: Sums = np.array([block.seconds for _, block in blocks])

    def sums(self, column: Ids) -> Sums:
        """Of a number for every document that was read."""
        return np.bincount(self._block, column, len(self._weights))

    def stand_ins(self, weight: Ids, window: int) -> tuple[Ids, Ids]:
        """(lengths, the document that each stands in for) of a small corpus that is like the whole one; `weight` is
        what each document counts for in a window.

        Best-fit fills the window of a large corpus better than the few documents that were read, and parts were not
        read with the same density. So it is as large as the whole if that is one window at most, and never more than
        two windows, or two times what was read. Those for one document lie between its neighbours in length, as
        documents in the rest of the corpus do; where many are of one length, so are they.
        """
        whole, read = float(self.weight @ weight), int(weight.sum())
        even = min(1 / float(self.weight.min()), 2 * max(window, read) / whole)
        wanted = self.weight * max(min(1.0, window / whole), even)
        copies = np.maximum(1, np.floor(wanted + self._random.random(len(wanted)))).astype(np.int64)
        order = np.argsort(self.length, kind="stable")
        ordered = self.length[order].astype(float)
        middle = np.concatenate([ordered[:1], (ordered[1:] + ordered[:-1]) / 2, ordered[-1:]])
        low, high = np.empty_like(ordered), np.empty_like(ordered)
        low[order], high[order] = middle[:-1], middle[1:]
        document = np.repeat(np.arange(len(copies)), copies)
        number = np.arange(len(document)) - np.repeat(np.cumsum(copies) - copies, copies)
        place = (number + 0.5) / copies[document]
        spread = np.rint(low[document] + place * (high - low)[document]).astype(np.int64)
        return np.where(copies[document] > 1, spread, self.length[document]), document

    def estimates(
        self, totals: dict[Any, Sums], ratios: dict[Any, tuple[Sums, Sums]]
    ) -> tuple[dict[Any, Estimate], dict[Any, Estimate]]:
        """What the sums are in the whole corpus, and the ratios of two sums. All documents are
        among the totals as DOCUMENTS.

        The interval is a bootstrap over blocks: as many are drawn again from those that were read, and how far the
        total is off then, in standard errors, is how far it may be off now. Standard errors, because a choice without
        the few longest documents gives a wrong total and a too small error at once. The interval of a ratio r = y / z
        is that of the sum of (y - r z) / z, which is 0.
        """
        columns, found = [self.documents, *totals.values()], []
        for y, z in ratios.values():
            below = float(self._weights @ z) or 1.0
            found.append(float(self._weights @ y) / below)
            columns.append((y - found[-1] * z) / below)
        value, low, high = self._intervals(np.stack(columns, axis=1))
        value[len(value) - len(found) :] = found
        low, high = np.maximum(value + low, 0.0), value + high
        each = [Estimate(*row) for row in np.stack([value, low, high], axis=1).tolist()]
        first = 1 + len(totals)
        return dict(zip([DOCUMENTS, *totals], each[:first], strict=True)), dict(zip(ratios, each[first:], strict=True))

    def _intervals(self, sums: Ids) -> tuple[Ids, Ids, Ids]:
        """(total, how far below, how far above it may be) of columns, from their sums over each block that was read."""
        low, found = 0, []
        for part in self._parts:
            high = low + len(part.blocks)
            found.append(self._drawn(part, sums[low:high]))
            low = high
        total, variance, off, variances = (np.sum(column, axis=0) for column in zip(*found, strict=True))
        errors = np.divide(off, np.sqrt(variances), out=np.zeros_like(off), where=variances > 0)
        low_off, high_off = -np.percentile(errors, [100 - OUTSIDE, OUTSIDE], axis=0) * np.sqrt(variance)
        return total, np.minimum(low_off, 0), np.maximum(high_off, 0)

    def _drawn(self, part: Stratum, sums: Ids) -> _Drawn:
        """The whole part's sums, from those of its blocks."""
        weights = np.array([block.weight for block in part.blocks])
        sizes = np.array([block.size for block in part.blocks])
        x, y = sizes * weights, sums * weights[:, None]
        total = y.sum(axis=0) * part.scale
        none = np.zeros((RESAMPLES, len(total)))
        if part.whole:
            return _Drawn(total, 0 * total, none, none)
        clusters = np.unique([block.cluster for block in part.blocks], return_inverse=True)[1]
        if clusters.max() + 1 >= ENOUGH:
            x, y = np.bincount(clusters, x), np.stack([np.bincount(clusters, column) for column in y.T], axis=1)
        n = len(x)
        if part.front:
            drawn = _Drawn(total, np.full_like(total, np.nan), none, none)
            return self._known(part, drawn)
        if n == 1:  # which says nothing of others: it may be as far off as it is large
            normal = self._random.standard_normal((RESAMPLES, 1))
            return _Drawn(total, total**2, normal * total, none + total**2)
        times = np.vstack([np.ones(n), self._random.multinomial(n, np.full(n, 1 / n), RESAMPLES)])
        size = np.maximum(times @ x, 1e-9)[:, None]
        ratio = times @ y / size
        squares = times @ y**2 - 2 * ratio * (times @ (y * x[:, None])) + ratio**2 * (times @ x**2)[:, None]
        variance = np.maximum(squares, 0) * (part.total / size) ** 2 * (n / (n - 1))
        unread = max(0.0, 1 - float(sizes.sum()) / part.total)
        drawn = _Drawn(total, variance[0] * unread, (ratio[1:] - ratio[0]) * part.total, variance[1:])
        return self._known(part, drawn)

    @staticmethod
    def _known(part: Stratum, drawn: _Drawn) -> _Drawn:
        """The same, with the number of documents if that is known beforehand."""
        if part.documents is not None:
            for mine, known in zip(drawn, (part.documents, 0, 0, 0), strict=True):
                mine[..., 0] = known
        return drawn

    def quantiles(self, percents: Sequence[float]) -> list[int]:
        """The lengths that so many percent of the documents with ids don't exceed."""
        filled = np.flatnonzero(self.length)
        order = filled[np.argsort(self.length[filled], kind="stable")]
        below = np.cumsum(self.weight[order])
        at = np.searchsorted(below, below[-1] * np.clip(np.array(percents) / 100, 0, 1) * (1 - 1e-12))
        found: list[int] = self.length[order][np.minimum(at, len(order) - 1)].tolist()
        return found
