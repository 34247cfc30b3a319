"""Where rows go, so that no input is written over and no output is lost before there is something in its place."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from typing import Protocol

from millstream.errors import RequestError, RunError, setting
from millstream.runs.ask.answers import JOURNAL, SPENT, holds_journal, is_ours
from millstream.store import file_at, kind_at, target_of
from millstream.store.beside import Beside, temporary_of
from millstream.store.pipe import Pipe, standard_output, state

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


class Unbuffered:
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


class Replacing:
    """A file that is written beside its place until `publish`; another run that writes it is refused."""

    def __init__(self, out: str, failed: Callable[[OSError], RunError]) -> None:
        self.lines = 0
        self._failed = failed
        self._pending: list[bytes] = []
        self._size = 0
        try:
            self._file = Beside(out, out)
        except OSError as error:
            raise RequestError(f"cannot write {out}: {error.strerror}") from error

    @cached_property
    def former(self) -> int | None:
        size = self._file.former_size()
        if size is None:
            return None
        return sum(self._file.read_former(at, at + _COUNTED).count(b"\n") for at in range(0, size, _COUNTED))

    def write(self, lines: bytes, count: int) -> None:
        self.lines += count
        self._pending.append(lines)
        self._size += len(lines)
        if self._size >= _BLOCK:
            self.flush()

    def flush(self) -> None:
        data, self._pending, self._size = b"".join(self._pending), [], 0
        if data:
            try:
                self._file.write(data)
            except OSError as error:
                raise self._failed(error) from error

    def publish(self, *, durable: bool = False) -> None:
        self.flush()
        try:
            self._file.publish(durable=durable)
        except OSError as error:
            raise self._failed(error) from error

    def close(self) -> None:
        """Leave nothing beside the file. Raises OSError if the system tells only now that something was not written."""
        self._file.close()


@contextlib.contextmanager
def opened(out: str, *, advice: str = "") -> Iterator[Output]:
    """The output `out`: a file, a device or a pipe, or "-" for standard output.

    Raises RequestError if it cannot be. What is raised while it is written to ends with the `advice`.
    """

    def failed(error: OSError) -> RunError:
        place = "to standard output" if out == "-" else out
        return RunError(f"cannot write {place}: {error.strerror}{advice}")

    if out == "-":
        yield Unbuffered(standard_output(), failed)
    elif _is_file(out):
        file = Replacing(out, failed)
        try:
            yield file
        except BaseException:
            with contextlib.suppress(OSError):  # what happened first is what is told
                file.close()
            raise
        try:
            file.close()
        except OSError as error:
            raise failed(error) from error
    else:
        with _opened_through(out) as pipe:
            yield Unbuffered(pipe.write, failed)


def _opened_through(out: str) -> Pipe:
    try:
        return Pipe(out)
    except OSError as error:
        raise RequestError(f"cannot write {out}: {error.strerror}") from error


def _is_file(path: str) -> bool:
    """Whether a path leads to a file or to nothing yet, and not to a device or a pipe."""
    return kind_at(path) in ("file", None)


# What must not be written over ---------------------------------------------------------------------------------------


def refuse_inputs(out: str, inputs: Iterable[str]) -> None:
    """Raise RequestError if `out` leads to the same file as an input, whatever the two are called.

    "-" is standard input among the inputs, and standard output as `out`. A terminal may be both.
    """
    places = [1] if out == "-" else [out, temporary_of(out)]
    written = {identity(place) for place in places} - {None}
    for path in inputs:
        if identity(0 if path == "-" else path) in written:
            one, other = ("standard output" if out == "-" else out), ("standard input" if path == "-" else path)
            raise RequestError(
                f"{one} is an input itself{'' if one == other else f' ({other})'}: give another {setting('out')}"
            )


def refuse_journal(out: str, to_be: str | None = None) -> None:
    """Raise RequestError if `out` is a journal or what stands beside one, also one that is `to_be` in that folder."""
    if out == "-":
        return
    folder, name = os.path.split(target_of(out))
    place = None if to_be is None else target_of(to_be)
    if name == JOURNAL or holds_journal(out) or (name == SPENT and (is_ours(folder) or folder == place)):
        raise RequestError(
            f"{out} belongs to a journal, which nothing else is written to: give another {setting('out')}"
        )


def refuse_existing(out: str, *, overwrite: bool, because: str = "") -> None:
    """Raise RequestError if `out` is a file already, and is not to be overwritten."""
    if out != "-" and kind_at(out) == "file" and not overwrite:
        raise RequestError(
            f"{out} exists already{because}: give another {setting('out')}, or {setting('overwrite', True)}"
        )


def identity(place: str | int) -> tuple[int, int] | None:
    """Which file a path or a descriptor leads to; None if to none, or to one that reads and writes apart."""
    try:
        found = state(place) if isinstance(place, int) else file_at(place).state()
    except (OSError, ValueError):
        return None
    return None if found is None or found.kind == "device" else found.identity
