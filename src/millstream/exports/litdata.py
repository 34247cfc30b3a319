"""litdata's chunks for its TokensLoader: samples back to back behind a table of offsets."""

import json

import numpy as np

from millstream.exports.format import Wrote
from millstream.exports.out import Out
from millstream.folder.samples import Samples, ShardSamples, narrow

CODES = {"<u2": 5, "<i4": 2}
"""The numbers that litdata gives to NumPy's types."""

LEAF = json.dumps([1, {"type": None, "context": None, "children_spec": []}])
"""PyTorch's description of an item that is one array."""


def shard(given: ShardSamples, out: Out) -> int:
    """train/chunk-0-0.bin and so on: u32 samples, u32 offsets of each and of the end, ids."""
    samples, rows, written = given.samples, len(given), 0
    with out.create(f"{samples.subset}/{_chunk(given.number)}") as file:
        offsets = np.arange(rows + 1) * _width(samples) + _head(rows)
        file.write(np.concatenate([[rows], offsets]).astype("<u4").data)
        for _, block, _ in given.blocks():
            file.write(narrow(block, _dtype(samples)).data)
            written += block.size
    return written


def index(samples: Samples, wrote: list[Wrote], out: Out) -> None:
    """train/index.json, which names the chunks."""
    chunks = [
        {
            "chunk_bytes": _head(done.samples) + done.samples * _width(samples),
            "chunk_size": done.samples,
            "dim": done.samples * samples.seq_len,
            "filename": _chunk(number),
        }
        for number, done in enumerate(wrote)
    ]
    config = {
        "chunk_bytes": None,
        "chunk_size": max(done.samples for done in wrote),
        "compression": None,
        "data_format": [f"no_header_numpy:{CODES[_dtype(samples)]}"],
        "data_spec": LEAF,
        "encryption": None,
        "item_loader": "TokensLoader",
    }
    with out.create(f"{samples.subset}/index.json") as file:
        file.write(json.dumps({"chunks": chunks, "config": config}, sort_keys=True).encode())


def _chunk(number: int) -> str:
    return f"chunk-0-{number}.bin"


def _head(rows: int) -> int:
    return 4 * (rows + 2)


def _width(samples: Samples) -> int:
    return samples.seq_len * np.dtype(_dtype(samples)).itemsize


def _dtype(samples: Samples) -> str:
    return "<u2" if samples.dtype.itemsize == 2 else "<i4"
