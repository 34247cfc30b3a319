"""datatrove's token files: ids back to back, and where each run of a document's ids ends."""

import numpy as np

from millstream.exports.out import Out
from millstream.folder.samples import Runs, ShardSamples
from millstream.records import Ids


def shard(given: ShardSamples, out: Out) -> int:
    """train/00000.ds; .ds.index: u64 ends in ids; with padding or a loss mask also .ds.loss: a byte an id, 0 for
    padding and what is not to be learned."""
    samples, written = given.samples, 0
    name = f"{samples.subset}/{given.number:05d}.ds"
    with out.create(name) as file:
        for ids in given.flat():
            file.write(ids.data)
            written += ids.size
    with out.create(f"{name}.index") as file:
        end = 0
        for runs in given.flat_runs():
            file.write((end + np.cumsum(runs.length)).astype("<u8").data)
            end += int(runs.length.sum())
    if samples.padded or samples.masked:
        with out.create(f"{name}.loss") as file:
            for counted in given.flat_learned() if samples.masked else map(_no_padding, given.flat_runs()):
                file.write(np.ascontiguousarray(counted).data)
    return written


def _no_padding(runs: Runs) -> Ids:
    counted: Ids = np.repeat(runs.document >= 0, runs.length)
    return counted
