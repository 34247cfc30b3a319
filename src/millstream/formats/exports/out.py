"""Where an export's files go: a folder that gets its name when all of them are durable, so nobody sees half of them."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from typing import IO, Any

from millstream.formats.manifest import TEMPORARY, file_hash, sync_folder

GONE = ".old" + TEMPORARY


class Out:
    """The folder `name` in `folder`, under a temporary name until `publish`."""

    def __init__(self, folder: str, name: str) -> None:
        self.folder, self.name = folder, name
        self.files: list[dict[str, Any]] = []
        self._root = os.path.join(folder, name + TEMPORARY)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._root)
        os.mkdir(self._root)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[IO[bytes]]:
        """A new file, durable after the block; `name` may have folders in it."""
        path = os.path.join(self._root, name)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        sync_folder(os.path.dirname(path))
        entry = {"name": f"{self.name}/{name}", "bytes": os.path.getsize(path), "sha256": file_hash(path)}
        self.files.append(entry)

    def publish(self) -> None:
        """Give the folder its name, in place of an older one."""
        sync_folder(self._root)
        delete(self.folder, self.name)
        os.rename(self._root, os.path.join(self.folder, self.name))
        sync_folder(self.folder)


def delete(folder: str, name: str) -> None:
    """Delete an export in `folder`, if there is one: its name goes first, so that nobody sees half of it."""
    path = os.path.join(folder, name)
    gone = path + GONE
    if os.path.isdir(path):
        os.rename(path, gone)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(gone)


def delete_all(folder: str, names: Iterable[str]) -> None:
    """Delete the exports in `folder` under any of `names`, whole or not."""
    for name in names:
        delete(folder, name)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(os.path.join(folder, name + TEMPORARY))
