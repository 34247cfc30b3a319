"""NumPy arrays (samples, N), one a shard, and beside each whose ids they are and which are to be learned, as in a run
folder."""

from typing import IO, Any

import numpy as np

from millstream.formats.exports.out import Out
from millstream.formats.exports.samples import Samples
from millstream.records import SEGMENT


def write(samples: Samples, out: Out) -> int:
    """samples-00000.npy; loss-00000.npy, if there is a mask; segments-00000.npy, numbered from its first sample."""
    written = 0
    for shard in samples.shards:
        if not len(shard):
            continue
        with out.create(f"{samples.subset}/samples-{shard.number:05d}.npy") as file:
            _header(file, samples.dtype, (len(shard), samples.seq_len))
            for _, block, _ in shard.blocks():
                file.write(block.data)
                written += block.size
        if samples.masked:
            with out.create(f"{samples.subset}/loss-{shard.number:05d}.npy") as file:
                _header(file, np.dtype(bool), (len(shard), samples.seq_len))
                for _, _, learned in shard.blocks():
                    file.write(np.ascontiguousarray(learned).data)
        with out.create(f"{samples.subset}/segments-{shard.number:05d}.npy") as file:
            _header(file, SEGMENT, (shard.spans,))
            for step in shard.steps():
                file.write(shard.segments(*step).data)
    return written


def _header(file: IO[bytes], dtype: "np.dtype[Any]", shape: tuple[int, ...]) -> None:
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
