"""Objects that are written: seen whole or not at all."""

import hashlib
import io
import mmap
import tempfile
from collections.abc import Callable
from typing import IO, Any

from millstream.store.contract import WrittenFile

PART = 8 << 20
"""Bytes of an upload's part; what is shorter goes up at once, and is kept in memory until then."""
_PARTS = 9_000
"""Parts that an upload has at most: S3 takes 10,000."""
AT_ONCE = 4

Put = Callable[[memoryview], object]


def part_of(size: int) -> int:
    """Bytes of each part of an upload of so many."""
    return max(PART, -(-size // _PARTS))


class BucketWriter:
    """An object that goes up when it is finished, from a file of this machine that has no name.

    So nothing is open on the server meanwhile, a head that comes last costs nothing, and what the server did not take
    is still here. It takes as much of the disk of `TMPDIR` as is written.
    """

    def __init__(self, put: Put, *, late: bool = False, brief: bool = False) -> None:
        self._put, self._late, self._brief = put, late, brief
        self._file: IO[bytes] = io.BytesIO()
        self._hash = hashlib.sha256()
        self._size = 0
        self._written: WrittenFile | None = None

    @property
    def closed(self) -> bool:
        return self._file.closed

    @property
    def written(self) -> WrittenFile:
        assert self._written is not None, "it is not finished"
        return self._written

    def write(self, data: Any, /) -> int:
        if self._file.closed:
            return len(data)  # given up
        view = memoryview(data).cast("B")
        if not (self._late or self._brief):
            self._hash.update(view)
        if isinstance(self._file, io.BytesIO) and self._size + len(view) > PART:
            short, self._file = self._file, tempfile.TemporaryFile()  # noqa: SIM115  # `close` does
            self._file.write(short.getvalue())
        self._file.write(view)
        self._size += len(view)
        return len(view)

    def tell(self) -> int:
        return self._size

    def flush(self) -> None:
        """Nothing: nobody sees the object before it is finished."""

    def settle(self, head: bytes | None = None) -> None:
        """What follows is only the way up."""
        if head is not None and not self._file.closed:
            self._late = True
            self._file.seek(0)
            self._file.write(head)

    def finish(self, head: bytes | None = None) -> WrittenFile:
        self.settle(head)
        data = self._whole()
        if self._late and not self._brief:
            self._hash = hashlib.sha256(data)
        self._put(data)
        self._written = WrittenFile(self._size, "" if self._brief else self._hash.hexdigest())
        self.close()
        return self._written

    def _whole(self) -> memoryview:
        if isinstance(self._file, io.BytesIO):
            return memoryview(self._file.getvalue())
        self._file.flush()
        return memoryview(mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_READ))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> "BucketWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None and self._written is None:
                self.finish()
        finally:
            self.close()
