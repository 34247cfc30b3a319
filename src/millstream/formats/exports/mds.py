"""MosaicML's MDS, version 2: columns `tokens` and `seq_lengths`, both ndarray:int32."""

import json
import struct
from functools import cache
from typing import Any

import numpy as np

from millstream.formats.exports.out import Out
from millstream.formats.exports.samples import Samples, Shard, narrow
from millstream.records import Ids

CONFIG: dict[str, Any] = {
    "column_encodings": ["ndarray:int32", "ndarray:int32"],
    "column_names": ["seq_lengths", "tokens"],
    "column_sizes": [None, None],
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
    config = json.dumps(CONFIG, sort_keys=True).encode()
    seq_len = shard.samples.seq_len
    with out.create(f"{shard.samples.subset}/{basename}") as file:
        begin = 4 + 4 * (len(shard) + 1) + len(config)
        file.write(struct.pack("<I", len(shard)))
        for step in shard.steps():
            counts = shard.runs(*step).count.tolist()
            sizes = np.array([8 + _size(count) + _size(seq_len) for count in counts])
            file.write((begin + np.cumsum(sizes) - sizes).astype("<u4").data)
            begin += int(sizes.sum())
        file.write(struct.pack("<I", begin))
        file.write(config)
        written = 0
        for first, block in shard.blocks():
            runs = shard.runs(first, len(block))
            file.write(_encoded(narrow(block, "<i4"), runs.length, runs.bounds.tolist()))
            written += block.size
    raw = {"basename": basename, "bytes": begin, "hashes": {}}
    return {**CONFIG, "raw_data": raw, "samples": len(shard), "zip_data": None}, written


def _encoded(ids: Ids, lengths: Ids, bounds: list[int]) -> bytes:
    """Samples: u32 sizes of the two columns, then the columns, each with its shape in front."""
    rows, seq_len = ids.shape
    flat, spans = ids.data.cast("B"), lengths.astype("<i4", copy=False).data.cast("B")
    parts: list[bytes | memoryview] = []
    width, shape = 4 * seq_len, _shape(seq_len)
    for row in range(rows):
        low, high = bounds[row], bounds[row + 1]
        head = struct.pack("<II", _size(high - low), _size(seq_len)) + _shape(high - low)
        parts += (head, spans[4 * low : 4 * high], shape, flat[row * width : (row + 1) * width])
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
