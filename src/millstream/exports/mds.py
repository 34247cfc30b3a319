"""MosaicML's MDS, version 2: columns `tokens` and `seq_lengths`, and `labels` of a run with a loss mask, all of them
ndarray:int32."""

import json
import struct
from functools import cache
from typing import Any

import numpy as np

from millstream.exports.format import Wrote
from millstream.exports.out import Out
from millstream.folder.columns import labels
from millstream.folder.samples import Samples, ShardSamples, narrow
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


def shard(given: ShardSamples, out: Out) -> int:
    """train/shard.00000.mds and so on: u32 samples, u32 offsets of each and of the end, the configuration, the
    samples."""
    samples, described = given.samples, config(given.samples.masked)
    text = json.dumps(described, sort_keys=True).encode()
    whole = _size(samples.seq_len) * (len(described["column_names"]) - 1)  # of the columns of N values
    heads = 4 * len(described["column_names"])
    with out.create(f"{samples.subset}/{_basename(given.number)}") as file:
        begin = 4 + 4 * (len(given) + 1) + len(text)
        file.write(struct.pack("<I", len(given)))
        for step in given.steps():
            counts = given.runs(*step).count.tolist()
            sizes = np.array([heads + _size(count) + whole for count in counts])
            file.write((begin + np.cumsum(sizes) - sizes).astype("<u4").data)
            begin += int(sizes.sum())
        file.write(struct.pack("<I", begin))
        file.write(text)
        written = 0
        for first, block, learned in given.blocks():
            runs, ids = given.runs(first, len(block)), narrow(block, "<i4")
            wanted = None if learned is None else labels(ids.reshape(-1), runs, learned).reshape(ids.shape)
            file.write(_encoded(ids, wanted, runs.length, runs.bounds.tolist()))
            written += block.size
    return written


def index(samples: Samples, wrote: list[Wrote], out: Out) -> None:
    """train/index.json, which names the shards."""
    described = config(samples.masked)
    shards = [
        {
            **described,
            "raw_data": {"basename": _basename(number), "bytes": done.files[0]["bytes"], "hashes": {}},
            "samples": done.samples,
            "zip_data": None,
        }
        for number, done in enumerate(wrote)
    ]
    with out.create(f"{samples.subset}/index.json") as file:
        file.write(json.dumps({"shards": shards, "version": 2}, sort_keys=True).encode())


def _basename(number: int) -> str:
    return f"shard.{number:05d}.mds"


def _encoded(ids: Ids, labels: Ids | None, lengths: Ids, bounds: list[int]) -> bytes:
    """Samples: u32 sizes of the columns, then the columns, each with its shape in front."""
    rows, seq_len = ids.shape
    flat, spans = ids.data.cast("B"), lengths.astype("<i4", copy=False).data.cast("B")
    wanted = None if labels is None else labels.data.cast("B")
    width, shape, size = 4 * seq_len, _shape(seq_len), struct.pack("<I", _size(seq_len))
    parts: list[bytes | memoryview] = []
    for row in range(rows):
        low, high = bounds[row], bounds[row + 1]
        its = slice(row * width, (row + 1) * width)
        front = (size,) if wanted else ()
        parts += (*front, struct.pack("<I", _size(high - low)), size)
        if wanted:
            parts += (shape, wanted[its])
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
