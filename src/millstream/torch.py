"""Run folders as a dataset for PyTorch: which sample comes next is arithmetic on one number, so a place is that number.

Needs PyTorch, `pip install 'millstream[torch]'`; no other file imports it. docs/training.md shows whole loops.

    data = PackedDataset("packed", seed=7, epochs=3)
    loader = data.loader(batch_size=8)
    for batch in loader:  # a dict of tensors, as `collate` makes it
        loss = step(model, batch)
        torch.save({"data": loader.state_dict(), ...}, "checkpoint.pt")
"""

import operator
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from typing import Any, Protocol, overload

import numpy as np
import torch
from torch import distributed
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from millstream.errors import RequestError, ResumeRefused
from millstream.folder.dataset import Dataset, gather
from millstream.options import is_count
from millstream.records import Ids
from millstream.samples import Arrays, Batch, Sample
from millstream.samples import collate as collate_samples
from millstream.sampling.numbers import count_of
from millstream.sampling.order import Order, Source, place_in, steps
from millstream.store import is_far
from millstream.streams import State, Stream

Folder = str | os.PathLike[str] | Dataset

__all__ = ["Loader", "PackedDataset", "Picked", "StreamDataset", "collate", "collate_flat", "collate_ids"]


class Picked(Sequence[Sample]):
    """Samples by their numbers in datasets; each is read when it is asked for, or all of them together by `collate`.

    Sample i is number `numbers[i]` of dataset `which[i]`.
    """

    def __init__(self, datasets: Sequence[Dataset], which: Ids, numbers: Ids) -> None:
        self.datasets, self.which, self.numbers = datasets, which, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> "Picked": ...
    def __getitem__(self, index: int | slice) -> "Sample | Picked":
        if isinstance(index, slice):
            return Picked(self.datasets, self.which[index], self.numbers[index])
        dataset = self.datasets[int(self.which[index])]
        return dataset[int(self.numbers[index])]


def _batch(samples: Iterable[Sample], arrays: Arrays | None) -> Batch:
    if isinstance(samples, Picked):
        return Batch(gather(samples.datasets, samples.which, samples.numbers, arrays), arrays)
    return collate_samples(samples)


def collate(samples: Iterable[Sample], arrays: Arrays | None = None) -> dict[str, Any]:
    """B samples of N ids as a batch for a model: a collate_fn for DataLoader, a data_collator for Trainer.

    `input_ids`, `labels` (int64) and `position_ids` (int32) are (B, N); labels are -100 where nothing is asked, and not
    shifted. `cu_seqlens` (int32) and `max_seqlen` (int) bound the segments of the batch laid flat, as flash-attn takes
    them.
    """
    batch = _batch(samples, arrays)
    return {
        "input_ids": torch.from_numpy(batch.token_ids),
        "labels": torch.from_numpy(batch.labels),
        "position_ids": torch.from_numpy(batch.position_ids),
        "cu_seqlens": torch.from_numpy(batch.cu_seqlens),
        "max_seqlen": batch.max_seqlen,
    }


