"""litdata's chunks for its TokensLoader: samples back to back behind a table of offsets."""

import json
from typing import Any

import numpy as np

from millstream.formats.exports.out import Out
from millstream.formats.exports.samples import Samples, narrow

CODES = {"<u2": 5, "<i4": 2}
"""The numbers that litdata gives to NumPy's types."""

LEAF = json.dumps([1, {"type": None, "context": None, "children_spec": []}])
"""PyTorch's description of an item that is one array."""


def write(samples: Samples, out: Out) -> int:
    """train/chunk-0-0.bin and so on, and train/index.json, which names them.

    A chunk: u32 samples, u32 offsets of each and of the end, ids.
    """
    dtype = "<u2" if samples.dtype.itemsize == 2 else "<i4"
    width = samples.seq_len * np.dtype(dtype).itemsize
    chunks: list[dict[str, Any]] = []
    written = 0
    for shard in samples.shards:
        if not len(shard):
            continue
        rows, name = len(shard), f"chunk-0-{shard.number}.bin"
        head = 4 * (rows + 2)
        with out.create(f"{samples.subset}/{name}") as file:
            offsets = np.arange(rows + 1) * width + head
            file.write(np.concatenate([[rows], offsets]).astype("<u4").data)
            for _, block, _ in shard.blocks():
                file.write(narrow(block, dtype).data)
                written += block.size
        size = {"chunk_bytes": head + rows * width, "chunk_size": rows, "dim": rows * samples.seq_len}
        chunks.append({**size, "filename": name})
    if chunks:
        config = {
            "chunk_bytes": None,
            "chunk_size": max(chunk["chunk_size"] for chunk in chunks),
            "compression": None,
            "data_format": [f"no_header_numpy:{CODES[dtype]}"],
            "data_spec": LEAF,
            "encryption": None,
            "item_loader": "TokensLoader",
        }
        with out.create(f"{samples.subset}/index.json") as file:
            file.write(json.dumps({"chunks": chunks, "config": config}, sort_keys=True).encode())
    return written
