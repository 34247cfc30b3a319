"""A run in other formats: once it is sealed, their tasks done here or by an engine, or while it is packed."""

import contextlib
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from functools import partial
from itertools import count, islice

from millstream.engines import Done, Engine, engine
from millstream.exports import FORMATS
from millstream.exports.format import Wrote
from millstream.exports.out import Place
from millstream.exports.tasks import Export, Exporting, Number, Task, do, named
from millstream.folder.entries import Identity, RemainderEntry, ShardEntry, SubsetEntry
from millstream.folder.samples import Samples
from millstream.runs.pack.machine import cores
from millstream.runs.pack.traffic import Traffic
from millstream.store import Store

WORTH_A_WORKER = 64_000_000
"""Ids to write below which starting another process takes longer than it saves."""


def export_all(
    names: Sequence[str], subsets: Sequence[Samples], store: Store, workers: int | None = None
) -> Generator[tuple[Export, Place]]:
    """The formats `names` of a run, each when it is finished, for the caller to publish in `store`.

    `workers` processes write them; None: as many as are worth it. Raises LedgerError as `Exporting.export` does.
    """
    begun = (_begun(name, subsets, store) for name in _one_file_first(names))
    workers = workers or worth(names, subsets)
    if workers == 1:
        for exporting in begun:
            while not exporting.done:
                for number, task in exporting.tasks():
                    exporting.took(number, do(task))
            yield exporting.export(), exporting.place
    else:
        with contextlib.closing(engine("local")(workers, named=named)) as pool:
            yield from _over(pool, list(begun))


def _one_file_first(names: Iterable[str]) -> list[str]:
    """What is one file is written one shard after the other, so that it had better not begin last."""
    return sorted(names, key=lambda name: not FORMATS[name].append)


def _begun(name: str, subsets: Sequence[Samples], store: Store) -> Exporting:
    exporting = Exporting(name, FORMATS[name], store, [samples.subset for samples in subsets])
    for samples in subsets:
        exporting.add(samples, over=True)
    return exporting


def worth(names: Sequence[str], subsets: Sequence[Samples]) -> int:
    """How many processes are worth starting for so many ids and tasks."""
    ids = len(names) * sum(samples.ids for samples in subsets)
    tasks = sum(1 if FORMATS[name].append else samples.output_shards for name in names for samples in subsets)
    return max(1, min(cores(), tasks, ids // WORTH_A_WORKER))


def _over(pool: Engine, begun: list[Exporting]) -> Iterator[tuple[Export, Place]]:
    """Their tasks on an engine. Each slot has one to go on with and no more, so that all of them end together."""
    numbers, out = count(), dict[int, tuple[Exporting, Number]]()
    while begun:
        for exporting, number, task in _next(begun, 2 * pool.slots - len(out)):
            unit = next(numbers)
            out[unit] = exporting, number
            pool.submit(unit, do, task)
        for done in pool.done():
            if done.error is not None:
                raise done.error
            exporting, number = out.pop(done.number)
            exporting.took(number, done.result)
        for exporting in [exporting for exporting in begun if exporting.done]:
            begun.remove(exporting)
            yield exporting.export(), exporting.place


def _next(begun: list[Exporting], most: int) -> Iterator[tuple[Exporting, Number, Task]]:
    """At most so many of what can be done now."""
    there = ((exporting, *found) for exporting in begun for found in exporting.tasks())
    return islice(there, most)


def timed(task: Task) -> tuple[Wrote, float]:
    """Do a task; the seconds that it took."""
    start = time.perf_counter()
    return task.do(), time.perf_counter() - start


class ExportsBeside:
    """The formats `names` of a run into `folder` that is being packed; they begin anew.

    `add` output shards as they are sealed, in any order, and at the `end` all samples; `begin` tasks again and again,
    and take what is `finished`, until none is `left`.
    """

    def __init__(self, names: Sequence[str], folder: str, settings: Identity, subsets: Iterable[str]) -> None:
        nothing = RemainderEntry(settings.remainder, 0)
        # Each knows of as many as have all those before them.
        self._sealed = {name: Samples(folder, name, settings, SubsetEntry([], nothing)) for name in subsets}
        self._early: dict[str, dict[int, ShardEntry]] = {name: {} for name in self._sealed}
        self._out = 0
        store = self._sealed["train"].store
        self.left = [Exporting(name, FORMATS[name], store, list(self._sealed)) for name in _one_file_first(names)]

    def add(self, subset: str, entries: Iterable[ShardEntry]) -> None:
        """Output shards of a subset, as the manifest has them; no harm is done by those that came before."""
        samples, early = self._sealed[subset], self._early[subset]
        there = samples.entry.shards
        early |= {entry.number: entry for entry in entries if entry.number >= len(there)}
        while len(there) in early:
            there.append(early.pop(len(there)))
        for exporting in self.left:
            exporting.add(samples, over=False)

    def end(self, subsets: Iterable[Samples]) -> None:
        """All samples of each subset, now that the run is sealed."""
        for samples in subsets:
            for exporting in self.left:
                exporting.add(samples, over=True)

    def begin(self, traffic: Traffic, most: int) -> None:
        """Have tasks done that can be done now, at most so many at once."""
        for exporting, number, task in _next(self.left, max(0, most - self._out)):
            self._out += 1
            traffic.submit(partial(self._took, traffic, exporting, number), timed, task, urgent=True)

    def _took(self, traffic: Traffic, exporting: Exporting, number: Number, done: Done) -> None:
        self._out -= 1
        if done.error:
            raise done.error
        wrote, seconds = done.result
        traffic.tally.seconds["export"] += seconds
        exporting.took(number, wrote)

    def finished(self) -> Iterator[tuple[Export, Place]]:
        """Those that were finished since, for the caller to publish."""
        for exporting in [exporting for exporting in self.left if exporting.done]:
            self.left.remove(exporting)
            yield exporting.export(), exporting.place