def collate_flat(samples: Iterable[Sample], arrays: Arrays | None = None) -> dict[str, Any]:
    """The same batch laid flat, (1, B x N), with the bounds under the names that models of transformers take."""
    batch = collate(samples, arrays)
    bounds, longest = batch.pop("cu_seqlens"), batch.pop("max_seqlen")
    flat: dict[str, Any] = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
    return {
        **flat,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def collate_ids(samples: Iterable[Sample], arrays: Arrays | None = None) -> dict[str, Any]:
    """The ids alone, `input_ids` (B, N) int64, in about half the time, for a model that takes a batch as one text.

    A loss over them also asks for the first id of a document after the last of the one before, for padding, and for
    what a run's mask leaves out: `collate` has labels that do not.
    """
    return {"input_ids": torch.from_numpy(_batch(samples, arrays).token_ids)}


class Collate(Protocol):
    def __call__(self, samples: Iterable[Sample], arrays: Arrays | None = None) -> Any: ...


class PackedDataset(TorchDataset[Sample]):
    """The samples of one or more run folders in the order of a training run: `data[g]` is the one at place g.

    An epoch has as many samples as the folders together, and there are `epochs` of them, one after the other. Without
    `weights` each epoch has every sample once. With weights, one a folder, samples are taken from each in proportion,
    to within one sample at every place, and each folder runs through epochs of its own. `shuffle=False` leaves samples
    in the order of the folders.

    Raises RequestError if a folder is not finished or empty, or if folders differ in `seq_len` or tokenizer.
    """

    def __init__(
        self,
        folders: Folder | Iterable[Folder],
        *,
        subset: str = "train",
        weights: Sequence[float] | None = None,
        seed: int = 0,
        epochs: int = 1,
        shuffle: bool = True,
    ) -> None:
        several = [folders] if isinstance(folders, str | os.PathLike | Dataset) else folders
        if not isinstance(several, Iterable) or isinstance(several, Mapping | Set):
            raise RequestError(f"{folders!r:.80} is no run folder, and no list of them")
        self.datasets = [_opened(folder, subset) for folder in several]
        _refuse_unlike(self.datasets)
        epochs = count_of("epochs", epochs)
        sources = [Source(len(dataset), dataset.fingerprint) for dataset in self.datasets]
        self.order = Order(sources, seed=seed, weights=weights, shuffle=shuffle)
        self.epochs = epochs
        self._again = {"subset": subset, "weights": weights, "seed": seed, "epochs": epochs, "shuffle": shuffle}

    def __reduce__(self) -> tuple[Any, ...]:
        return _again, (self.datasets, self._again)

    @property
    def seq_len(self) -> int:
        return self.datasets[0].seq_len

    def __len__(self) -> int:
        return self.epochs * self.order.samples

    def __getitem__(self, place: int) -> Sample:
        if not 0 <= operator.index(place) < len(self):
            raise IndexError(f"place {place} of {len(self)}")
        return self.__getitems__([place])[0]

    def __getitems__(self, places: Sequence[int]) -> Picked:
        """The samples at these places; DataLoader asks this way for a batch."""
        chosen = (
            np.arange(places.start, places.stop, places.step)
            if isinstance(places, range)
            else np.array(places, np.int64)
        )
        return Picked(self.datasets, *self.order(chosen))

    def loader(
        self,
        batch_size: int,
        rank: int | None = None,
        world_size: int | None = None,
        *,
        workers: int = 0,
        reuse: bool = False,
        collate: Collate = collate,
    ) -> "Loader":
        """Batches for one rank, with a state to go on from; see `Loader`."""
        ranks = _ranks(rank, world_size)
        return Loader(self, batch_size, *ranks, workers=workers, reuse=reuse, collate=collate)


def _again(datasets: list[Dataset], given: dict[str, Any]) -> PackedDataset:
    return PackedDataset(datasets, **given)


def _opened(folder: Folder, subset: str) -> Dataset:
    return folder if isinstance(folder, Dataset) else Dataset(os.fspath(folder), subset)


def _refuse_unlike(datasets: Sequence[Dataset]) -> None:
    if not datasets:
        raise RequestError("there is nothing to train on: give at least one run folder")
    first = datasets[0]
    for other in datasets[1:]:
        for name in ("seq_len", "tokenizer"):
            mine, its = first.settings[name], other.settings[name]
            if mine != its:
                raise RequestError(f"{first.folder} and {other.folder} do not go together: {name} {mine} and {its}")


def _ranks(rank: int | None, world_size: int | None) -> tuple[int, int]:
    """Which of how many processes this is: as given, else as torch.distributed or torchrun say, else the only one."""
    if rank is None and world_size is None:
        if distributed.is_available() and distributed.is_initialized():
            return distributed.get_rank(), distributed.get_world_size()
        rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if rank is not None and world_size is not None and is_count(rank, 0) and is_count(world_size) and rank < world_size:
        return int(rank), int(world_size)
    raise RequestError(f"rank={rank!r}, world_size={world_size!r} does not work: give a rank from 0 to world_size - 1")


class Loader:
    """One rank's batches of `batch_size` samples, from where it is to the end of the last epoch.

    A step takes the next batch_size x world_size places of the order, for all ranks together, and this rank takes every
    world_size-th of them. So a state is one number, the same on all ranks, and whoever goes on from it may be another
    number of ranks, workers, or samples in a batch. Epochs need not be a whole number of steps. If the run is not, the
    last step has fewer samples, as many for each rank, and fewer than `world_size` are left over.

    Batches live in memory that is taken again once nothing refers to them; with `reuse` a batch is valid until the
    next. `workers` processes read ahead; they cost more than they bring unless a step is much quicker than a batch.
    """

    def __init__(
        self,
        data: PackedDataset,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        workers: int = 0,
        reuse: bool = False,
        collate: Collate = collate,
    ) -> None:
        batch_size, workers = count_of("batch_size", batch_size), count_of("workers", workers, 0)
        if len(data) < world_size:
            told = f"{len(data):,} of them, epochs and all, for {world_size:,} ranks"
            raise RequestError(f"there are fewer samples than ranks, {told}: each would train on nothing")
        if reuse and workers:
            raise RequestError(f"reuse=True works with workers=0 alone, as {workers} workers send their batches")
        self.data, self.batch_size, self.rank, self.world_size = data, batch_size, rank, world_size
        self.workers, self._collate, self._arrays = workers, collate, Arrays(reuse)
        self._place, self._turn = 0, 0

    def __len__(self) -> int:
        """How many steps are left."""
        left = max(0, len(self.data) - self._place)
        return -(-(left // self.world_size) // self.batch_size)

    def _steps(self) -> Iterator[range]:
        sizes = {"batch": self.batch_size, "rank": self.rank, "world": self.world_size}
        return steps(self._place, len(self.data), **sizes)

    def __iter__(self) -> Iterator[Any]:
        """From here on; an earlier iterator of this loader must not be used any more."""
        self._turn += 1
        turn = self._turn
        for places, batch in zip(self._steps(), self._batches(self._steps()), strict=True):
            if turn != self._turn:
                raise RequestError("this loader was started again or given a state: go on with its new iterator")
            self._place += len(places) * self.world_size
            yield batch

    def _batches(self, places: Iterator[range]) -> Iterator[Any]:
        if not self.workers:
            return (self._collate(self.data.__getitems__(step), self._arrays) for step in places)
        # A generator of its own: else DataLoader draws from the global one, and dropout is another after a resume.
        return iter(
            DataLoader(
                self.data,
                batch_sampler=_Lists(places),
                num_workers=self.workers,
                collate_fn=self._collate,
                # A fork would not have the threads that read from a bucket.
                multiprocessing_context="forkserver"
                if any(is_far(each.folder) for each in self.data.datasets)
                else None,
                generator=torch.Generator().manual_seed(0),
            )
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the run is: after the last batch handed out, whatever was read ahead. The same on all ranks."""
        return {"next": self._place, "order": self.data.order.identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there. Raises ResumeRefused if it was another order, of other folders, seed or weights."""
        self._place = place_in(state, self.data.order.identity)
        self._turn += 1


class _Lists:
    """Steps as a batch_sampler: what DataLoader sends to its workers is pickled, and lists are what it expects."""

    def __init__(self, places: Iterator[range]) -> None:
        self._places = places

    def __iter__(self) -> Iterator[list[int]]:
        return map(list, self._places)


class StreamDataset(IterableDataset[Sample]):
    """The samples of a stream for DataLoader, with the state of the last one that was handed out.

    `make` builds the stream from a state, or from None at the beginning:
    ``StreamDataset(lambda state: pack(tokenize(read("corpus")), 2048, remainder="drop", state=state))``. Of every
    `world_size` samples one is this rank's; the last ones, if they are fewer, are nobody's. Each rank reads the whole
    stream, and so would each worker of a DataLoader: leave `num_workers` at 0, then `state_dict` is exact as well.

    It is iterated once: epochs are the stream's, by `streams.repeat`. Once it has come to its end, another iteration
    raises RequestError, as a loop over epochs would train on nothing.
    """

    def __init__(
        self, make: Callable[[State | None], Stream[Sample]], rank: int | None = None, world_size: int | None = None
    ) -> None:
        if not callable(make):
            raise RequestError(f"give a function that makes the stream, lambda state: ..., not {type(make).__name__}")
        self._make = make
        self._state: State | None = None
        self._later: Callable[[], State] | None = None
        self._ended = False
        self._ranks = _ranks(rank, world_size)

    def __iter__(self) -> Iterator[Sample]:
        if get_worker_info() is not None:
            raise RequestError("a stream is read in order, by one process: give num_workers=0")
        if self._ended:
            raise RequestError("this stream has come to its end: for more epochs make it with streams.repeat")
        rank, world = self._ranks
        stream = self._made(self._now())
        try:
            while len(row := [sample for _, sample in zip(range(world), stream, strict=False)]) == world:
                self._later = stream.later()
                yield row[rank]
            self._ended = True
        finally:
            stream.close()

    def _made(self, state: State | None) -> Stream[Sample]:
        stream = self._make(state)
        if not isinstance(stream, Stream):
            raise RequestError(f"make gave {type(stream).__name__}, no stream of millstream: nobody knows its place")
        if state and state["at"] is not None and stream.state()["at"] is None:
            raise RequestError("make was given a state, and its stream begins anew: pack(..., state=state) in it")
        return stream

    def _now(self) -> State | None:
        return self._later() if self._later else self._state

    def state_dict(self) -> dict[str, Any]:
        return {"stream": self._now()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The next iteration goes on from there. Raises ResumeRefused for what is no state."""
        if not isinstance(state, Mapping) or "stream" not in state:
            raise ResumeRefused("this is no state of a StreamDataset: give what state_dict() returned")
        self._state, self._later, self._ended = state["stream"], None, False
