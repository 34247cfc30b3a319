"""Everything that opens, locks, publishes or lists files. Nothing else in millstream does; a test over `ast` keeps it.

A store is a folder (`local.py`), or the objects of a bucket under a prefix (`bucket.py`), made of what obstore has:
put, put with mode "create", ranges, list. So a store promises no more:

- A file is visible whole under its name or not at all, whatever happens to the process or the disk.
- It is written from its beginning to its end and hashed on the way. Nothing is sought, and nothing is renamed.
- `create` is put-if-absent: of several processes that try, one does it. Who writes a folder at all is settled so, or by
  a `lock`, which ends with its process.
- Names have "/" between their parts. Folders in a store come with the first file in them; its own, with `make`.
- What an attempt that was killed has left has no name, and `sweep` deletes it.

Whatever the system refuses is raised as it says it, as OSError; FileNotFoundError where nothing has the name.
"""

import contextlib
import errno
import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
from typing import IO, BinaryIO, NamedTuple

from millstream.errors import RequestError
from millstream.store.contract import (
    BUCKETS,
    HUB,
    TEMPORARY,
    Appender,
    Entry,
    Listed,
    Onward,
    Readable,
    State,
    Store,
    Writer,
    WrittenFile,
)
from millstream.store.local import LocalStore

__all__ = [
    "TEMPORARY",
    "Appender",
    "Entry",
    "File",
    "Listed",
    "Onward",
    "Readable",
    "State",
    "Store",
    "Writer",
    "WrittenFile",
    "as_path",
    "at",
    "file_at",
    "from_root",
    "is_far",
    "kind_at",
    "packaged",
    "pinned",
    "readable",
    "root_of",
    "scratch",
    "target_of",
    "temporary",
    "written_now",
]


class File(NamedTuple):
    """A file by its own address, such as an input that a person names."""

    store: Readable
    name: str

    def open(self, buffer: int = -1, *, until: int | None = None, known: State | None = None) -> BinaryIO:
        return self.store.open(self.name, buffer, until=until, known=known)

    def read(self, start: int = 0, stop: int | None = None) -> bytes:
        return self.store.read(self.name, start, stop)

    def map(self) -> memoryview:
        return self.store.map(self.name)

    def text(self) -> str:
        """All of it, which has to be UTF-8, with its line ends as Python has them: raises UnicodeDecodeError, too."""
        return io.TextIOWrapper(io.BytesIO(self.read()), "utf-8").read()

    def size(self) -> int:
        return self.store.size(self.name)

    def exists(self) -> bool:
        return self.store.exists(self.name)

    def state(self, *, follow: bool = True) -> State:
        return self.store.state(self.name, follow=follow)


def at(url: str | os.PathLike[str]) -> Store:
    """The store of a folder or of a bucket's prefix, be it there or not. Raises RequestError for another address.

    >>> at("corpus/a").url, at("s3://corpora/a/").url
    ('corpus/a', 's3://corpora/a')
    """
    path = os.fspath(url)
    scheme, there, rest = path.partition("://")
    if not there or "/" in scheme:
        scheme, there, rest = path.partition(":")
        if there and scheme.lower() in (*BUCKETS, "hf"):  # else a folder of this machine would be made
            right = f"{scheme.lower()}://{rest.lstrip('/')}"
            raise RequestError(f"{path} is no address: give {right}, with two slashes")
        return LocalStore(path)
    if path.startswith(HUB):
        raise RequestError(f"{path} can only be read: write to a folder, and upload that")
    if scheme not in _STORES:
        raise RequestError(_unknown(path))
    if "@" in rest.partition("/")[0]:
        raise RequestError(f"an address has no credentials in it: {scheme}://BUCKET/..., and them in the environment")
    if scheme == "file":
        return LocalStore(rest)
    _, prefix = root_of(path)
    if {"", ".", ".."} & set(prefix.rstrip("/").split("/")) and prefix.strip("/"):
        raise RequestError(f"{path} does not work: in a bucket no folder has the name '', '.' or '..'")
    return _STORES[scheme](path)


def _unknown(path: str) -> str:
    scheme, _, rest = path.partition("://")
    known = sorted([*(f"{each}://" for each in BUCKETS), HUB])
    if f"{scheme.lower()}://" in known:
        return f"cannot open {path}: give {scheme.lower()}://{rest}, in small letters"
    return f"cannot open {path}: there is no {scheme}://, but {', '.join(known)} and files of this machine"


