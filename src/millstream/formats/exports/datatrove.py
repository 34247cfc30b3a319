"""datatrove's token files: ids back to back, and where each run of a document's ids ends."""

import numpy as np

from millstream.formats.exports.out import Out
from millstream.formats.exports.samples import Samples
from millstream.records import Ids


def write(samples: Samples, out: Out) -> int:
    """train/00000.ds; .ds.index: u64 ends in ids; with padding also .ds.loss: a byte an id, 0 for padding."""
    written = 0
    for shard in samples.shards:
        name = f"{samples.subset}/{shard.number:05d}.ds"
        with out.create(name) as file:
            for ids in shard.flat():
                file.write(ids.data)
                written += ids.size
        with out.create(f"{name}.index") as file:
            end = 0
            for runs in shard.flat_runs():
                file.write((end + np.cumsum(runs.length)).astype("<u8").data)
                end += int(runs.length.sum())
        if samples.padded:
            with out.create(f"{name}.loss") as file:
                for runs in shard.flat_runs():
                    counted: Ids = np.repeat(runs.document >= 0, runs.length)
                    file.write(counted.data)
    return written
