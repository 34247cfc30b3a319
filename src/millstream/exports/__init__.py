"""The formats that trainers read, one file each, and the one table of them."""

from collections.abc import Sequence

from millstream.errors import RequestError, setting
from millstream.exports import datatrove, litdata, llmc, mds, megatron, nanogpt, npy, parquet
from millstream.exports.format import Format

FORMATS = {
    "npy": Format(32, npy.shard, masked=True),
    "parquet": Format(31, parquet.shard, masked=True),
    "megatron": Format(31, file=megatron.file, append=megatron.append, index=megatron.index, flat=True),
    "mds": Format(31, mds.shard, index=mds.index, masked=True),
    "datatrove": Format(32, datatrove.shard, flat=True, masked=True),
    "litdata": Format(31, litdata.shard, index=litdata.index),
    "nanogpt": Format(16, file=nanogpt.file, append=nanogpt.append, flat=True),
    "llm.c": Format(32, llmc.shard, flat=True),
}


def check_formats(names: Sequence[str], vocab_size: int | None, masked: bool = False) -> None:
    """Raises RequestError for a format that is unknown, or that cannot hold the ids of such a vocabulary or, if the run
    is `masked`, which of them are to be learned.

    Without a vocabulary ids have 32 bits; those that are too large for a format are found when they are read.
    """
    for name in names:
        if name not in FORMATS:
            raise RequestError(f"{setting('format', name)} is unknown: give one or more of {', '.join(FORMATS)}")
        bits = FORMATS[name].bits
        if masked and not FORMATS[name].masked:
            able = ", ".join(name for name, format in FORMATS.items() if format.masked)
            raise RequestError(
                f"{name} has no place for which ids are to be learned; {able} have. "
                f"{setting('loss', 'all')} learns every id"
            )
        if vocab_size is None and bits <= 16:
            raise RequestError(f"{name} holds ids of {bits} bits; without a tokenizer they have 32")
        if vocab_size is not None and vocab_size > 1 << bits:
            raise RequestError(f"{name} holds ids of {bits} bits; the vocabulary has {vocab_size:,}")


def largest_id(names: Sequence[str]) -> int:
    """The largest id that all of these formats can hold.

    >>> largest_id(["npy"]), largest_id(["npy", "mds"])
    (4294967295, 2147483647)
    """
    return (1 << min(FORMATS[name].bits for name in names)) - 1
