"""llm.c's data files: 256 numbers in front, then the ids."""

import numpy as np

from millstream.formats.exports.out import Out
from millstream.formats.exports.samples import Samples

FRONTS = {"train": "train", "validation": "val"}
GPT2, LLAMA3 = (20240520, 1), (20240801, 7)
"""(magic, version) of files with ids of 16 and of 32 bits."""


def write(samples: Samples, out: Out) -> int:
    """train_000000.bin and so on: i32 magic, version, number of ids; 253 zeros; the ids."""
    written = 0
    kind = GPT2 if samples.dtype.itemsize == 2 else LLAMA3
    for shard in samples.shards:
        with out.create(f"{FRONTS[samples.subset]}_{shard.number:06d}.bin") as file:
            header = np.zeros(256, "<i4")
            header[:3] = (*kind, shard.ids)
            file.write(header.data)
            for ids in shard.flat():
                file.write(ids.data)
                written += ids.size
    return written
