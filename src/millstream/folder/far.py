"""Arrays of a run that lies far away: of a .npy file only what is looked at is fetched, in few requests."""

import io
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, overload

import numpy as np

from millstream.folder.npy import read_header
from millstream.records import Ids

Fetch = Callable[[int, int], bytes]
Form = tuple[tuple[int, ...], "np.dtype[Any]"]
"""The shape of an array, and its type."""

BLOCK = 1 << 18
KEPT = 64 << 20
"""Bytes of files far away that are kept at most, of all together."""
_AHEAD = 16
"""Blocks that are fetched at once at most, where a file is read on and on."""
_HEAD = 4096
"""Bytes within which the header ends."""


class Blocks:
    """The blocks that were looked at last, of all files: `KEPT` bytes of them."""

    def __init__(self) -> None:
        self._kept = OrderedDict[tuple[object, int], bytes]()
        self._lock = threading.Lock()

    def read(self, owner: object, fetch: Fetch, size: int, start: int, stop: int) -> bytes:
        """A range of the file of `owner`, which has `size` bytes. Who reads on and on is ahead by more each time.

        >>> asked, blocks = [], Blocks()
        >>> def fetch(start, stop):
        ...     asked.append((start, stop))
        ...     return bytes(stop - start)
        >>> [len(blocks.read("a", fetch, 9 * BLOCK, at, at + 2)) for at in (5, BLOCK - 1, 3 * BLOCK, 3 * BLOCK + 1)]
        [2, 2, 2, 2]
        >>> [(start // BLOCK, stop // BLOCK) for start, stop in asked]
        [(0, 1), (1, 3), (3, 7)]
        """
        first, last = start // BLOCK, -(-stop // BLOCK)
        with self._lock:
            parts = {number: self._look(owner, number) for number in range(first, last)}
            missing = [number for number, data in parts.items() if data is None]
            if missing:
                low, high = missing[0], missing[-1] + 1
                high += self._follows(owner, low) if high == last else 0
        if missing:
            data = fetch(low * BLOCK, min(high * BLOCK, size))
            found = {low + at // BLOCK: data[at : at + BLOCK] for at in range(0, len(data), BLOCK)}
            parts |= {number: part for number, part in found.items() if number in parts}
            with self._lock:
                self._keep(owner, found)
        whole = b"".join(part for part in parts.values() if part is not None)
        return whole[start - first * BLOCK : stop - first * BLOCK]

    def _look(self, owner: object, number: int) -> bytes | None:
        data = self._kept.get((owner, number))
        if data is not None:
            self._kept.move_to_end((owner, number))
        return data

    def _follows(self, owner: object, number: int) -> int:
        """How many blocks more are fetched with one: as many as were read before it, one after the other."""
        before = 0
        while before < _AHEAD - 1 and (owner, number - before - 1) in self._kept:
            before += 1
        return before

    def _keep(self, owner: object, found: dict[int, bytes]) -> None:
        for number, data in found.items():
            self._kept[owner, number] = data
        while len(self._kept) * BLOCK > KEPT:
            self._kept.popitem(last=False)


_BLOCKS = Blocks()


def _bytes_of(form: Form) -> int:
    shape, dtype = form
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


class FarRows:
    """The rows of a .npy file: `fetch(start, stop)` gives its bytes, of which there are `size`.

    Rows that are large are fetched as they are; small ones with their neighbours, which are kept for a while. Whoever
    knows shape and type before, as a manifest tells them, saves the request for the header: rows are the file's end.
    """

    def __init__(self, fetch: Fetch, size: int, known: Form | None = None) -> None:
        self._fetch, self._size = fetch, size
        self._owner = object()
        if known is None or not 0 < size - _bytes_of(known) <= _HEAD:
            head = io.BytesIO(self._read(0, min(size, _HEAD)))
            known = read_header(head)
            self._begin = head.tell()
        else:
            self._begin = size - _bytes_of(known)
        self.shape, self.dtype = known
        self._width = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        if self._begin + len(self) * self._width > size:
            raise ValueError(f"it has {size} bytes, fewer than {len(self)} rows take")

    def __len__(self) -> int:
        return self.shape[0]

    @overload
    def __getitem__(self, rows: int) -> Ids: ...
    @overload
    def __getitem__(self, rows: slice) -> Ids: ...
    def __getitem__(self, rows: int | slice) -> Ids:
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            return self._rows(start, max(start, stop))
        row: Ids = self._rows(rows, rows + 1)[0]
        return row

    def _rows(self, start: int, stop: int) -> Ids:
        low, high = (self._begin + row * self._width for row in (start, stop))
        found: Ids = np.frombuffer(self._read(low, high), self.dtype).reshape(stop - start, *self.shape[1:])
        return found

    def _read(self, start: int, stop: int) -> bytes:
        if stop - start > BLOCK:
            return self._fetch(start, stop)
        return _BLOCKS.read(self._owner, self._fetch, self._size, start, stop) if start < stop else b""

    def first(self, value: int, field: str, most: int) -> int:
        """The first row whose `field`, which grows from 0 to `most`, is at least `value`; the number of rows, if none.

        It is looked for where it would be if the field grew evenly.
        """
        rows = max(1, BLOCK // self._width // 2)
        low, high, bottom, top = 0, len(self), 0, most + 1
        for turn in range(2 * len(self).bit_length() + 2):
            if low >= high:
                break
            even = low + (high - low) * (value - bottom) // max(1, top - bottom)
            guess = (low + high) // 2 if turn % 2 else even
            start = max(low, min(guess, high - 1) - rows // 2)
            column = self._rows(start, min(start + rows, high))[field]
            if column[0] >= value and start > low:
                high, top = start, int(column[0])
            elif column[-1] < value and start + len(column) < high:
                low, bottom = start + len(column), int(column[-1])
            else:
                return start + int(np.searchsorted(column, value))
        return low
