"""A file of lines that is written beside its place, and then goes on under its name."""

import contextlib
import os
import stat

from millstream.store.appender import locked, write_all
from millstream.store.contract import UNNAMED


class Beside:
    """Lines for a file on this machine, which get its name with `publish`; what comes later is appended.

    Another process that writes it is refused with RequestError: `told` is what it writes. What is written is whole
    lines at all times, on a full disk, too. Not published, it leaves the former file as it is, and nothing beside it. A
    link keeps its target, and the new file gets the rights of the former one. Raises OSError.
    """

    def __init__(self, path: str, told: str) -> None:
        self._path = os.path.realpath(path)
        self._temporary: str | None = temporary_of(path)
        self._former: int | None = None
        with contextlib.ExitStack() as stack:
            self._file = locked(self._temporary, os.O_RDWR | os.O_CREAT, told)
            stack.callback(os.close, self._file)
            with contextlib.suppress(FileNotFoundError):
                self._former = locked(self._path, os.O_RDWR, told)  # so that nobody else replaces it
                stack.callback(os.close, self._former)
                with contextlib.suppress(OSError):
                    os.fchmod(self._file, stat.S_IMODE(os.fstat(self._former).st_mode))
            os.ftruncate(self._file, 0)  # a run that was killed has left it
            stack.pop_all()

    def former_size(self) -> int | None:
        """Bytes of the file that is to be replaced; None: there is none."""
        return None if self._former is None else os.fstat(self._former).st_size

    def read_former(self, start: int, stop: int) -> bytes:
        assert self._former is not None
        return os.pread(self._former, stop - start, start)

    def write(self, lines: bytes) -> None:
        start = os.lseek(self._file, 0, os.SEEK_CUR)
        try:
            write_all(self._file, lines)
        except OSError:
            with contextlib.suppress(OSError):
                there = os.fstat(self._file).st_size - start
                os.ftruncate(self._file, start + lines.rfind(b"\n", 0, max(0, there)) + 1)
            raise

    def publish(self, *, durable: bool) -> None:
        """`durable`: the disk has it before. Once it is published: nothing."""
        if self._temporary is None:
            return
        if durable:
            os.fsync(self._file)
        os.replace(self._temporary, self._path)
        self._temporary = None
        if self._former is not None:
            os.close(self._former)
            self._former = None

    def close(self) -> None:
        """Raises OSError, too, if the system tells only now that something was not written."""
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, self._file)
            if self._former is not None:
                stack.callback(os.close, self._former)
            if self._temporary is not None:
                os.unlink(self._temporary)


def temporary_of(path: str) -> str:
    """Where a file is written before it gets its name; no file of anybody else's is called so."""
    folder, name = os.path.split(os.path.realpath(path))
    return os.path.join(folder, f".{name}{UNNAMED}")
