"""Parquet, read in batches that are small when they are decoded: a file of some KB may hold GBs of equal texts."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from millstream.corpus.footer import Leaf, leaves_by_group
from millstream.corpus.seen import is_text
from millstream.corpus.sources import READ, InputShard
from millstream.errors import RequestError, Unusable
from millstream.records import Ids

DECODED = 64 << 20
"""Bytes that one batch becomes at most, where equal texts are stored once."""
FAR = 8 << 20
"""Bytes of a column that are fetched at once from far away."""
_MOST_ROWS = 1 << 16
_PEEK = 1 << 16
_HEADERS = 1 << 12
_BUFFER = 1 << 9


def record_batches(
    shard: InputShard, columns: tuple[str, ...], most: int, *, start: int = 0, stop: int | None = None
) -> Iterator[tuple[int, Any]]:
    """Rows `start` to `stop` of a file, of `columns` those that are there, in record batches of about `most` decoded
    bytes, each with the number of its first row. Row groups that end before are not decoded.

    The last column is that of the id. Raises OSError, and Unusable if there is no other or if the file is damaged.
    """
    with _damage(), opened(shard, buffer_size=most) as file:
        names = file.schema_arrow.names
        if not any(name in names for name in columns[:-1]):
            raise Unusable("missing_field", f"no column {columns[0]!r}; it has {', '.join(names)}{hint(names)}")
        wanted = [name for name in columns if name in names]
        first, leaves = 0, leaves_by_group(shard, file.metadata, wanted)
        for group, count in enumerate(group_rows(file.metadata)):
            if first + count > start and (stop is None or first < stop):
                for batch in batches_of(shard, file, group, wanted, most, leaves[group]):
                    low, high = max(0, start - first), batch.num_rows if stop is None else stop - first
                    if low < batch.num_rows and high > 0:
                        yield first + low, batch.slice(low, high - low)
                    first += batch.num_rows
            else:
                first += count


@contextlib.contextmanager
def opened(shard: InputShard, **named: Any) -> Iterator[Any]:
    """A pyarrow ParquetFile, as `named` says, of which nothing is read before it is asked for; and what is far away in
    few requests, none of which goes beyond a column's end in its row group."""
    import pyarrow.parquet as pq

    if shard.far and named.get("buffer_size", 0) >= READ:
        named["buffer_size"] = FAR
    # Without a buffer, a read that a disk's error cuts off gives what came before it, which Arrow takes for damage.
    with shard.open(0 if shard.far else _BUFFER) as file, pq.ParquetFile(file, pre_buffer=False, **named) as parquet:
        yield parquet


def footer_of(shard: InputShard) -> Any:
    """What Arrow makes of a file's footer. Raises OSError and ArrowException."""
    import pyarrow.parquet as pq

    with shard.open() as file:
        return pq.read_metadata(file)


def group_rows(footer: Any) -> list[int]:
    """How many rows each row group has."""
    return [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]


def group_sizes(shard: InputShard) -> list[tuple[int, int]]:
    """(rows, bytes, uncompressed) of each row group; nothing of a file that cannot be read."""
    import pyarrow as pa

    try:
        footer = footer_of(shard)
        groups = [footer.row_group(number) for number in range(footer.num_row_groups)]
        return [(group.num_rows, group.total_byte_size) for group in groups]
    except (OSError, pa.ArrowException, UnicodeDecodeError):
        return []  # a fault when it is read


def said(error: Exception) -> str:
    """What Arrow says of a file, without a full stop, which only some of it has: ours goes on behind it.

    >>> said(ValueError("Either it is corrupted or this is not a parquet file."))
    'Either it is corrupted or this is not a parquet file'
    """
    return str(error).rstrip(". ")


