"""The output shards of run folders, opened when they are needed; few at once, over all folders together."""

import contextlib
import resource
import weakref
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator

import numpy as np

from millstream.folder.reader import OutputShard
from millstream.records import Ids

_SCAN = 1 << 20  # segments looked at together
_MOST = 1024
MOST_DECODED = 64
"""Of shards that each hold some of their samples decoded, as those of Parquet do."""
_FILES = 3  # of an open shard: samples, segments, loss mask


def places(
    shard: OutputShard, documents: Collection[int], *, ordered: bool
) -> Iterator[tuple[int, int, int, int, int]]:
    """(ordinal, sample, start, length, place of the first id in the sample) of these documents' segments.

    `ordered`: segments stand in the order of their documents, so that they need not all be looked at.
    """
    segments, settings = shard.segments, shard.settings
    for row in _find(segments["document"], documents, ordered).tolist():
        ordinal, start, length, sample = segments[row].tolist()
        first, stop = np.searchsorted(segments["sample"], np.array([sample, sample + 1], np.uint32)).tolist()
        at = int(segments["length"][first:row].sum())
        if settings.pad_side == "left" and sample < len(shard):
            at += settings.seq_len - int(segments["length"][first:stop].sum())
        yield ordinal, sample, start, length, at


def _find(column: Ids, documents: Collection[int], ordered: bool) -> Ids:
    """The rows of segments that are of these documents."""
    wanted = np.sort(np.array(list(documents), np.uint64))
    if ordered:
        bounds = zip(np.searchsorted(column, wanted), np.searchsorted(column, wanted, side="right"), strict=True)
        return np.concatenate([np.arange(*bound) for bound in bounds])
    parts = [low + np.flatnonzero(np.isin(column[low : low + _SCAN], wanted)) for low in range(0, len(column), _SCAN)]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


class OpenShards:
    """The shards that were used last, of all datasets: a memory-mapped file counts as an open one, and systems limit
    those of a process, to 256 or 1,024 as a rule. Half of them are left to others."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, int], OutputShard] = OrderedDict()

    def owner_of(self, dataset: object) -> object:
        """A name for a dataset's shards; with the dataset, they go."""
        owner = object()
        weakref.finalize(dataset, self._drop, owner).atexit = False
        return owner

    def get(self, owner: object, number: int, make: Callable[[], OutputShard], most: int = _MOST) -> OutputShard:
        """A shard, opened by `make` unless it still is; then no more than `most` are. Threads may do this at once: each
        step here is one for them."""
        known = self._kept.pop((owner, number), None)
        shard = self._kept[owner, number] = known or make()  # the last now
        if known:
            return shard
        most = max(2, min(most, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2 // _FILES))
        while len(self._kept) > most:
            with contextlib.suppress(KeyError):
                self._kept.popitem(last=False)
        return shard

    def of(self, owner: object) -> int:
        """How many shards of a dataset are open."""
        return sum(key[0] is owner for key in list(self._kept))

    def _drop(self, owner: object) -> None:
        for key in [key for key in list(self._kept) if key[0] is owner]:
            self._kept.pop(key, None)


OPEN = OpenShards()
