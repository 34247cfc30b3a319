"""Files of this machine that are appended to, by one process, and the lock that keeps the others away; or in turns."""

import contextlib
import errno
import fcntl
import os

from millstream.errors import RequestError
from millstream.store.contract import SHORTER


class LocalAppender:
    """A file opened for appending; see `millstream.store.contract.Appender`."""

    def __init__(self, file: int, buffer: int) -> None:
        self._file, self._buffer = file, buffer
        self._held: list[bytes] = []
        self._size = 0

    def write(self, data: bytes) -> None:
        self._held.append(data)
        self._size += len(data)
        if self._size > self._buffer:
            self.flush()

    def flush(self) -> None:
        data, self._held, self._size = b"".join(self._held), [], 0
        if not data:
            return
        written = os.write(self._file, data)
        if written < len(data):
            os.ftruncate(self._file, os.fstat(self._file).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read(self, start: int, stop: int) -> bytes:
        return os.pread(self._file, stop - start, start)

    def size(self) -> int:
        return os.fstat(self._file).st_size + self._size

    def truncate(self, size: int) -> None:
        self.flush()
        os.ftruncate(self._file, size)

    def sync(self) -> None:
        self.flush()
        os.fsync(self._file)

    def close(self) -> None:
        if self._file >= 0:
            try:
                self.flush()
            finally:
                os.close(self._file)
                self._file = -1

    def __enter__(self) -> "LocalAppender":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalOnward:
    """A file of this machine from its `at`th byte on; see `millstream.store.contract.Onward`.

    Who is taken for dead may only have been cut off, and writes on. So each byte has its own place and nothing is cut.
    """

    def __init__(self, path: str, at: int) -> None:
        self._file, self._at = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666), at
        if os.fstat(self._file).st_size < at:
            os.close(self._file)
            raise OSError(errno.EIO, SHORTER, path)

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            done = os.pwrite(self._file, view, self._at)
            view, self._at = view[done:], self._at + done

    def __enter__(self) -> "LocalOnward":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def locked(path: str, flags: int, told: str) -> int:
    """A file or folder, opened and held against all others; and still at its path when it is. Raises RequestError."""
    while True:
        file = os.open(path, flags, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.stat(path), os.fstat(file)):
                    return file
        except BlockingIOError:
            os.close(file)
            raise RequestError(f"another millstream is writing {told}; wait for it, or name another place") from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # it was replaced or deleted in the meantime


def write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