@contextlib.contextmanager
def _damage() -> Iterator[None]:
    """What Arrow says of a damaged file, as Unusable."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowInvalid, UnicodeDecodeError) as error:  # names in a damaged footer need not be UTF-8
        raise Unusable("corrupt", f"damaged or no Parquet: {said(error)}") from error
    except pa.ArrowException as error:
        raise Unusable("corrupt", f"cannot be read as Parquet: {said(error)}") from error
    except OSError as error:
        if error.errno is not None:  # the disk's own; of damaged data, Arrow says the same without a number
            raise
        raise Unusable("corrupt", f"damaged Parquet: {said(error)}") from error


def batches_of(
    shard: InputShard, file: Any, group: int, columns: list[str], most: int, leaves: Iterable[Leaf] = ()
) -> Iterator[Any]:
    """The rows of a row group of an open `file` in record batches of about `most` decoded bytes, or of one row.

    `leaves` are those of the group, where they are known: what stores its texts once is decoded only once then.
    """
    once = _only_once(leaves, most)
    if once:
        yield from _from_once(shard, file, group, columns, most, once)
        return
    rows = rows_at_once(shard, file, group, columns, most)
    for batch in file.iter_batches(rows, row_groups=[group], columns=columns, use_threads=False):
        yield from _cut(batch, most)


def _only_once(leaves: Iterable[Leaf], most: int) -> list[str]:
    """The columns that store each text once, if they and numbers are all that there is, and little enough to be held.

    How long the texts are is known only when they are decoded. To look at them first is to decode them twice, which
    costs as much as all else where most are different.
    """
    leaves = list(leaves)
    texts = [leaf for leaf in leaves if leaf.text]
    if not all("." not in leaf.path and _names_alone(leaf) and leaf.unpacked <= DECODED for leaf in texts):
        return []
    rest = sum(leaf.unpacked for leaf in leaves if not leaf.text)
    return [leaf.path for leaf in texts] if rest <= most else []


def _from_once(
    shard: InputShard, whole: Any, group: int, columns: list[str], most: int, once: list[str]
) -> Iterator[Any]:
    with opened(shard, metadata=whole.metadata, read_dictionary=once, buffer_size=most) as file:
        for batch in file.iter_batches(_MOST_ROWS, row_groups=[group], columns=columns, use_threads=False):
            for piece in _cut(batch, most):
                yield _decoded_batch(piece)


def _decoded_batch(batch: Any) -> Any:
    """A batch that holds of what is stored once only its own."""
    import pyarrow as pa

    columns = [each.dictionary_decode() if pa.types.is_dictionary(each.type) else each for each in batch.columns]
    return pa.record_batch(columns, names=batch.schema.names)


def rows_at_once(shard: InputShard, file: Any, group: int, columns: Iterable[str], most: int) -> int:
    """How many rows of a row group of an open `file` to decode at once: about `most` bytes of them as they are stored,
    and less than `DECODED` even if every one has the longest of the texts that are stored once.

    Of what the footer says of single columns nothing is asked for here: in a damaged one it ends the process.
    """
    footer = file.metadata
    total, count = footer.row_group(group).total_byte_size, footer.row_group(group).num_rows
    rows = int(max(1, min(_MOST_ROWS, most * count // max(1, total))))
    if rows * total > DECODED:
        for path in _text_paths(file.schema, columns):
            rows = max(1, min(rows, DECODED // max(1, _stored_once(shard, footer, group, path).of_a_row)))
    return rows


def _text_paths(schema: Any, columns: Iterable[str]) -> list[str]:
    """The paths of what is text or bytes in these columns: of a nested one, in each of its parts."""
    wanted = set(columns)
    leaves = [schema.column(number) for number in range(len(schema.names))]
    return [
        leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY" and leaf.path.partition(".")[0] in wanted
    ]


def decoded_sizes(shard: InputShard, footer: Any, columns: Iterable[str]) -> list[int]:
    """Bytes that the `columns` of each row group become, roughly, where all texts are stored once. Raises OSError."""
    return [
        max(1, sum(_decoded(shard, footer, group, leaf) for leaf in leaves))
        if leaves
        else max(1, footer.row_group(group).total_byte_size)
        for group, leaves in enumerate(leaves_by_group(shard, footer, columns))
    ]


def _decoded(shard: InputShard, footer: Any, group: int, leaf: Leaf) -> int:
    if leaf.text and _names_alone(leaf):
        return max(leaf.unpacked, round(leaf.values * _stored_once(shard, footer, group, leaf.path).mean))
    return leaf.unpacked


def _names_alone(leaf: Leaf) -> bool:
    """Whether behind the texts that are stored once there is hardly more than their numbers."""
    if not leaf.once_at:
        return False
    once = max(0, leaf.data_at - leaf.once_at)
    return leaf.packed - once <= 8 * leaf.values + _HEADERS


class _Once(NamedTuple):
    """Bytes of the texts that are stored once: of those of the first row if all were as long as the longest, and of one
    on average."""

    of_a_row: int = 0
    mean: float = 0.0


def _stored_once(shard: InputShard, footer: Any, group: int, path: str) -> _Once:
    """Of the column at `path`. One that stores every text gives its first one."""
    import pyarrow as pa
    import pyarrow.compute as pc

    with opened(shard, metadata=footer, read_dictionary=[path], buffer_size=_PEEK) as file:
        batch = next(file.iter_batches(1, row_groups=[group], columns=[path], use_threads=False), None)
    if batch is None:
        return _Once()
    found = batch.column(0)
    while not pa.types.is_dictionary(found.type):
        if pa.types.is_struct(found.type):
            found = found.field(0)
        elif hasattr(found, "values"):
            found = found.values
        else:
            return _Once()
    lengths = pc.binary_length(found.dictionary)
    longest, mean = pc.max(lengths).as_py() or 0, pc.mean(lengths).as_py() or 0.0
    return _Once(longest * max(1, len(found)), mean)


def _cut(batch: Any, most: int) -> Iterator[Any]:
    """A batch in slices of at most `most` decoded bytes, or of one row."""
    ends = np.cumsum(sum(map(_sizes, batch.columns)))
    low = 0
    while low < batch.num_rows:
        before = ends[low - 1] if low else 0
        high = max(low + 1, int(np.searchsorted(ends, before + most, "right")))
        yield batch.slice(low, high - low)
        low = high


def lengths_of(column: Any) -> Ids | None:
    """Bytes of each text in a column; None if it is none of texts, or one is null."""
    import pyarrow.compute as pc

    if not is_text(column.type) or column.null_count:
        return None
    return np.asarray(pc.binary_length(column.cast("large_binary")), np.int64)


def _sizes(column: Any) -> Ids:
    """Bytes of each value, decoded; those of lists and the like are taken to be alike."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(column.type) and is_text(column.type.value_type):
        found = pc.binary_length(column.dictionary.cast(pa.large_binary())).take(column.indices)
    elif is_text(column.type):
        found = pc.binary_length(column.cast(pa.large_binary()))
    else:
        return np.full(len(column), column.nbytes / max(1, len(column)))
    sizes: Ids = found.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return sizes