def _bucket(url: str) -> Store:
    # Here and below: a run that stays on this machine would take 0.03 s to load what it does not need.
    from millstream.store.bucket import Objects

    return Objects(url)


_STORES: dict[str, Callable[[str], Store]] = {"file": LocalStore} | dict.fromkeys(BUCKETS, _bucket)


def readable(url: str | os.PathLike[str]) -> Readable:
    """The same of a folder that is read, and may be one of a hub."""
    path = os.fspath(url)
    if path.startswith(HUB):
        from millstream.store.hub import Hub

        return Hub(path)
    if is_far(path) and path.partition("://")[0].lower() not in (*_STORES, "hf"):
        raise RequestError(f"{_unknown(path)}; copy it here first")
    return at(path)


def is_far(url: str) -> bool:
    """Whether an address leads away from this machine, where each question takes its time.

    >>> is_far("hf://datasets/org/name"), is_far("file:///corpus"), is_far("a:b")
    (True, False, False)
    """
    scheme, there, _ = url.partition("://")
    return bool(there) and "/" not in scheme and scheme != "file"


def root_of(url: str) -> tuple[str, str]:
    """(address of the bucket or the dataset, what follows) of what is far away. Raises RequestError.

    >>> root_of("s3://bucket/a/b.jsonl"), root_of("hf://datasets/org/name@main")
    (('s3://bucket', 'a/b.jsonl'), ('hf://datasets/org/name@main', ''))
    """
    if url.startswith(HUB):
        from millstream.store.hub import root_and_path

        return root_and_path(url)
    scheme, _, rest = url.partition("://")
    bucket, _, path = rest.partition("/")
    if not bucket:
        raise RequestError(f"{url} names no bucket: that is {scheme}://BUCKET/..., and then a file, a folder or a glob")
    return f"{scheme}://{bucket}", path


def pinned(url: str) -> str:
    """An address whose content does not move while it is read: that of a dataset gets the commit in it."""
    if not url.startswith(HUB):
        return url
    from millstream.store import hub

    return hub.pinned(url)


def file_at(url: str | os.PathLike[str]) -> File:
    """A file by its address; nothing is looked at yet. Raises FileNotFoundError for an empty one, which leads nowhere.

    >>> file_at("corpus/a.jsonl").name
    'a.jsonl'
    """
    path = os.fspath(url)
    if not path:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "")
    readable(path)  # what is no address is told as it was given, not its folder
    folder, name = root_of(path) if is_far(path) else os.path.split(path)
    return File(readable(folder), name)


def kind_at(url: str | os.PathLike[str]) -> str | None:
    """What an address leads to, as a `State` has it; None if to nothing, or where that cannot be told.

    >>> kind_at(os.devnull), kind_at(os.curdir), kind_at("no such file"), kind_at("")
    ('device', 'folder', None, None)
    """
    try:
        return file_at(url).state().kind if url else None
    except (OSError, ValueError):
        return None


def target_of(url: str | os.PathLike[str]) -> str:
    """Where an address leads to in the end, from the root on: equal for all the links that lead there."""
    return _far(url) or os.path.realpath(url)


def from_root(url: str | os.PathLike[str]) -> str:
    """An address from the root on, wherever it is said.

    >>> from_root("/corpus/../a"), from_root("s3://bucket/run/")
    ('/a', 's3://bucket/run')
    """
    return _far(url) or os.path.abspath(url)


def _far(url: str | os.PathLike[str]) -> str | None:
    path = os.fspath(url)
    return path.rstrip("/") if is_far(path) else None


def packaged(name: str) -> bytes:
    """A file of the package itself."""
    return resources.files("millstream").joinpath(name).read_bytes()


@contextlib.contextmanager
def as_path(data: bytes, suffix: str = "") -> Iterator[str]:
    """Some bytes as a file of this machine, to the end of the block, for a library that takes nothing but a path."""
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        file.write(data)
        file.flush()
        yield file.name


def scratch(folder: str | None) -> IO[bytes]:
    """A file without a name, to write and to read again; on the disk of a folder of this machine, if that is given."""
    return tempfile.TemporaryFile(dir=folder)


def temporary() -> str:
    """The folder of this machine for what does not stay."""
    return tempfile.gettempdir()


def written_now(store: Store, name: str) -> WrittenFile:
    """What a file is now, by all its bytes."""
    with store.open(name) as file:
        digest = hashlib.file_digest(file, "sha256")  # type: ignore[arg-type]  # what is opened to read has readinto
        return WrittenFile(file.tell(), digest.hexdigest())
