"""Where rows go, so that no input is written over and no output is lost before there is something in its place."""

import contextlib
import fcntl
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property, partial
from typing import Protocol

from millstream.errors import RequestError, RunError
from millstream.formats.manifest import TEMPORARY
from millstream.runs.ask.answers import JOURNAL, SPENT, holds_journal, is_ours

_BLOCK = 128 << 10
_COUNTED = 1 << 20


class Output(Protocol):
    """Takes whole lines. Raises RunError when they cannot be written, BrokenPipeError when nobody reads them."""

    lines: int
    """What was written so far."""

    @property
    def former(self) -> int | None:
        """Lines of the file that is to be replaced; None: there is none."""

    def write(self, lines: bytes, count: int) -> None: ...

    def flush(self) -> None: ...

    def publish(self, *, durable: bool = False) -> None:
        """Give the file its name, in place of the former one; what comes later is appended. Again: nothing.

        `durable` waits for the disk first: for what no journal has.
        """


class Through:
    """Standard output, a device or a named pipe: lines are written through at once."""

    former: int | None = None

    def __init__(self, write: Callable[[bytes], object], failed: Callable[[OSError], RunError]) -> None:
        self.lines = 0
        self._write, self._failed = write, failed

    def write(self, lines: bytes, count: int) -> None:
        self.lines += count
        try:
            self._write(lines)
        except BrokenPipeError:
            raise
        except OSError as error:
            raise self._failed(error) from error

    def flush(self) -> None:
        """Nothing is held back."""

    def publish(self, *, durable: bool = False) -> None:
        """It has its name."""


class Beside:
    """A file that is written beside its place until `publish`; another run that writes it is refused.

    What is written is whole lines at all times, on a full disk, too. Not published, it leaves the former file as it is.
    """

    def __init__(self, out: str, failed: Callable[[OSError], RunError]) -> None:
        self.lines = 0
        self._out, self._path, self._failed = out, os.path.realpath(out), failed  # a link keeps its target
        self._temporary: str | None = temporary_of(self._path)
        self._pending: list[bytes] = []
        self._size = 0
        with contextlib.ExitStack() as stack:
            try:
                self._file = _locked(out, self._temporary, os.O_RDWR | os.O_CREAT)
                stack.callback(os.close, self._file)
                self._former = self._hold_former()
                os.ftruncate(self._file, 0)  # a run that was killed has left it
            except OSError as error:
                raise RequestError(f"cannot write {out}: {error.strerror}") from error
            stack.pop_all()

    def _hold_former(self) -> int | None:
        """The file that is to be replaced, held so that nobody else replaces it; the new one gets its rights."""
        try:
            former = _locked(self._out, self._path, os.O_RDWR)
        except FileNotFoundError:
            return None
        with contextlib.suppress(OSError):
            os.fchmod(self._file, stat.S_IMODE(os.fstat(former).st_mode))
        return former

    @cached_property
    def former(self) -> int | None:
        if self._former is None:
            return None
        starts = range(0, os.fstat(self._former).st_size, _COUNTED)
        return sum(os.pread(self._former, _COUNTED, at).count(b"\n") for at in starts)

    def write(self, lines: bytes, count: int) -> None:
        self.lines += count
        self._pending.append(lines)
        self._size += len(lines)
        if self._size >= _BLOCK:
            self.flush()

    def flush(self) -> None:
        data, self._pending, self._size = b"".join(self._pending), [], 0
        if not data:
            return
        start = os.lseek(self._file, 0, os.SEEK_CUR)
        try:
            _write_all(self._file, data)
        except OSError as error:
            with contextlib.suppress(OSError):
                there = os.fstat(self._file).st_size - start
                os.ftruncate(self._file, start + data.rfind(b"\n", 0, max(0, there)) + 1)
            raise self._failed(error) from error

    def publish(self, *, durable: bool = False) -> None:
        self.flush()
        if self._temporary is None:
            return
        try:
            if durable:
                os.fsync(self._file)
            os.replace(self._temporary, self._path)
        except OSError as error:
            raise self._failed(error) from error
        self._temporary = None
        if self._former is not None:
            os.close(self._former)
            self._former = None

    def close(self) -> None:
        """Leave nothing beside the file. Raises OSError if the system tells only now that something was not written."""
        with contextlib.ExitStack() as stack:
            stack.callback(os.close, self._file)
            if self._former is not None:
                stack.callback(os.close, self._former)
            if self._temporary is not None:
                os.unlink(self._temporary)


