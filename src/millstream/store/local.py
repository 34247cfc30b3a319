"""The store of a folder on this machine, or on a disk that it mounts."""

import contextlib
import errno
import fcntl
import mmap
import os
import re
import shutil
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from millstream.store.appender import LocalAppender, LocalOnward, locked
from millstream.store.contract import SHORTER, TEMPORARY, UNNAMED, Entry, Listed, State, Store, WrittenFile
from millstream.store.writer import LocalWriter

_UNNAMED = re.compile(r".+\.[0-9a-f]{8}" + re.escape(UNNAMED))
"""What has no name yet is called so, by an attempt's own number: two attempts at one file do not meet."""
_GONE = ".old" + TEMPORARY
_KINDS = ((stat.S_ISREG, "file"), (stat.S_ISDIR, "folder"), (stat.S_ISFIFO, "pipe"))


@dataclass(frozen=True)
class LocalStore:
    """A folder, as `millstream.store.contract.Store` says."""

    url: str

    def _path(self, name: str) -> str:
        return os.path.join(self.url, name) if name else self.url or "."

    # Reading --------------------------------------------------------------------------------------------------------

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        with self.open(name, 0) as file:
            if start:
                file.seek(start)
            return file.read() if stop is None else _read_all(file, stop - start)

    def open(self, name: str, buffer: int = -1, *, until: int | None = None, known: State | None = None) -> BinaryIO:
        return open(self._path(name), "rb", buffering=buffer)

    def map(self, name: str) -> memoryview:
        with self.open(name, 0) as file:
            if not os.fstat(file.fileno()).st_size:
                return memoryview(b"")  # which no system maps
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    # Writing --------------------------------------------------------------------------------------------------------

    def write(self, name: str, *, late: bool = False, brief: bool = False) -> "LocalWriter":
        return LocalWriter(self._made(name), late, brief)

    def _made(self, name: str) -> str:
        """A file's path, with the folders that its name has in it."""
        path = self._path(name)
        if os.path.dirname(name):
            os.makedirs(os.path.dirname(path), exist_ok=True)
        return path

    def put(self, name: str, data: bytes) -> WrittenFile:
        with self.write(name) as file:
            file.write(data)
            self._sync_above(name)
        sync_folder(os.path.dirname(self._path(name)))
        return file.written

    def create(self, name: str, data: bytes) -> bool:
        with self.write(name) as file:
            file.write(data)
            self._sync_above(name)
            if not file.finish_if_absent():
                return False
        sync_folder(os.path.dirname(self._path(name)))
        return True

    def _sync_above(self, name: str) -> None:
        folder = os.path.dirname(name)
        while folder:
            sync_folder(self._path(folder))
            folder = os.path.dirname(folder)
        sync_folder(self._path(""))

    def append(self, name: str, *, at: int | None = None, buffer: int = 0, lock: str | None = None) -> "LocalAppender":
        path = self._made(name)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        file = LocalAppender(os.open(path, flags, 0o666) if lock is None else locked(path, flags, lock), buffer)
        if at is not None:
            if at > file.size():
                file.close()
                raise OSError(errno.EIO, SHORTER, path)
            file.truncate(at)
        return file

    def go_on(self, name: str, at: int) -> LocalOnward:
        return LocalOnward(self._made(name), at)

    def finish(self, name: str, size: int) -> None:
        path = self._path(name)
        file = os.open(path, os.O_RDWR)
        try:
            os.fsync(file)
            if os.fstat(file).st_size != size:
                raise OSError(errno.EIO, "it is not as long as what was written", path)
        finally:
            os.close(file)

    @contextlib.contextmanager
    def lock(self, name: str, told: str) -> Iterator[None]:
        file = locked(self._path(name), os.O_RDONLY, told)
        try:
            yield
        finally:
            os.close(file)

    @contextlib.contextmanager
    def turn(self, name: str) -> Iterator[None]:
        file = os.open(self._made(name), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
        finally:
            os.close(file)

    def free(self) -> int | None:
        path = os.path.abspath(self.url)
        while True:
            try:
                return shutil.disk_usage(path).free
            except FileNotFoundError:
                path = os.path.dirname(path)  # it is not made yet, or not on every system a disk of its own
            except OSError:
                return None

    # Names ----------------------------------------------------------------------------------------------------------

    def list(self, prefix: str = "") -> Sequence[str]:
        found = []
        for folder, folders, files in os.walk(self._path(prefix)):
            folders[:] = [each for each in folders if not each.endswith(TEMPORARY)]
            inside = os.path.relpath(folder, self.url or ".")
            found += [os.path.normpath(os.path.join(inside, each)) for each in files if not _UNNAMED.fullmatch(each)]
        return sorted(found)

    def found(self, prefix: str = "") -> Sequence[Listed]:
        found = []
        for name in self.list(prefix):
            with contextlib.suppress(FileNotFoundError):  # another one has just deleted it
                found.append(Listed(name, self.state(name)))
        return found

    def entries(self, name: str = "") -> Sequence[Entry]:
        with os.scandir(self._path(name)) as entries:
            return sorted(Entry(each.name, each.is_symlink()) for each in entries if not _UNNAMED.fullmatch(each.name))

    def state(self, name: str, *, follow: bool = True) -> State:
        return state_of(os.stat(self._path(name), follow_symlinks=follow))

    def size(self, name: str) -> int:
        return os.stat(self._path(name)).st_size

    def exists(self, name: str) -> bool:
        return os.path.exists(self._path(name))

    def delete(self, name: str) -> None:
        path = self._path(name)
        try:
            os.unlink(path)
        except (FileNotFoundError, NotADirectoryError):  # the second where a folder of its path is a file
            pass
        except (IsADirectoryError, PermissionError):  # the second is what macOS says of a folder
            if not os.path.isdir(path) or os.path.islink(path):
                raise
            shutil.rmtree(path)

    def delete_file(self, name: str) -> None:
        self.delete(name)

    def make(self) -> None:
        os.makedirs(self.url or ".", exist_ok=True)

    def unmake(self) -> None:
        with contextlib.suppress(OSError):
            os.rmdir(self.url)

    def sweep(self) -> None:
        with os.scandir(self.url or ".") as entries:
            for each in entries:
                if _UNNAMED.fullmatch(each.name):
                    self.delete(each.name)

    # Folders --------------------------------------------------------------------------------------------------------

    def below(self, name: str) -> Store:
        return LocalStore(self._path(name))

    def draft(self, name: str) -> Store:
        return LocalStore(self._path(name) + TEMPORARY)

    def publish(self, name: str) -> None:
        path = self._path(name)
        for folder, _, _ in os.walk(path + TEMPORARY):
            # what was left by a worker that was killed, and whose work another has done again
            LocalStore(folder).sweep()
            sync_folder(folder)
        self.withdraw(name)
        os.rename(path + TEMPORARY, path)
        sync_folder(os.path.dirname(path))

    def withdraw(self, name: str) -> None:
        """Delete a published folder: its name goes first, so that nobody sees half of it."""
        path = self._path(name)
        if os.path.isdir(path):
            os.rename(path, path + _GONE)
        self.delete(name + _GONE)


def state_of(found: os.stat_result) -> State:
    """What the system tells of a file."""
    mode = found.st_mode
    kind = next((kind for is_one, kind in _KINDS if is_one(mode)), "device")
    return State(kind, found.st_size, found.st_mtime_ns, found.st_ctime_ns, (found.st_dev, found.st_ino))


def _read_all(file: BinaryIO, size: int) -> bytes:
    """The next bytes of a file without a buffer, which may give fewer at once."""
    data = file.read(size)
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


def sync_folder(path: str) -> None:
    file = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
