"""The documents of an output shard, in columns, and what is counted of them."""

from dataclasses import dataclass
from typing import Any

from millstream.records import Ids

DOCUMENT_ROWS = 1 << 16
"""Rows that are written and read together."""


@dataclass(frozen=True)
class DocumentTable:
    """Documents, in columns, as documents-K.parquet keeps them; `length` and `cut_off` in ids, `offset` in bytes or
    rows."""

    ordinal: Ids
    id: list[str]
    source: Ids
    offset: Ids
    length: Ids
    split: Ids
    cut_off: Ids


def documents_schema() -> Any:
    import pyarrow as pa

    return pa.schema(
        [
            ("ordinal", pa.uint64()),
            ("id", pa.string()),
            ("source", pa.uint32()),
            ("offset", pa.uint64()),
            ("length", pa.uint64()),
            ("split", pa.bool_()),
            ("cut_off", pa.uint64()),
        ]
    )


COUNTS = ("documents", "empty", "split", "truncated", "left_out", "cut_off")
"""What is counted of an output shard's documents, as the manifest has it."""


def count_documents(length: Ids, split: Ids, cut_off: Ids) -> dict[str, int]:
    """`COUNTS` of these documents, of which a shard's table has the columns.

    >>> import numpy as np
    >>> some = count_documents(np.array([0, 0, 4, 4]), np.array([False, False, True, True]), np.array([0, 9, 3, 0]))
    >>> some["empty"], some["left_out"], some["truncated"], some["split"], some["cut_off"]
    (1, 1, 1, 1, 12)
    """
    whole, filled = cut_off == 0, length > 0
    masks = (whole & ~filled, split & whole, ~whole & filled, ~whole & ~filled)
    counts = [len(length), *(int(mask.sum()) for mask in masks), int(cut_off.sum())]
    return dict(zip(COUNTS, counts, strict=True))
