"""The order of a training run: which sample of which folder stands at place g, and which places a step and a rank take.

>>> order = Order([Source(3, "a"), Source(2, "b")], seed=7)
>>> source, number = order(np.arange(10))  # two epochs of five samples
>>> [f"{'ab'[which]}{index}" for which, index in zip(source.tolist(), number.tolist())]
['a2', 'b0', 'b1', 'a1', 'a0', 'a0', 'b0', 'b1', 'a2', 'a1']
"""

import contextlib
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from millstream.errors import RequestError, ResumeRefused
from millstream.records import Ids
from millstream.sampling.mixture import Mixture
from millstream.sampling.numbers import seed_of
from millstream.sampling.permutation import VERSION, Permutation, key_of

BLOCK = 4096
"""Places that are looked up together: one at a time costs a thousand times as much."""

_KEPT = 4

Found = tuple[Ids, Ids]
"""For each place its source and the number of the sample there, i64."""


class Source(NamedTuple):
    """What an order has to know of a folder: how many samples it has, and a name that its content decides."""

    samples: int
    fingerprint: str


class Order:
    """Called with places (i64), it gives for each its source and the sample there; any place from 0 on, at once.

    Without weights the sources are one: each epoch has every sample once, in an order of its own. With weights each
    source is taken from by its weight (see `Mixture`), and runs through epochs of its own; no sample comes again
    before all others of its source have been. `shuffle=False` leaves the samples in their order.

    Raises RequestError for no samples, for another number of weights than of sources, or for a seed that is none.
    """

    def __init__(
        self, sources: Sequence[Source], *, seed: int, weights: Sequence[float] | None = None, shuffle: bool = True
    ) -> None:
        seed = seed_of(seed)
        if not isinstance(shuffle, bool):
            raise RequestError(f"shuffle={shuffle!r} does not work: give True or False, and the number as seed")
        self._mixture = Mixture(weights, seed) if weights is not None else None
        if weights is not None and len(weights) != len(sources):
            raise RequestError(f"{len(weights)} weights do not work for {len(sources)} folders: give one for each")
        self.samples = sum(source.samples for source in sources)
        if not self.samples or (weights is not None and not all(source.samples for source in sources)):
            raise RequestError("there is nothing to train on: a folder has no samples")
        self.sources, self.seed, self.shuffle = tuple(sources), seed, shuffle
        self._begins = np.cumsum([0, *(source.samples for source in sources)], dtype=np.int64)
        self._blocks: OrderedDict[int, Found] = OrderedDict()

    @property
    def identity(self) -> dict[str, Any]:
        """All that decides the order, for a state to be compared with."""
        return {
            "version": VERSION,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "shares": list(self._mixture.counts) if self._mixture else None,
            "folders": [[source.samples, source.fingerprint] for source in self.sources],
        }

    def __call__(self, places: Ids) -> Found:
        blocks, inside = np.divmod(places, BLOCK)
        distinct = sorted(set(blocks.tolist()))
        if len(distinct) == 1:  # nearly all steps
            source, number = self._block(distinct[0])
            return source[inside], number[inside]
        if len(distinct) > _KEPT:
            return self._found(places)
        source, number = np.empty((2, len(places)), np.int64)
        for block in distinct:
            here = np.flatnonzero(blocks == block)
            for column, found in zip((source, number), self._block(block), strict=True):
                column[here] = found[inside[here]]
        return source, number

    def _block(self, block: int) -> Found:
        found = self._blocks.pop(block, None) or self._found(np.arange(BLOCK, dtype=np.int64) + block * BLOCK)
        self._blocks[block] = found  # the last now
        while len(self._blocks) > _KEPT:
            with contextlib.suppress(KeyError):  # another thread was faster
                self._blocks.popitem(last=False)
        return found

    def _found(self, places: Ids) -> Found:
        if self._mixture is None:
            names = (source.fingerprint for source in self.sources)
            number = self._epochs(places, self.samples, "all", *names)
            source = np.searchsorted(self._begins, number, side="right") - 1
            return source, number - self._begins[source]
        source, places = self._mixture(places)
        number = np.empty(len(places), np.int64)
        for which in np.unique(source).tolist():
            here = np.flatnonzero(source == which)
            samples, name = self.sources[which]
            number[here] = self._epochs(places[here], samples, "one", which, name)
        return source, number

    def _epochs(self, places: Ids, samples: int, *names: str | int) -> Ids:
        """The numbers at these places of epochs of so many samples, one epoch after the other."""
        epochs, inside = np.divmod(places, samples)
        if not self.shuffle:
            return inside
        distinct, which = np.unique(epochs, return_inverse=True)
        keys = [key_of(self.seed, epoch, *names) for epoch in distinct.tolist()]
        return Permutation(samples, *keys)(inside, which if len(keys) > 1 else None)


def steps(first: int, stop: int, *, batch: int, rank: int = 0, world: int = 1) -> Iterator[range]:
    """The places that one rank takes, step after step, from place `first` on: each step has `batch` for every rank.

    Together the ranks take all places in their order, however many ranks there are. Every rank gets as many as the
    others: so if the places up to `stop` are no whole number of steps, the last has fewer, and fewer than `world` may
    be left over.

    >>> list(steps(0, 11, batch=2, rank=1, world=2))
    [range(1, 4, 2), range(5, 8, 2), range(9, 10, 2)]
    """
    while (count := min(batch, (stop - first) // world)) > 0:
        yield range(first + rank, first + count * world, world)
        first += count * world


def place_in(state: Mapping[str, Any], identity: Mapping[str, Any]) -> int:
    """The place that a state stands for. Raises ResumeRefused if it is of another order, and names what differs.

    >>> place_in({"next": 8, "order": {"seed": 1}}, {"seed": 2})
    Traceback (most recent call last):
    millstream.errors.ResumeRefused: this state is of another order: seed was 1 and is 2 now
    """
    found, was = (state.get("next"), state.get("order")) if isinstance(state, Mapping) else (None, None)
    if type(found) is not int or found < 0 or not isinstance(was, Mapping):
        raise ResumeRefused("this is no state of a loader: give what state_dict() returned")
    differ = [name for name in {**identity, **was} if was.get(name) != identity.get(name)]
    if differ:
        told = "; ".join(f"{name} was {was.get(name)} and is {identity.get(name)} now" for name in differ)
        raise ResumeRefused(f"this state is of another order: {told}")
    return found