def as_stream(batch: Any) -> bytes:
    """A batch as it is handed to whoever decodes it: in Arrow's stream format."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    data: bytes = sink.getvalue().to_pybytes()
    return data


# Values ---------------------------------------------------------------------------------------------------------------


def values_of(column: Any) -> Iterator[Any]:
    """A column's values as Python objects, UTF-8 in binary columns as text; one that cannot be had as its error."""
    try:
        values = column.to_pylist()
    except (ValueError, OverflowError):
        values = [_one_value(value) for value in column]
    if "binary" not in str(column.type):
        yield from values
        return
    for value in values:
        try:
            yield _utf8(value)
        except UnicodeDecodeError as error:
            yield error


def names_of(column: Any) -> Iterator[Any]:
    """The values of a column of ids: times as text, whatever their unit, and binary ones as text in any case."""
    import pyarrow as pa

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_temporal(kind):
        yield from (_time(value) for value in column)
        return
    for value in values_of(column):
        name = value.object if isinstance(value, UnicodeDecodeError) else value
        yield name.decode("utf-8", "backslashreplace") if isinstance(name, bytes) else name


def _one_value(value: Any) -> Any:
    try:
        return value.as_py()
    except (ValueError, OverflowError) as error:
        return error


def _utf8(value: Any) -> Any:
    """A value with its bytes as text. Raises UnicodeDecodeError."""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, dict):
        return {key: _utf8(inner) for key, inner in value.items()}
    return [_utf8(inner) for inner in value] if isinstance(value, list) else value


def _time(value: Any) -> str | None:
    """A time or a duration as Python writes it, as Arrow does where Python has none, else the number that is stored.

    What has nanoseconds is never read through as_py, as that depends on whether pandas is there.
    """
    import pyarrow as pa

    if pa.types.is_dictionary(value.type):
        value = value.dictionary[value.index.as_py()] if value.is_valid else value
    if not value.is_valid:
        return None
    if getattr(value.type, "unit", "") == "ns":
        if value.value % 1000:
            return str(value.cast(pa.string()).as_py())
        value = value.cast(_in_microseconds(value.type))
    try:
        return str(value.as_py())
    except (ValueError, OverflowError):
        return str(value.value)


def _in_microseconds(kind: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    return pa.duration("us") if pa.types.is_duration(kind) else pa.time64("us")


# Columns --------------------------------------------------------------------------------------------------------------


def check_columns(shards: Iterable[InputShard], columns: tuple[str, ...], flag: str) -> None:
    """Raises RequestError if there are Parquet files and none that can be read has one of `columns`, which `flag`
    names: that is no fault of a document. It looks no further than the first that has."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    first: tuple[str, list[str]] | None = None
    for shard in shards:
        if shard.kind != "parquet":
            continue
        try:
            with shard.open() as file:
                names = pq.read_schema(file).names
        except (OSError, pa.ArrowException, UnicodeDecodeError):
            continue  # a fault when it is read
        if any(name in names for name in columns):
            return
        first = first or (shard.called, names)
    if first:
        called, names = first
        raise RequestError(
            f"{called} has no column {columns[0]!r}; it has {', '.join(names)}{hint(names) or f': {flag}'}"
        )


def hint(names: Iterable[str]) -> str:
    """What to do about rows that have `names` and no text, if they look like conversations.

    >>> hint(["id", "messages"]), hint(["id", "body"])
    (': did you mean --chat?', '')
    """
    there = set(names)
    return ": did you mean --chat?" if "messages" in there or {"prompt", "completion"} <= there else ""
