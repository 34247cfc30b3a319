"""What has been read of an input, known again by its hash, wherever reading stopped and in whatever batches it came."""

import hashlib
from typing import Any, Protocol

import numpy as np

from millstream.corpus.sources import InputShard
from millstream.errors import ResumeRefused, setting
from millstream.records import Cursor, Ids, Seen


class Watch:
    """Follows what is read of an input shard from byte or row `start` on: bytes, or record batches.

    It is hashed if `hashed`, and compared where an earlier run was: at `used.offset`, with `used.prefix`. Raises
    ResumeRefused if that is another hash, or if reading ends before.
    """

    def __init__(
        self, source: int, shard: InputShard, start: int = 0, *, used: Cursor | None = None, hashed: bool = True
    ) -> None:
        self._source, self._shard, self._start = source, shard, start
        self._hash: _Hash | None = None
        if hashed:
            self._hash = RowHash() if shard.kind == "parquet" else _ByteHash()
        self._used = used if hashed and used and used.prefix and used.source == source else None
        self.position = start

    @property
    def seen(self) -> Seen | None:
        return Seen(self._source, self._start, self.position, self.prefix) if self.prefix else None

    @property
    def prefix(self) -> str | None:
        """The hash of what was read so far."""
        return self._hash.hexdigest() if self._hash else None

    def take(self, data: Any) -> None:
        """The next bytes, or rows in a record batch."""
        count = len(data) if isinstance(data, bytes | memoryview) else data.num_rows
        low = 0
        if self._used and self.position < self._used.offset <= self.position + count:
            low = self._used.offset - self.position
            self._update(data, 0, low)
            if self.prefix != self._used.prefix:
                raise ResumeRefused(
                    f"{self._shard.called} has changed before {self._used.offset:,}, which the run has read; "
                    f"give the same input again, or start anew with {setting('overwrite', True)}"
                )
            self._used = None
        self._update(data, low, count)
        self.position += count

    def _update(self, data: Any, low: int, high: int) -> None:
        if self._hash and low < high:
            self._hash.update(data, low, high)

    def finish(self) -> None:
        """The shard has been read to its end."""
        if self._used:
            raise ResumeRefused(
                f"{self._shard.called} now ends at {self.position:,}, and the run has read to {self._used.offset:,}; "
                f"give the same input again, or start anew with {setting('overwrite', True)}"
            )


class _Hash(Protocol):
    def update(self, data: Any, low: int, high: int) -> None: ...

    def hexdigest(self) -> str: ...


class _ByteHash:
    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, data: Any, low: int, high: int) -> None:
        self._digest.update(memoryview(data)[low:high])

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


class RowHash:
    """A SHA-256 of rows that depends on their values alone, not on the batches they come in nor on how they are stored.

    Each column has one over the bytes of its values and one over how long they are, 0 for null and else the length plus
    one; so has each part of a nested column, over all rows one after the other.
    """

    def __init__(self) -> None:
        self._parts: dict[tuple[str, ...], tuple[Any, Any]] = {}

    def update(self, batch: Any, low: int, high: int) -> None:
        for number, column in enumerate(batch.columns):
            self._add((str(number),), column.slice(low, high - low))

    def hexdigest(self) -> str:
        whole = hashlib.sha256()
        for path, (values, lengths) in sorted(self._parts.items()):
            whole.update(repr(path).encode() + values.digest() + lengths.digest())
        return whole.hexdigest()

    def _add(self, path: tuple[str, ...], column: Any) -> None:
        """The values of a column, or of a part of one; none leave no trace, however often they come."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if not len(column):
            return
        column, kind = _plain(column), column.type
        values, lengths = self._parts.setdefault(path, (hashlib.sha256(), hashlib.sha256()))
        valid = column.is_valid().to_numpy(zero_copy_only=False) if column.null_count else None
        sizes = np.zeros(len(column), np.uint64)
        if pa.types.is_struct(column.type):
            for number, inner in enumerate(column.flatten()):
                self._add((*path, str(number)), inner)
        elif "list" in str(column.type).partition("<")[0]:
            sizes = _filled(pc.list_value_length(column))
            self._add((*path, "values"), column.flatten())
        elif pa.types.is_large_binary(column.type):
            data, sizes = _texts(column, valid)
            values.update(data)
        elif not pa.types.is_null(kind):
            values.update(_fixed(column, valid))
        lengths.update(_marked(sizes, valid))


def _plain(column: Any) -> Any:
    """A column in one form for all that hold the same values."""
    import pyarrow as pa

    kind = column.type
    if isinstance(kind, pa.BaseExtensionType):
        return _plain(column.storage)
    if pa.types.is_dictionary(kind):
        return _plain(column.dictionary_decode())
    if pa.types.is_map(kind):
        return column.cast(pa.list_(pa.struct([kind.key_field, kind.item_field])))
    if pa.types.is_boolean(kind):
        return column.cast(pa.uint8())
    return column.cast(pa.large_binary()) if is_text(kind) else column


def is_text(kind: Any) -> bool:
    """Whether a column holds text or bytes, in any of Arrow's forms."""
    return str(kind) in ("string", "large_string", "string_view", "binary", "large_binary", "binary_view")


def _filled(numbers: Any) -> Ids:
    found: Ids = numbers.fill_null(0).to_numpy(zero_copy_only=False)
    return found


def _texts(column: Any, valid: Ids | None) -> tuple[memoryview, Ids]:
    """(the bytes of a large_binary column, one value after the other; their lengths)."""
    import pyarrow.compute as pc

    lengths = _filled(pc.binary_length(column))
    _, offsets, data = column.buffers()
    ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    if valid is not None and ends[-1] - ends[0] != lengths.sum():  # what is null has bytes too
        return _texts(column.fill_null(b""), None)
    return memoryview(data or b"")[ends[0] : ends[-1]], lengths


def _fixed(column: Any, valid: Ids | None) -> bytes:
    """The bytes of a column whose values all have as many; zeros for null, behind which anything can stand."""
    width = column.type.bit_width // 8
    data = np.frombuffer(column.buffers()[1], np.uint8)
    rows = data[column.offset * width : (column.offset + len(column)) * width].reshape(len(column), width)
    return (rows if valid is None else rows * valid[:, None]).tobytes()


def _marked(lengths: Ids, valid: Ids | None) -> bytes:
    """Lengths plus one, 0 for null, as bytes."""
    found = lengths.astype("<u8") + np.uint64(1)
    return (found if valid is None else found * valid).astype("<u8").tobytes()
