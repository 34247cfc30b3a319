"""Standard input and output, devices and named pipes: bytes that pass once, in one direction."""

import contextlib
import fcntl
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import IO, BinaryIO

from millstream.store.appender import write_all
from millstream.store.contract import State
from millstream.store.local import state_of


def standard_input() -> BinaryIO:
    """What is read where "-" is named; whoever reads it does not close it. A read has what is there.

    Not through its buffer, whose lock a thread that waits for more would hold when the process wants to end.
    """
    return getattr(sys.stdin.buffer, "raw", sys.stdin.buffer)


def standard_output() -> Callable[[bytes], object]:
    """Writes to the descriptor itself: nothing is left in a buffer that fails once more when the process ends."""
    sys.stdout.flush()
    try:
        return partial(write_all, sys.stdout.fileno())
    except (OSError, ValueError):  # a stream that a program has put in its place
        return sys.stdout.buffer.write


class Pipe:
    """A device or a named pipe that is written to: ``with Pipe(path) as pipe``. What is written is there at once."""

    def __init__(self, path: str) -> None:
        self._file = os.open(path, os.O_WRONLY)

    def write(self, data: bytes) -> None:
        write_all(self._file, data)

    def __enter__(self) -> "Pipe":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def state(number: int) -> State | None:
    """What standard input (0) or output (1) leads to; None if it is closed."""
    try:
        return state_of(os.fstat(number))
    except OSError:
        return None


def to_nowhere(number: int) -> None:
    """From now on standard input (0) is at its end, and what is written to standard output (1) goes nowhere. Raises
    OSError where there is no descriptor left for it."""
    nowhere = os.open(os.devnull, os.O_WRONLY if number else os.O_RDONLY)
    os.dup2(nowhere, number)
    os.close(nowhere)


def widen(pipe: IO[bytes]) -> None:
    """A pipe that holds a whole result: 64 KiB of it at a time would wake both sides dozens of times."""
    if hasattr(fcntl, "F_SETPIPE_SZ"):
        with contextlib.suppress(OSError):  # over the user's limit: it works as it is
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, 1 << 20)


def refused() -> int | None:
    """The errno for which no file can be opened now; None if one can."""
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError as error:
        return error.errno
    return None


def count_open() -> int | None:
    """How many descriptors this process has open; None where the system does not say."""
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:
        return None
