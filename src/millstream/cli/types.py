"""What the command line takes as values, and what its commands share."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from millstream.errors import RequestError
from millstream.options import size_of

INTERRUPTED = 130
WITH_FAULTS = 3


class Size(click.ParamType):  # type: ignore[type-arg]  # generic only in newer versions
    """A number of bytes: 300000, 64MiB (powers of 1,024) or 64MB (powers of 1,000)."""

    name = "size"
    wanted = "size; give one such as 256MiB"

    def convert(self, value: Any, param: Any, ctx: Any) -> int:
        if isinstance(value, int):
            return value
        found = size_of(value)
        if found is None:
            self.fail(f"{value!r} is no {self.wanted}", param, ctx)
        return found


SIZE = Size()


class Ids(Size):
    """A number of ids: 1000000, 1M or 1Mi (powers of 1,024)."""

    name = "ids"
    wanted = "number of ids; give one such as 32Mi"


IDS = Ids()


def numbers(text: str | None, flag: str, form: str) -> tuple[float, ...] | None:
    """Numbers with commas between them, if there are any."""
    if text is None:
        return None
    try:
        return tuple(float(number) for number in text.split(","))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not {form}", param_hint=flag) from None


@contextmanager
def needs_ask_extra() -> Iterator[None]:
    try:
        yield
    except ModuleNotFoundError as error:
        raise RequestError(f"this command needs {error.name}: pip install 'millstream[ask]'") from error


class Exit(Exception):
    """How a command ended that was stopped, or found what it looked for to be bad, with its exit code.

    `reported`: its report, printed as JSON, has said so already.
    """

    def __init__(self, message: str, exit_code: int, *, reported: bool = False) -> None:
        super().__init__(message)
        self.exit_code, self.reported = exit_code, reported


@contextmanager
def ending_like_an_interrupt() -> Iterator[None]:
    """SIGTERM and SIGHUP are a Ctrl-C, unless whoever started us has them ignored, as nohup does."""
    ours = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in ours:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in ours:
            signal.signal(number, signal.SIG_DFL)
