"""NumPy's files (.npy): the one writer of their header, and arrays that are read where they lie."""

import io
from functools import lru_cache
from typing import Any

import numpy as np

from millstream.records import Ids
from millstream.store import Store, WrittenFile, file_at

_GROWS = 21  # digits that NumPy leaves room for in the number of rows


def header(dtype: "np.dtype[Any]", shape: tuple[int, ...], size: int = 0) -> bytes:
    """What stands before the values: `size` bytes, or as many as NumPy takes, whatever the number of rows is.

    >>> np.load(io.BytesIO(header(np.dtype("<u2"), (1, 2), 128) + bytes([7, 0, 8, 0]))).tolist()
    [[7, 8]]
    """
    # The format: 6 + 2 bytes of magic, u16 length, a dict literal padded with blanks to a multiple of 64 bytes. NumPy
    # has at least one of them, and so 64 where the text alone comes to a multiple.
    descr = np.lib.format.dtype_to_descr(dtype)
    text = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape!r}, }}"
    size = size or ((11 + len(text) + _GROWS - len(repr(shape[0]))) // 64 + 1) * 64
    return b"\x93NUMPY\x01\x00" + (size - 10).to_bytes(2, "little") + text.ljust(size - 11).encode() + b"\n"


class NpyWriter:
    """An array written in pieces, of `columns` columns or flat; `expected` rows, where that is known before."""

    def __init__(
        self, store: Store, name: str, dtype: "np.dtype[Any]", columns: int | None = None, expected: int | None = None
    ) -> None:
        self.rows = 0
        self._dtype, self._columns, self._expected = dtype, columns, expected
        self._file = store.write(name, late=expected is None)
        self._file.write(self._header(expected or 0))

    def _header(self, rows: int) -> bytes:
        shape = (rows,) if self._columns is None else (rows, self._columns)
        return header(self._dtype, shape, 256 if self._columns is None else 128)

    def write(self, rows: Ids) -> None:
        self.rows += len(rows)
        if rows.size:
            self._file.write(np.ascontiguousarray(rows, self._dtype).view(np.uint8).data)

    def finish(self) -> WrittenFile:
        return self._file.finish(None if self.rows == self._expected else self._header(self.rows))

    def close(self) -> None:
        self._file.close()


def read_header(start: io.BytesIO) -> tuple[tuple[int, ...], "np.dtype[Any]"]:
    """(shape, type) of a file that begins so; `start` is behind its header then. Raises ValueError."""
    version = np.lib.format.read_magic(start)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, columns_first, dtype = read(start)
    if columns_first or dtype.hasobject:
        raise ValueError("it is no array of numbers in rows")
    return shape, dtype


def load(path: str) -> Ids:
    """The array of a file, read-only and mapped where it can be. Raises OSError, and ValueError for what is no whole
    one."""
    data = file_at(path).map()
    # Of version 1.0 the header says how long it is; of others, which numpy takes for odd names alone, all is looked at.
    size = 10 + int.from_bytes(data[8:10], "little") if data[6:7].tolist() == [1] else 4096
    shape, dtype, begin = _header_of(bytes(data[:size]))
    count = int(np.prod(shape, dtype=np.int64))
    if not count:
        return np.zeros(shape, dtype)
    found: Ids = np.frombuffer(data, dtype, count, begin).reshape(shape)
    return found


@lru_cache(4096)
def _header_of(data: bytes) -> tuple[tuple[int, ...], "np.dtype[Any]", int]:
    """(shape, type, where the values begin). Parsing it is most of what opening a file costs, and who takes samples of
    many shards opens the same ones again and again."""
    start = io.BytesIO(data)
    return *read_header(start), start.tell()
