"""nanoGPT's train.bin and val.bin: 16-bit ids and nothing else."""

from millstream.formats.exports.out import Out
from millstream.formats.exports.samples import Samples

NAMES = {"train": "train.bin", "validation": "val.bin"}


def write(samples: Samples, out: Out) -> int:
    """All ids in order, the remainder last."""
    if not samples.ids:
        return 0
    written = 0
    with out.create(NAMES[samples.subset]) as file:
        for shard in samples.shards:
            for ids in shard.flat():
                file.write(ids.data)
                written += ids.size
    return written
