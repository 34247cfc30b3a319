"""The store of a bucket's objects under a prefix: in S3 and what speaks as it does, in Google's and in Azure's."""

import contextlib
import errno
import hashlib
import itertools
import os
import re
import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, BinaryIO

from millstream.errors import RequestError, RunError
from millstream.store.client import T, asked, client_of, code_of
from millstream.store.contract import UNNAMED, Entry, Listed, State, Store, WrittenFile
from millstream.store.growing import Growing
from millstream.store.held import Held, held
from millstream.store.leftovers import abort_uploads
from millstream.store.local import LocalStore
from millstream.store.onward import BucketOnward, make_whole
from millstream.store.ranges import opened
from millstream.store.uploads import AT_ONCE, PART, BucketWriter, part_of

_ADDRESS = re.compile(r"(?P<root>[a-z0-9]+://[^/]+)/*(?P<prefix>.*)")
_ATTEMPT = "millstream-attempt"


@dataclass(frozen=True)
class Objects:
    """A prefix of a bucket, as `millstream.store.contract.Store` says.

    >>> Objects("s3://corpora/wiki/").below("2026").url
    's3://corpora/wiki/2026'
    """

    url: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", self.url.rstrip("/"))

    @property
    def _root(self) -> str:
        return self._address["root"]

    @property
    def _address(self) -> "re.Match[str]":
        found = _ADDRESS.fullmatch(self.url)
        if found is None:
            raise FileNotFoundError(errno.ENOENT, "it names no bucket", self.url)
        return found

    @property
    def _client(self) -> Any:
        return client_of(self._root)

    def _path(self, name: str) -> str:
        return "/".join(filter(None, (self._address["prefix"], name.rstrip("/"))))

    def _asked(self, name: str, ask: Callable[[Any, str], T]) -> T:
        """What obstore, given its client and a path, answers."""
        connection, path = self._client, self._path(name)
        return asked(self._root, path, lambda: ask(connection, path))

    def _written(self, name: str, ask: Callable[[Any, str], T]) -> T:
        """The same of what is written: raises RequestError where that is not allowed, as nothing else can be done."""
        try:
            return self._asked(name, ask)
        except PermissionError as error:
            raise RequestError(f"{error.filename}: {error.strerror}") from error

    # Reading --------------------------------------------------------------------------------------------------------

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        return bytes(self._get(name, start, stop)[0])

    def open(self, name: str, buffer: int = -1, *, until: int | None = None, known: State | None = None) -> BinaryIO:
        state = known or self.state(name)
        if state.kind != "file":
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), f"{self._root}/{self._path(name)}")
        return opened(_Ranges(self, name, state), state, buffer, until)

    def map(self, name: str) -> memoryview:
        return self._get(name, 0)[0]

    def range_of(self, name: str, start: int, stop: int, *, known: State) -> bytes:
        """A range of an object that is still as it was known to be. Raises RunError if it is another one by now, or
        cannot be read any more: that is no fault of what is in it."""
        path = f"{self._root}/{self._path(name)}"
        try:
            data, meta = self._get(name, start, stop)
        except FileNotFoundError as error:
            raise RunError(f"{path} is not there any more, since it was listed: run the same command again") from error
        except OSError as error:
            told = f"{path} cannot be read: {error.strerror}"
            raise RunError(f"{told}; run the same command again to go on") from error
        if meta is not None and self._state(meta) != known:
            raise RunError(f"{path} has changed since it was looked at: run the same command again")
        return bytes(data)

    def _get(self, name: str, start: int = 0, stop: int | None = None) -> tuple[memoryview, Any]:
        """(some bytes of an object, none where it ends before; what the server tells of it, None if nothing)"""
        if stop is not None and stop <= start:
            return memoryview(b""), None
        wanted: Any = (start, stop) if stop is not None else {"offset": start} if start else None

        def get(connection: Any, path: str) -> tuple[memoryview, Any]:
            import obstore

            try:
                found = obstore.get(connection, path, options={"range": wanted} if wanted else None)
                return memoryview(found.bytes()), found.meta
            except obstore.exceptions.BaseError as error:
                if code_of(error) in ("InvalidRange", "416"):
                    return memoryview(b""), None
                raise

        return self._asked(name, get)

    def _meta(self, name: str) -> Any:
        """What the server tells of an object."""
        if not self._path(name):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.url)

        def head(connection: Any, path: str) -> Any:
            import obstore

            try:
                return obstore.head(connection, path)
            except (obstore.exceptions.BaseError, OSError) as error:
                if code_of(error) in ("400", "401", "403"):  # an answer to HEAD cannot say why; this raises it
                    obstore.get(connection, path, options={"range": (0, 1)})
                raise

        return self._asked(name, head)

    # Writing --------------------------------------------------------------------------------------------------------

    def write(self, name: str, *, late: bool = False, brief: bool = False) -> BucketWriter:
        return BucketWriter(partial(self._upload, name), late=late, brief=brief)

    def _upload(self, name: str, data: memoryview) -> None:
        """Put what may be large. Once more, if another process has aborted the upload: it took it for a leftover."""
        options = {"chunk_size": part_of(len(data)), "max_concurrency": AT_ONCE}
        try:
            self._put(name, data, **options)
        except FileNotFoundError:
            self._put(name, data, **options)

    def _put(self, name: str, data: "bytes | memoryview", **options: Any) -> None:
        def put(connection: Any, path: str) -> None:
            import obstore

            obstore.put(connection, path, data, **options)

        self._written(name, put)

    def put(self, name: str, data: bytes) -> WrittenFile:
        self._put(name, data, use_multipart=False)
        return WrittenFile(len(data), hashlib.sha256(data).hexdigest())

    def create(self, name: str, data: bytes) -> bool:
        attempt = secrets.token_hex(8)

        def create(connection: Any, path: str) -> bool:
            import obstore

            try:
                obstore.put(connection, path, data, mode="create", attributes={_ATTEMPT: attempt})
            except obstore.exceptions.AlreadyExistsError:
                # An answer that was lost is asked for again, and then it is there: made by this very attempt.
                with contextlib.suppress(FileNotFoundError):
                    return bool(obstore.get(connection, path).attributes.get(_ATTEMPT) == attempt)
                return False
            return True

        return self._written(name, create)

    def pour(self, name: str, pieces: Callable[[], Iterator[bytes]], size: int) -> None:
        if size <= PART:
            self.put(name, b"".join(pieces()))
            return

        def pour(connection: Any, path: str) -> None:
            import obstore

            options = {"buffer_size": part_of(size), "max_concurrency": AT_ONCE}
            with obstore.open_writer(connection, path, **options) as file:
                for piece in pieces():
                    file.write(piece)

        self._written(name, pour)

    def append(self, name: str, *, at: int | None = None, buffer: int = 0, lock: str | None = None) -> Growing:
        with contextlib.ExitStack() as stack:
            lease = None if lock is None else stack.enter_context(self._held(name, lock))
            return Growing(self, name, at, lease, stack.pop_all())
        raise AssertionError

    def go_on(self, name: str, at: int) -> BucketOnward:
        return BucketOnward(self, name, at)

    def finish(self, name: str, size: int) -> None:
        make_whole(self, name, size)

    @contextlib.contextmanager
    def lock(self, name: str, told: str) -> Iterator[None]:
        with self._held(name or "folder", told):
            yield

    def _held(self, name: str, told: str) -> AbstractContextManager[Held]:
        return held(self.below(f"{name}.lock{UNNAMED}"), told)

    def turn(self, name: str) -> AbstractContextManager[None]:
        """Among the processes of this machine, whose memory it is about."""
        own = hashlib.blake2b(self.url.encode(), digest_size=8).hexdigest()
        return LocalStore(tempfile.gettempdir()).turn(f"millstream-{own}-{os.path.basename(name)}")

    def free(self) -> int | None:
        return None

    # Names ----------------------------------------------------------------------------------------------------------

    def list(self, prefix: str = "") -> Sequence[str]:
        return [found.name for found in self.found(prefix)]

    def found(self, prefix: str = "") -> Sequence[Listed]:
        above = self._address["prefix"]
        skip = len(above) + 1 if above else 0
        found = [Listed(each["path"][skip:], self._state(each)) for each in self._objects(prefix)]
        inside = len(prefix.rstrip("/"))
        folders = {prefix.rstrip("/")} | {each.name.rpartition("/")[0] for each in found}
        return sorted(each for each in found if not (_is_unnamed(each.name[inside:]) or _marks(each, folders)))

    def _objects(self, prefix: str = "", most: int | None = None) -> Sequence[Any]:
        """What the server tells of each object below a folder, of so many at most."""

        def listed(connection: Any, path: str) -> Sequence[Any]:
            import obstore

            found = itertools.chain.from_iterable(obstore.list(connection, path or None, chunk_size=most or 1000))
            return [*itertools.islice(found, most)]

        return self._asked(prefix, listed)

    def entries(self, name: str = "") -> Sequence[Entry]:
        def listed(connection: Any, path: str) -> Any:
            import obstore

            return obstore.list_with_delimiter(connection, path or None)

        path, found = self._path(name), self._asked(name, listed)
        names = {*found["common_prefixes"], *(each["path"] for each in found["objects"])} - {path}
        if not names and path:
            if self._is_file(name):
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), f"{self._root}/{path}")
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), f"{self._root}/{path}")
        shown = sorted(each.rstrip("/").rpartition("/")[2] for each in names)
        return [Entry(each, False) for each in shown if not _is_unnamed(each)]

    def state(self, name: str, *, follow: bool = True) -> State:
        try:
            return self._state(self._meta(name))
        except FileNotFoundError:
            if not self._is_folder(name):
                raise
            return State("folder", 0, 0, 0, (_number(self._root), _number(self._path(name))))

    def _state(self, meta: Any) -> State:
        """What an object is, which its tag is part of: a server's times are of whole seconds."""
        changed = int(meta["last_modified"].timestamp()) * 1_000_000_000
        identity = _number(f"{self._root}/{meta['path']}"), _number((meta["e_tag"] or "").strip('"'))
        return State("file", meta["size"], changed, changed, identity)

    def size(self, name: str) -> int:
        return int(self._meta(name)["size"])

    def exists(self, name: str) -> bool:
        try:
            return self._is_file(name) or self._is_folder(name)
        except OSError:
            return False

    def _is_file(self, name: str) -> bool:
        try:
            return bool(self._meta(name))
        except FileNotFoundError:
            return False

    def _is_folder(self, name: str) -> bool:
        return bool(self._objects(name, 1))

    def delete(self, name: str) -> None:
        self._delete(name, *(each["path"] for each in self._objects(name)))

    def delete_file(self, name: str) -> None:
        self._delete(name)

    def _delete(self, name: str, *more: str) -> None:
        def delete(connection: Any, path: str) -> None:
            import obstore

            with contextlib.suppress(FileNotFoundError):
                obstore.delete(connection, [each for each in (path, *more) if each])

        self._written(name, delete)

    def make(self) -> None:
        """Nothing: a prefix is there with its first object."""

    def unmake(self) -> None:
        """Nothing."""

    def sweep(self) -> None:
        """Abort the uploads that killed processes have left below the prefix; where that cannot be done (it takes
        rights of its own), a rule of the bucket has to do it."""
        scheme, _, bucket = self._root.partition("://")
        if scheme == "s3":
            with contextlib.suppress(OSError, RequestError):
                abort_uploads(bucket, f"{self._address['prefix']}/".lstrip("/"))

    # Folders --------------------------------------------------------------------------------------------------------

    def below(self, name: str) -> Store:
        return Objects(f"{self.url}/{name}")

    def draft(self, name: str) -> Store:
        """The folder itself: objects are not renamed, and nobody looks for them before a manifest names them."""
        return self.below(name)

    def publish(self, name: str) -> None:
        """Nothing more."""

    def withdraw(self, name: str) -> None:
        self.delete(name)


@dataclass(frozen=True)
class _Ranges:
    """Ranges of an object, which stays the same."""

    bucket: Objects
    name: str
    known: State

    def __call__(self, start: int, stop: int) -> bytes:
        return self.bucket.range_of(self.name, start, stop, known=self.known)


def _marks(found: Listed, folders: "set[str]") -> bool:
    """Whether an object only says that there is a folder, as the console of a provider makes them: "folder/"."""
    return not found.state.size and found.name in folders


def _is_unnamed(name: str) -> bool:
    return any(part.endswith(UNNAMED) for part in name.split("/"))


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
