"""Megatron's indexed dataset: all ids in one .bin, and an .idx that says where each sequence is.

A sample is a sequence and a document of its own; the kept remainder is a shorter last one.
"""

import struct
from collections.abc import Iterator

import numpy as np

from millstream.formats.exports.out import Out
from millstream.formats.exports.samples import BLOCK_IDS, Samples, narrow
from millstream.records import Ids

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
CODES = {"<u2": 8, "<i4": 4}
SMALL = 65_500
"""From this vocabulary on Megatron stores 32 bits."""


def write(samples: Samples, out: Out) -> int:
    """train.bin and train.idx: `train` is the prefix that --data-path wants."""
    if not samples.ids:
        return 0
    dtype = "<u2" if samples.vocab_size is not None and samples.vocab_size < SMALL else "<i4"
    written = 0
    with out.create(f"{samples.subset}.bin") as file:
        for shard in samples.shards:
            for ids in shard.flat():
                file.write(narrow(ids, dtype).data)
                written += ids.size
    sequences = len(samples) + bool(samples.kept)
    step = samples.seq_len * np.dtype(dtype).itemsize
    with out.create(f"{samples.subset}.idx") as file:
        file.write(MAGIC + struct.pack("<QBQQ", VERSION, CODES[dtype], sequences, sequences + 1))
        for numbers in _ranges(sequences):
            lengths = np.full(len(numbers), samples.seq_len, "<i4")
            if samples.kept and numbers[-1] == sequences - 1:
                lengths[-1] = samples.kept
            file.write(lengths.data)
        for numbers in _ranges(sequences):
            file.write((numbers * step).data)
        for numbers in _ranges(sequences + 1):
            file.write(numbers.data)
    return written


def _ranges(count: int) -> Iterator[Ids]:
    for low in range(0, count, BLOCK_IDS):
        yield np.arange(low, min(low + BLOCK_IDS, count), dtype="<i8")