@contextlib.contextmanager
def opened(out: str, *, advice: str = "") -> Iterator[Output]:
    """The output `out`: a file, a device or a pipe, or "-" for standard output.

    Raises RequestError if it cannot be. What is raised while it is written to ends with the `advice`.
    """

    def failed(error: OSError) -> RunError:
        return RunError(f"cannot write {out}: {error.strerror}{advice}")

    if out == "-":
        yield Through(_standard_output(), failed)
    elif _is_file(out):
        beside = Beside(out, failed)
        try:
            yield beside
        except BaseException:
            with contextlib.suppress(OSError):  # what happened first is what is told
                beside.close()
            raise
        try:
            beside.close()
        except OSError as error:
            raise failed(error) from error
    else:
        file = _opened_through(out)
        try:
            yield Through(partial(_write_all, file), failed)
        finally:
            with contextlib.suppress(OSError):
                os.close(file)


def _standard_output() -> Callable[[bytes], object]:
    """Writes to the descriptor itself: nothing is left in a buffer that fails once more when the process ends."""
    sys.stdout.flush()
    try:
        return partial(_write_all, sys.stdout.fileno())
    except (OSError, ValueError):  # a stream that a program has put in its place
        return sys.stdout.buffer.write


def _opened_through(out: str) -> int:
    try:
        return os.open(out, os.O_WRONLY)
    except OSError as error:
        raise RequestError(f"cannot write {out}: {error.strerror}") from error


def _is_file(path: str) -> bool:
    """Whether a path leads to a file or to nothing yet, and not to a device or a pipe."""
    return os.path.isfile(path) or not os.path.exists(path)


def _locked(out: str, path: str, flags: int) -> int:
    """A file, held against other runs, and still at its path when it is."""
    while True:
        file = os.open(path, flags, 0o666)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if identity(path) == identity(file):
                return file
        except BlockingIOError:
            os.close(file)
            raise RequestError(f"another millstream is writing {out}; wait for it, or give another --out") from None
        except BaseException:
            os.close(file)
            raise
        os.close(file)  # the other run gave it its name in the meantime


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]


def temporary_of(path: str) -> str:
    """Where a file is written before it gets its name; no file of anybody else's is called so."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.millstream{TEMPORARY}")


# What must not be written over ---------------------------------------------------------------------------------------


def refuse_inputs(out: str, inputs: Iterable[str]) -> None:
    """Raise RequestError if `out` leads to the same file as an input, whatever the two are called.

    "-" is standard input among the inputs, and standard output as `out`. A terminal may be both.
    """
    places = [1] if out == "-" else [out, temporary_of(os.path.realpath(out))]
    written = {identity(place) for place in places} - {None}
    for path in inputs:
        if identity(0 if path == "-" else path) in written:
            one, other = ("standard output" if out == "-" else out), ("standard input" if path == "-" else path)
            raise RequestError(f"{one} is an input itself{'' if one == other else f' ({other})'}: give another --out")


def refuse_journal(out: str, to_be: str | None = None) -> None:
    """Raise RequestError if `out` is a journal or what stands beside one, also one that is `to_be` in that folder."""
    if out == "-":
        return
    folder, name = os.path.split(os.path.realpath(out))
    place = None if to_be is None else os.path.realpath(to_be)
    if name == JOURNAL or holds_journal(out) or (name == SPENT and (is_ours(folder) or folder == place)):
        raise RequestError(f"{out} belongs to a journal, which nothing else is written to: give another --out")


def refuse_existing(out: str, *, overwrite: bool, because: str = "") -> None:
    """Raise RequestError if `out` is a file already, and is not to be overwritten."""
    if out != "-" and os.path.isfile(out) and not overwrite:
        raise RequestError(f"{out} exists already{because}: give another --out, or --overwrite")


def identity(place: str | int) -> tuple[int, int] | None:
    """Which file a path or a descriptor leads to; None if to none, or to one that reads and writes apart."""
    try:
        found = os.stat(place)
    except (OSError, ValueError):
        return None
    apart = stat.S_ISCHR(found.st_mode) or stat.S_ISSOCK(found.st_mode)
    return None if apart else (found.st_dev, found.st_ino)
