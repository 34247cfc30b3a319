"""Megatron's indexed dataset: all ids in one .bin, and an .idx that says where each sequence is.

A sample is a sequence and a document of its own; the kept remainder is a shorter last one.
"""

import struct
from collections.abc import Iterator

import numpy as np

from millstream.exports.format import Wrote
from millstream.exports.out import Out
from millstream.folder.samples import BLOCK_IDS, Samples, ShardSamples, narrow
from millstream.records import Ids

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
CODES = {"<u2": 8, "<i4": 4}
SMALL = 65_500
"""From this vocabulary on Megatron stores 32 bits."""


def file(samples: Samples) -> str:
    """train.bin: `train` is the prefix that --data-path wants."""
    return f"{samples.subset}.bin"


def append(given: ShardSamples) -> Iterator[Ids]:
    """All ids in order, the remainder last."""
    dtype = _dtype(given.samples)
    return (narrow(ids, dtype) for ids in given.flat())


def index(samples: Samples, wrote: list[Wrote], out: Out) -> None:
    """train.idx."""
    dtype, n = _dtype(samples), samples.seq_len
    whole = sum(done.samples for done in wrote)
    kept = sum(done.ids for done in wrote) - whole * n
    sequences = whole + bool(kept)
    with out.create(f"{samples.subset}.idx") as file:
        file.write(MAGIC + struct.pack("<QBQQ", VERSION, CODES[dtype], sequences, sequences + 1))
        for numbers in _ranges(sequences):
            lengths = np.full(len(numbers), n, "<i4")
            if kept and numbers[-1] == sequences - 1:
                lengths[-1] = kept
            file.write(lengths.data)
        for numbers in _ranges(sequences):
            file.write((numbers * (n * np.dtype(dtype).itemsize)).data)
        for numbers in _ranges(sequences + 1):
            file.write(numbers.data)


def _dtype(samples: Samples) -> str:
    return "<u2" if samples.vocab_size is not None and samples.vocab_size < SMALL else "<i4"


def _ranges(count: int) -> Iterator[Ids]:
    for low in range(0, count, BLOCK_IDS):
        yield np.arange(low, min(low + BLOCK_IDS, count), dtype="<i8")
