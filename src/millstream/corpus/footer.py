"""What the footer of a Parquet file says of single columns.

Arrow is not asked: where a footer is damaged, or a column's part of it encrypted, the question ends the process.
"""

import os
from collections.abc import Iterable
from typing import Any, NamedTuple

from millstream.corpus.sources import InputShard
from millstream.corpus.thrift import STRUCT, Compact

_END = 8  # bytes: the footer's length and "PAR1"


class Leaf(NamedTuple):
    """A column, or a part of a nested one, in a row group: how many `values`, their bytes `unpacked` and `packed`, and
    where its pages begin; `once_at` is the page of texts that are stored once, 0 without."""

    path: str
    text: bool
    values: int
    unpacked: int
    packed: int
    data_at: int
    once_at: int


def leaves_by_group(shard: InputShard, footer: Any, columns: Iterable[str]) -> list[list[Leaf]]:
    """For each row group what it stores of these columns: for a nested one, each of its parts.

    `footer` is what Arrow made of it. Of a group whose columns cannot be told there is none. Raises OSError.
    """
    wanted, schema = set(columns), footer.schema
    names = [schema.column(number) for number in range(len(schema.names))]
    kept = [(number, leaf) for number, leaf in enumerate(names) if leaf.path.partition(".")[0] in wanted]
    groups = _groups(_raw(shard))
    groups += [[]] * (footer.num_row_groups - len(groups))
    return [
        [Leaf(leaf.path, leaf.physical_type == "BYTE_ARRAY", *group[number]) for number, leaf in kept]
        if len(group) == len(names)
        else []
        for group in groups
    ]


def _raw(shard: InputShard) -> bytes:
    with shard.open() as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - _END))
        length = int.from_bytes(file.read(4), "little")
        file.seek(max(0, end - _END - length))
        return file.read(length)


def _groups(data: bytes) -> list[list[tuple[int, ...]]]:
    """The numbers of each column of each row group (parquet.thrift: FileMetaData), as far as they can be read."""
    found: list[list[tuple[int, ...]]] = []
    read = Compact(data)
    try:
        for field, kind in read.fields():
            if field != 4:
                read.skip(kind)
                continue
            for inner in read.items(kind):
                found.append(_group(read, inner))
    except IndexError:
        pass  # the rest cannot be told
    return found


def _group(read: Compact, kind: int) -> list[tuple[int, ...]]:
    """The columns of a row group (RowGroup); none if one of them tells nothing."""
    columns: list[tuple[int, ...]] = []
    for field, inner in _struct(read, kind):
        if field == 1:
            columns = [_column(read, item) for item in read.items(inner)]
        else:
            read.skip(inner)
    return columns if all(columns) else []


def _column(read: Compact, kind: int) -> tuple[int, ...]:
    """Of a column (ColumnChunk, ColumnMetaData): values, bytes unpacked and packed, where its data and what is stored
    once begin. Empty if something is missing or below 0."""
    told = {11: 0}
    for field, inner in _struct(read, kind):
        if field != 3:
            read.skip(inner)
            continue
        for number, last in _struct(read, inner):
            if number in (5, 6, 7, 9, 11):
                told[number] = read.number()
            else:
                read.skip(last)
    numbers = tuple(told.get(number, -1) for number in (5, 6, 7, 9, 11))
    return numbers if min(numbers) >= 0 and max(numbers) < 1 << 62 else ()


def _struct(read: Compact, kind: int) -> Iterable[tuple[int, int]]:
    if kind != STRUCT:
        raise IndexError
    return read.fields()
