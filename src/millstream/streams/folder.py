"""The samples of a run folder as a stream."""

import os
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

from millstream.samples import Sample
from millstream.streams.base import At, Pair, State, Stream, a_count

if TYPE_CHECKING:
    from millstream.folder.dataset import Dataset


def samples(
    folder: "str | os.PathLike[str] | Dataset", subset: str = "train", *, state: State | None = None
) -> Stream[Sample]:
    """The samples of a finished run folder in order, and last the remainder, if one was kept.

    Where it goes on it reads nothing of what comes before. A folder may move; one with other samples is refused.
    """
    from millstream.folder.dataset import Dataset

    dataset = folder if isinstance(folder, Dataset) else Dataset(os.fspath(folder), subset)
    own = ("samples", {"subset": dataset.subset, "fingerprint": dataset.fingerprint})
    return Stream(own, partial(_numbered, dataset), check=a_count, state=state)


def _numbered(dataset: "Dataset", at: At) -> Iterator[Pair[Sample]]:
    count = len(dataset)
    for number in range(at or 0, count):
        yield dataset[number], (number + 1).__index__
    rest = dataset.remainder if (at or 0) <= count else None
    if rest is not None:
        yield rest, (count + 1).__index__
