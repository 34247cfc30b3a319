"""nanoGPT's train.bin and val.bin: 16-bit ids and nothing else."""

from collections.abc import Iterator

from millstream.folder.samples import Samples, ShardSamples
from millstream.records import Ids

NAMES = {"train": "train.bin", "validation": "val.bin"}


def file(samples: Samples) -> str:
    return NAMES[samples.subset]


def append(given: ShardSamples) -> Iterator[Ids]:
    """All ids in order, the remainder last."""
    return given.flat()
