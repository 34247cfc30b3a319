"""MosaicML's MDS, version 2: columns `tokens` and `seq_lengths`, and `labels` of a run with a loss mask, all of them
ndarray:int32."""

import json
import struct
from functools import cache
from typing import Any

import numpy as np

from millstream.formats.exports.out import Out
from millstream.formats.exports.parquet import labels
from millstream.formats.exports.samples import Samples, Shard, narrow
from millstream.records import Ids


def config(masked: bool) -> dict[str, Any]:
    """What describes the columns; their names are sorted."""
    names = ["labels"] * masked + ["seq_lengths", "tokens"]
    return {
        "column_encodings": ["ndarray:int32"] * len(names),
        "column_names": names,
        "column_sizes": [None] * len(names),
        "compression": None,
        "format": "mds",
        "hashes": [],
        "size_limit": None,
        "version": 2,
    }


def write(samples: Samples, out: Out) -> int:
    """train/shard.00000.mds and so on, and train/index.json, which names them."""
    shards, written = [], 0
    for shard in samples.shards:
        if len(shard):
            entry, ids = _shard(shard, out)
            shards.append(entry)
            written += ids
    if shards:
        with out.create(f"{samples.subset}/index.json") as file:
            file.write(json.dumps({"shards": shards, "version": 2}, sort_keys=True).encode())
    return written


def _shard(shard: Shard, out: Out) -> tuple[dict[str, Any], int]:
    """Write one file: u32 samples, u32 offsets of each and of the end, the configuration, the samples.

    Its entry in the index, and the ids written.
    """
    basename = f"shard.{shard.number:05d}.mds"
    described = config(shard.samples.masked)
    text = json.dumps(described, sort_keys=True).encode()
    whole = _size(shard.samples.seq_len) * (len(described["column_names"]) - 1)  # of the columns of N values
    heads = 4 * len(described["column_names"])
    with out.create(f"{shard.samples.subset}/{basename}") as file:
        begin = 4 + 4 * (len(shard) + 1) + len(text)
        file.write(struct.pack("<I", len(shard)))
        for step in shard.steps():
            counts = shard.runs(*step).count.tolist()
            sizes = np.array([heads + _size(count) + whole for count in counts])
            file.write((begin + np.cumsum(sizes) - sizes).astype("<u4").data)
            begin += int(sizes.sum())
        file.write(struct.pack("<I", begin))
        file.write(text)
        written = 0
        for first, block, learned in shard.blocks():
            runs, ids = shard.runs(first, len(block)), narrow(block, "<i4")
            marked = None if learned is None else labels(ids.reshape(-1), runs, learned).reshape(ids.shape)
            file.write(_encoded(ids, marked, runs.length, runs.bounds.tolist()))
            written += block.size
    raw = {"basename": basename, "bytes": begin, "hashes": {}}
    return {**described, "raw_data": raw, "samples": len(shard), "zip_data": None}, written


def _encoded(ids: Ids, labels: Ids | None, lengths: Ids, bounds: list[int]) -> bytes:
    """Samples: u32 sizes of the columns, then the columns, each with its shape in front."""
    rows, seq_len = ids.shape
    flat, spans = ids.data.cast("B"), lengths.astype("<i4", copy=False).data.cast("B")
    marked = None if labels is None else labels.data.cast("B")
    width, shape, size = 4 * seq_len, _shape(seq_len), struct.pack("<I", _size(seq_len))
    parts: list[bytes | memoryview] = []
    for row in range(rows):
        low, high = bounds[row], bounds[row + 1]
        its = slice(row * width, (row + 1) * width)
        front = (size,) if marked else ()
        parts += (*front, struct.pack("<I", _size(high - low)), size)
        if marked:
            parts += (shape, marked[its])
        parts += (_shape(high - low), spans[4 * low : 4 * high], shape, flat[its])
    return b"".join(parts)


@cache
def _shape(count: int) -> bytes:
    """The shape of an array of `count` values: a byte with the number of axes and the width of what follows.

    >>> _shape(3), _shape(300)
    (b'\\x04\\x03', b'\\x05,\\x01')
    """
    code, form = next((code, form) for code, form in enumerate("BHIQ") if count < 1 << (8 << code))
    return struct.pack("<B" + form, 1 << 2 | code, count)


def _size(count: int) -> int:
    return len(_shape(count)) + 4 * count
