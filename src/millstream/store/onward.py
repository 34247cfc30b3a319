"""An object that is written by several, one after the other: each leaves parts, of which it is made in the end."""

import contextlib
import errno

from millstream.store.contract import SHORTER, UNNAMED
from millstream.store.growing import MOST, Pouring, blocks, in_order


class BucketOnward:
    """Parts of an object that is not there yet, each called by its place; see `millstream.store.contract.Onward`."""

    def __init__(self, store: Pouring, name: str, at: int) -> None:
        self._store, self._folder, self._at = store, name + UNNAMED, at
        self._part = bytearray()

    def write(self, data: bytes) -> None:
        self._part += data
        while len(self._part) >= MOST:  # always as long, so that parts of one name have the same bytes
            self._put(MOST)

    def _put(self, size: int) -> None:
        self._store.put(f"{self._folder}/{self._at:020d}", bytes(self._part[:size]))
        del self._part[:size]
        self._at += size

    def __enter__(self) -> "BucketOnward":
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None and self._part:
            self._put(len(self._part))


def make_whole(store: Pouring, name: str, size: int) -> None:
    """Make one object of its parts; see `contract.Store.finish`."""
    pieces = in_order(0, store.found(name + UNNAMED))
    if pieces and pieces[-1].stop == size:
        with contextlib.suppress(FileNotFoundError):  # another one has made it whole just now, and deleted them
            store.pour(name, lambda: blocks(store, pieces, size), size)
    if store.size(name) != size:
        raise OSError(errno.EIO, SHORTER, f"{store.url}/{name}")
    store.delete(name + UNNAMED)
