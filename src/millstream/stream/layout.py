"""How documents would be packed, told from their lengths alone: what the packers do, without ids."""

from typing import NamedTuple

import numpy as np

from millstream.records import Ids
from millstream.stream.bestfit import WINDOW, Windows
from millstream.stream.bins import assign
from millstream.stream.lengths import Lengths
from millstream.stream.pack import SamplePlaces


class Layout(NamedTuple):
    """What a strategy makes of documents of known lengths.

    `samples`, ids in the `remainder`, segments `inside` samples. For every document its part of the `padding`; its
    `segments`, in samples or in the remainder; whether it is `cut`; and whether it is in a sample that is `shared` with
    another one.
    """

    samples: int
    remainder: int
    inside: int
    padding: Ids
    segments: Ids
    cut: Ids
    shared: Ids


def kept(length: Ids, n: int, overlong: str) -> Ids:
    """How many ids documents of `length` ids keep, by what becomes of those of more than `n`.

    >>> kept(np.array([2, 5]), 3, "truncate").tolist(), kept(np.array([2, 5]), 3, "drop").tolist()
    ([2, 3], [2, 0])
    """
    if overlong == "cut":
        return length
    return np.where(length > n, n if overlong == "truncate" else 0, length)


def layout(length: Ids, n: int, strategy: str, window: int | None = None, max_segments: int | None = None) -> Layout:
    """What a strategy makes of documents of `length` ids, in this order, with samples of `n` ids.

    >>> lengths = np.array([3, 0, 2, 5])
    >>> for strategy in ("concat", "split", "best-fit"):
    ...     found = layout(lengths, 4, strategy)
    ...     print(found.samples, found.remainder, found.segments, found.cut)
    2 2 [1 0 2 2] [False False  True  True]
    4 0 [1 0 1 2] [False False False  True]
    3 0 [1 0 1 2] [False False False  True]
    """
    if strategy == "concat":
        return _concat(length, n)
    if strategy == "split":
        return _split(length, n)
    return _best_fit(length, n, window or WINDOW, max_segments)


def _concat(length: Ids, n: int) -> Layout:
    starts, stops, first, last = SamplePlaces.joined(length, 0, n)
    total = int(length.sum())
    filled = length > 0
    shared = filled & ((starts % n > 0) | ((stops % n > 0) & (stops < total)))
    segments = np.where(filled, last - first + 1, 0)
    beyond = int((filled & (last == total // n)).sum())  # each has one segment in the remainder
    inside = int(segments.sum()) - beyond
    return Layout(
        total // n,
        total % n,
        inside,
        np.zeros(len(length)),
        segments=segments,
        cut=filled & (first != last),
        shared=shared,
    )


def _split(length: Ids, n: int) -> Layout:
    pieces = -(-length // n)
    samples = int(pieces.sum())
    return Layout(
        samples, 0, samples, pieces * n - length, segments=pieces, cut=length > n, shared=np.zeros(len(length), bool)
    )


def _best_fit(length: Ids, n: int, window: int, most: int | None) -> Layout:
    full, rest = length // n, length % n
    padding, shared = np.zeros(len(length)), np.zeros(len(length), bool)
    samples = int(full.sum())
    for taken in Windows(n, window).take(Lengths.of(length)):
        pieces = taken.low + np.flatnonzero(taken.rest)
        bins, count = assign(rest[pieces], n, most)
        ids, documents = np.bincount(bins, rest[pieces], count), np.bincount(bins, minlength=count)
        padding[pieces] = rest[pieces] * (n - ids[bins]) / ids[bins]
        shared[pieces] = documents[bins] > 1
        samples += count
    segments = full + (rest > 0)
    return Layout(samples, 0, int(segments.sum()), padding, segments=segments, cut=length > n, shared=shared)
