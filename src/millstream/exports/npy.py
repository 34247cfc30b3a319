"""NumPy arrays (samples, N), one a shard, and beside each whose ids they are and which are to be learned, as in a run
folder."""

import numpy as np

from millstream.exports.out import Out
from millstream.folder.npy import header
from millstream.folder.samples import ShardSamples
from millstream.records import SEGMENT


def shard(given: ShardSamples, out: Out) -> int:
    """samples-00000.npy; loss-00000.npy, if there is a mask; segments-00000.npy, numbered from its first sample."""
    samples, written = given.samples, 0
    with out.create(f"{samples.subset}/samples-{given.number:05d}.npy") as file:
        file.write(header(samples.dtype, (len(given), samples.seq_len)))
        for _, block, _ in given.blocks():
            file.write(block.data)
            written += block.size
    if samples.masked:
        with out.create(f"{samples.subset}/loss-{given.number:05d}.npy") as file:
            file.write(header(np.dtype(bool), (len(given), samples.seq_len)))
            for _, _, learned in given.blocks():
                file.write(np.ascontiguousarray(learned).data)
    with out.create(f"{samples.subset}/segments-{given.number:05d}.npy") as file:
        file.write(header(SEGMENT, (given.spans,)))
        for step in given.steps():
            file.write(given.segments(*step).data)
    return written
