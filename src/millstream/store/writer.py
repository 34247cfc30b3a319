"""Files of this machine that are seen whole or not at all."""

import contextlib
import errno
import hashlib
import io
import os
import secrets
from typing import Any

from millstream.store.contract import UNNAMED, WrittenFile

_BUFFER = 1 << 18
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}


class LocalWriter:
    """A file under a name of its own, until `finish` gives it the one that is meant."""

    def __init__(self, path: str, late: bool = False, brief: bool = False) -> None:
        self._path, self._late, self._brief = path, late, brief
        self._temporary = f"{path}.{secrets.token_hex(4)}{UNNAMED}"
        self._raw = _Hashing(self._temporary, hashed=not (late or brief))
        self._buffered = io.BufferedWriter(self._raw, _BUFFER)
        self._written: WrittenFile | None = None
        self._named = False
        self.write, self.tell = self._buffered.write, self._buffered.tell

    @property
    def closed(self) -> bool:
        return self._written is not None or self._raw.given_up

    @property
    def written(self) -> WrittenFile:
        assert self._written is not None, "it is not finished"
        return self._written

    def flush(self) -> None:
        """Nothing: nobody sees the file before it is finished."""

    def settle(self, head: bytes | None = None) -> None:
        if self._written is None:
            self._end(head)

    def finish(self, head: bytes | None = None) -> WrittenFile:
        self.settle(head)
        os.replace(self._temporary, self._path)
        self._named = True
        return self.written

    def finish_if_absent(self) -> bool:
        """The same, unless something has the name already: then false."""
        self.settle()
        try:
            os.link(self._temporary, self._path)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            return self._reserve()
        return True

    def _reserve(self) -> bool:
        """Where a disk has no links: for a moment there is an empty file of the name."""
        try:
            os.close(os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            return False
        self.finish()
        return True

    def _end(self, head: bytes | None) -> None:
        self._buffered.flush()
        size, file = self._raw.size, self._raw.fileno()
        if head is not None:
            os.pwrite(file, head, 0)
        if self._brief:
            self._written = WrittenFile(size, "")
        else:
            if head is not None or self._late:
                self._raw.hash = _hash_of(file, size)
            os.fsync(file)
            self._written = WrittenFile(size, self._raw.hash.hexdigest())
        self._buffered.close()

    def close(self) -> None:
        if self._written is None and not self._raw.given_up:
            self._raw.give_up()
        if not self._named:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._temporary)

    def __enter__(self) -> "LocalWriter":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if kind is None and self._written is None:
                self.finish()
        finally:
            self.close()


class _Hashing(io.RawIOBase):
    """A new file that is hashed as it is written; once it is given up, what is written goes nowhere."""

    def __init__(self, path: str, hashed: bool) -> None:
        super().__init__()
        self.size, self.given_up = 0, False
        self.hash: Any = hashlib.sha256()
        self._hashed = hashed
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file

    def tell(self) -> int:
        return self.size

    def write(self, data: Any, /) -> int:
        if self.given_up:
            return len(data)
        view = memoryview(data)[:_BUFFER]  # hashed before it has left the processor's cache
        done = os.write(self._file, view)
        if self._hashed:
            self.hash.update(view[:done])
        self.size += done
        return done

    def give_up(self) -> None:
        self.given_up = True
        os.close(self._file)

    def close(self) -> None:
        if not self.closed:
            super().close()
            if not self.given_up:
                os.close(self._file)


def _hash_of(file: int, size: int) -> Any:
    digest = hashlib.sha256()
    for at in range(0, size, _BUFFER):
        digest.update(os.pread(file, _BUFFER, at))
    return digest
