"""llm.c's data files: 256 numbers in front, then the ids."""

import numpy as np

from millstream.exports.out import Out
from millstream.folder.samples import ShardSamples

FRONTS = {"train": "train", "validation": "val"}
GPT2, LLAMA3 = (20240520, 1), (20240801, 7)
"""(magic, version) of files with ids of 16 and of 32 bits."""


def shard(given: ShardSamples, out: Out) -> int:
    """train_000000.bin and so on: i32 magic, version, number of ids; 253 zeros; the ids."""
    samples, written = given.samples, 0
    kind = GPT2 if samples.dtype.itemsize == 2 else LLAMA3
    with out.create(f"{FRONTS[samples.subset]}_{given.number:06d}.bin") as file:
        header = np.zeros(256, "<i4")
        header[:3] = (*kind, given.ids)
        file.write(header.data)
        for ids in given.flat():
            file.write(ids.data)
            written += ids.size
    return written
