"""What a store is, be it a folder or a bucket: see `millstream.store`."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import BinaryIO, NamedTuple, Protocol

BUCKETS = ("az", "gs", "s3")
"""The schemes of addresses in buckets."""

HUB = "hf://"
"""What an address on the Hugging Face hub begins with."""

TEMPORARY = ".tmp"
"""The end of every name under which something is that is not whole yet."""

UNNAMED = ".millstream" + TEMPORARY
"""The end of the names that attempts at files have, which are nobody else's."""

SHORTER = "it became shorter"
"""What is told of a file that is to go on behind its end."""


class WrittenFile(NamedTuple):
    """What a file has become: its bytes, and the SHA-256 of them in hexadecimal digits."""

    bytes: int
    sha256: str


class State(NamedTuple):
    """What a file is now: two states that are equal are of one content.

    `kind` is file, folder, pipe or device (a terminal, too, or a socket). `changed` is when its content was, `touched`
    when anything of it was, in ns. `identity` is the same for one file under all the names that lead to it.
    """

    kind: str
    size: int
    changed: int
    touched: int
    identity: tuple[int, int]


class Entry(NamedTuple):
    """A file or folder as its folder lists it; `link`: it is a symbolic link, and may lead anywhere."""

    name: str
    link: bool


class Writer(Protocol):
    """A file that is being written: ``with store.write(name) as file``, or `finish` or `close` without a block.

    What pyarrow asks of a file to write to is here as well.
    """

    @property
    def closed(self) -> bool: ...

    @property
    def written(self) -> WrittenFile:
        """What the file has become; once it is finished."""

    def write(self, data: "bytes | bytearray | memoryview", /) -> int: ...

    def tell(self) -> int:
        """Bytes written so far."""

    def flush(self) -> None:
        """Nothing: nobody sees the file before it is finished."""

    def settle(self, head: bytes | None = None) -> None:
        """All of it is durable, and no descriptor is held for it; it has no name before it is finished."""

    def finish(self, head: bytes | None = None) -> WrittenFile:
        """Give the file its name, durably. `head` comes in place of as many bytes at its beginning, which were written
        before it was known; then the file is read once more for its hash."""

    def close(self) -> None:
        """Give up, if it is not finished: nothing of it is left, and what is written afterwards goes nowhere."""

    def __enter__(self) -> "Writer": ...

    def __exit__(self, kind: object, error: object, trace: object) -> None: ...


class Appender(Protocol):
    """A file that lines are appended to, to the end of a run."""

    def write(self, data: bytes) -> None:
        """Append `data`, all of it or nothing: what a full disk took of it is taken back. It survives this process at
        once, or where appending is buffered, after `flush`."""

    def read(self, start: int, stop: int) -> bytes:
        """The bytes of a range; fewer where the file ends."""

    def size(self) -> int:
        """Bytes, with those that are still buffered."""

    def truncate(self, size: int) -> None: ...

    def flush(self) -> None: ...

    def sync(self) -> None:
        """Wait for the disk: what was appended survives the machine's end, too."""

    def close(self) -> None: ...

    def __enter__(self) -> "Appender": ...

    def __exit__(self, *_: object) -> None: ...


class Onward(Protocol):
    """A stretch of a file, written from its beginning to its end."""

    def write(self, data: bytes) -> None: ...


class Listed(NamedTuple):
    """A file as a store lists it, without a request for each: its name there, and what it is."""

    name: str
    state: State


class Readable(Protocol):
    """A folder that can be read, here or far away. It can be pickled, and opened again by its `url`."""

    @property
    def url(self) -> str: ...

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes:
        """A range of a file's bytes; fewer where it ends before."""

    def open(self, name: str, buffer: int = -1, *, until: int | None = None, known: State | None = None) -> BinaryIO:
        """A file to read and to seek in. `buffer`: bytes read ahead at most, 0 for none, -1 for as many as is usual, of
        what lies behind `until` as few as can be. `known`: what it is known to be, so that a store far away is not
        asked, and raises RunError if it is another one by now."""

    def map(self, name: str) -> "memoryview":
        """A file's bytes, read-only; they are read when they are looked at, where the system can do that."""

    def list(self, prefix: str = "") -> Sequence[str]:
        """The names of all files below a folder, sorted, as this store calls them."""

    def found(self, prefix: str = "") -> Sequence[Listed]:
        """The same, with what each of them is."""

    def entries(self, name: str = "") -> Sequence[Entry]:
        """What is in a folder itself, sorted; what is not whole yet is not there."""

    def state(self, name: str, *, follow: bool = True) -> State:
        """What a file is now; of a link itself, unless we `follow` it."""

    def size(self, name: str) -> int: ...

    def exists(self, name: str) -> bool:
        """Whether there is a file or a folder of this name; false, too, where that cannot be told."""


class Store(Readable, Protocol):
    """A folder, or the objects of a bucket under a prefix, which can be written to as well."""

    def write(self, name: str, *, late: bool = False, brief: bool = False) -> Writer:
        """A new file, in place of what has the name when it is finished. `late`: its first bytes will come last, as the
        `head` of `finish`, so that it is hashed only then. `brief`: it may be garbage after the machine's end, and
        is not hashed; whoever reads it has to see whether it is whole."""

    def put(self, name: str, data: bytes) -> WrittenFile:
        """A small file at once, in place of what has the name. What was finished before it, in its folder or in one
        above it in this store, has its name durably before it has: what it names is there, if it is."""

    def create(self, name: str, data: bytes) -> bool:
        """The same, unless something has the name: then false, and nothing is changed."""

    def append(self, name: str, *, at: int | None = None, buffer: int = 0, lock: str | None = None) -> Appender:
        """Open a file for appending, which is made if it is not there; `at`: cut to so many bytes first. Lines are held
        back up to `buffer` bytes. `lock`: as `lock` does with these words. A bucket will have a file for each writer.
        """

    def go_on(self, name: str, at: int) -> AbstractContextManager[Onward]:
        """Write a file from its `at`th byte on, behind what others have written. Several may do so with the same bytes,
        also after others have gone on behind them; at what byte each stretch begins and ends is always the same."""

    def finish(self, name: str, size: int) -> None:
        """See that what was written so is one file of so many bytes, durably. Raises OSError if it is not as long."""

    def lock(self, name: str, told: str) -> AbstractContextManager[None]:
        """Keep others from a file or, with an empty name, a folder; until the block or the process ends. Raises
        RequestError where another has it: that millstream is writing what is `told`."""

    def turn(self, name: str) -> AbstractContextManager[None]:
        """Wait for one's turn among all that ask for it by this name; until the block or the process ends."""

    def free(self) -> int | None:
        """Bytes that can still be written; None where that cannot be told, or where there is no end to it."""

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all that is in it; nothing where nothing has the name."""

    def delete_file(self, name: str) -> None:
        """The same of what is a file, if it is anything: a bucket need not be listed for it."""

    def make(self) -> None:
        """See that the store can be written to: a folder is made if it is not there."""

    def unmake(self) -> None:
        """Delete the folder that `make` has made, if nothing is in it."""

    def sweep(self) -> None:
        """Delete what killed attempts have left in the folder itself. Call it under the lock."""

    def below(self, name: str) -> "Store":
        """The store of a folder in this one."""

    def draft(self, name: str) -> "Store":
        """Where the files of a folder `name` are written that are to appear together, with `publish`."""

    def publish(self, name: str) -> None:
        """Show the draft of a folder, in place of a former one."""

    def withdraw(self, name: str) -> None:
        """Delete a published folder: at once for those who look, whatever happens meanwhile."""
