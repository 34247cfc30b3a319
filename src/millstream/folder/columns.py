"""Samples as Arrow columns, for Hugging Face `datasets` and TRL: one row a sample."""

from typing import Any

import numpy as np

from millstream.folder.samples import Runs, narrow
from millstream.records import Ids
from millstream.samples import IGNORED


def schema(with_labels: bool, metadata: dict[str, str]) -> Any:
    """`input_ids`; `labels` for padding or a loss mask; `seq_lengths` and `documents` of the runs in each sample.

    Padding is a run of its own, of document -1, so that `seq_lengths` add up to N as TRL wants it.
    """
    import pyarrow as pa

    labels = [("labels", pa.list_(pa.int32()))] if with_labels else []
    names = [("seq_lengths", pa.list_(pa.int32())), ("documents", pa.list_(pa.int64()))]
    return pa.schema([("input_ids", pa.list_(pa.int32())), *labels, *names], metadata)


def batch(columns: Any, ids: Ids, runs: Runs, learned: Ids | None = None) -> Any:
    """A record batch of `columns`: samples (rows, N), their runs, and which ids are to be learned (None: all)."""
    import pyarrow as pa

    rows, seq_len = ids.shape
    flat = narrow(ids.reshape(-1), "<i4")
    even = np.arange(0, (rows + 1) * seq_len, seq_len, dtype=np.int32)
    bounds = runs.bounds.astype(np.int32)
    made = {"input_ids": (even, flat), "seq_lengths": (bounds, runs.length), "documents": (bounds, runs.document)}
    if "labels" in columns.names:
        made["labels"] = (even, labels(flat, runs, learned))
    lists = [pa.ListArray.from_arrays(*made[name]) for name in columns.names]
    return pa.record_batch(lists, columns)


def labels(ids: Ids, runs: Runs, learned: Ids | None) -> Ids:
    """i32, flat: the ids, and `IGNORED` for padding and what is not to be learned."""
    out = np.repeat(runs.document < 0, runs.length)
    if learned is not None:
        out |= ~learned.reshape(-1)
    found: Ids = np.where(out, np.int32(IGNORED), ids)
    return found
