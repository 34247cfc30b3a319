"""Files that are read by ranges, over a network, in few requests and without one for what nobody reads."""

import io
import re
from collections.abc import Callable
from functools import partial
from typing import Any, BinaryIO, cast

from millstream.errors import RunError
from millstream.store.contract import State
from millstream.store.waiting import Underway

Bytes = bytes | memoryview
Fetch = Callable[[int, int], Bytes]
"""The bytes of a range that lies in a file; fewer of one that became shorter."""

FIRST = 1 << 16
AHEAD = 8 << 20
"""Bytes of one request at most, where reading goes on and on: 50 ms of waiting for each cost little then."""
BEHIND = 1 << 15
"""Bytes that come along from behind where reading ends: as a rule the last line ends there."""
_PATIENCE = 1.0  # seconds that what nobody wants any more is waited for
_SECRETS = re.compile(r"(?<=://)[^/\s@]*@|(?<=[\w/])\?[^\s)]+")
_GROWS = 4  # times, from one request to the next


class RangeFile(io.RawIOBase):
    """A file of `size` bytes, of which `fetch(start, stop)` gives ranges.

    What is read on and on is fetched in ever larger ranges, up to `ahead` bytes (0: as much as is asked for each time),
    and the next of them while the last is worked on. `until`: so far it will be read in any case, so the first of them
    is large already; what lies behind comes in small ones. The end of a file, where Parquet tells what is in it, is
    fetched with what is before it.
    """

    def __init__(self, fetch: Fetch, size: int, *, ahead: int = AHEAD, until: int | None = None) -> None:
        super().__init__()
        self._fetch, self._size, self._ahead = fetch, size, ahead
        self._known = until is not None
        self._until = min(size, until + BEHIND if until is not None else size) if ahead else 0
        self._at = 0
        self._start = 0
        self._data: Bytes = b""  # what was fetched last
        self._next: tuple[int, Underway[Bytes]] | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(memoryview(buffer).cast("B")))
        memoryview(buffer).cast("B")[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self.read()

    def read(self, size: int | None = -1, /) -> bytes:
        """So many bytes, fewer only at the end."""
        stop = self._size if size is None or size < 0 else min(self._at + size, self._size)
        pieces: list[Bytes] = []
        while self._at < stop:
            low = self._at - self._start
            if not 0 <= low < len(self._data):
                self._load(stop)
                low = self._at - self._start
            pieces.append(self._data[low : low + stop - self._at])
            self._at += len(pieces[-1])
        return b"".join(pieces)

    def _load(self, stop: int) -> None:
        """Fetch what lies at the position, to `stop` or further."""
        start = self._at
        goes_on = start == self._start + len(self._data)
        window = min(self._ahead, max(FIRST, _GROWS * len(self._data)) if goes_on else FIRST)
        if self._known:
            window = self._ahead
            if self._until <= start:
                self._until = min(self._size, start + BEHIND)
        elif not goes_on and start + window > self._size:
            start = max(0, self._size - window)
        coming, self._next = self._next, None
        if coming and coming[0] == start:
            self._data = coming[1].result()
        else:
            self._data = self._fetch(start, max(stop, self._end(start + window)))
        if not self._data:
            raise RunError("a file became shorter while it was read: run the same command again")
        self._start = start
        after = start + len(self._data)
        if (goes_on or self._known) and window == self._ahead and after < self._until:
            self._next = after, Underway(partial(self._fetch, after, self._end(after + window)))

    def _end(self, stop: int) -> int:
        """Where a range ends that should end at `stop`: little that is left comes along."""
        return self._until if self._until - stop <= BEHIND and self._known else min(stop, self._until)

    def close(self) -> None:
        if self._next:
            self._next[1].wait(_PATIENCE)
        self._next, self._data = None, b""
        super().close()


def opened(fetch: Fetch, state: State, buffer: int, until: int | None) -> BinaryIO:
    """A file to read, as `Store.open` gives it."""
    file = RangeFile(fetch, state.size, ahead=AHEAD if buffer < 0 else buffer, until=until)
    return cast(BinaryIO, file if buffer == 0 else io.BufferedReader(file))


def without_secrets(text: str) -> str:
    """A message without what the addresses in it may have of credentials, before a host and behind a question mark.

    >>> without_secrets("cannot reach http://me:secret@host/bucket?token=secret now")
    'cannot reach http://host/bucket now'
    """
    return _SECRETS.sub("", text)
