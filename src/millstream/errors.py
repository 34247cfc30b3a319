"""Everything millstream raises on purpose, each with the exit code the command line gives it.

    MillstreamError
    ├── RequestError       2   the request was wrong: a flag, a setting, a folder that is not ours
    │   └── ResumeRefused  2   going on would change the bytes; names what differs
    └── RunError           1   the data, the disk or a worker failed; what is on disk is whole
        ├── AskStopped     1   a server refuses what every request shares; `outcomes` has what came until then
        ├── DataError      1   a document or an input shard cannot be read; names the place
        ├── EngineMismatch 1   two tokenizer engines disagree on a document; names both
        ├── LedgerError    1   what went in is not what came out
        └── WorkerDied     1   a part of the work killed its worker process three times; names it

A fault of a single document is no exception but data (`millstream.records.DocumentFault`); only ``on_error="stop"``
turns the first one into a `DataError`. `Unusable` is how the place that finds a fault tells the reader, and goes no
further.

A message that names a setting is read by two kinds of people: who calls Python is told `seq_len=0`, and who runs the
command line `--seq-len 0`. `setting` writes both into the text, `Words` is one of them, and the command line asks for
`flags`.
"""

import re
from typing import Any

_BEGIN, _OR, _END = "\ufdd4", "\ufdd5", "\ufdd6"  # noncharacters, which no text may have
_EITHER = re.compile(f"{_BEGIN}([^{_OR}]*){_OR}([^{_END}]*){_END}")


def either(python: str, flags: str) -> str:
    """A part of a message that says `python` to who calls a function, and `flags` to who runs a command."""
    return f"{_BEGIN}{python}{_OR}{flags}{_END}"


def setting(name: str, value: object = None, shown: str | None = None) -> str:
    """A setting in a message, with its value if it has one, which is `shown` otherwise on the command line.

    >>> words = Words(f"{setting('seq_len', 0)} does not work")
    >>> words, words.flags
    ('seq_len=0 does not work', '--seq-len 0 does not work')
    """
    flag = flag_of(name)
    if value is None:
        return either(name, flag)
    return either(f"{name}={value!r}", flag if value is True else f"{flag} {value if shown is None else shown}")


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def sized(name: str, size: int) -> str:
    """A setting that is a number of bytes.

    >>> words = Words(f"{sized('memory', 512 << 20)} or {sized('memory', 100)}")
    >>> words, words.flags
    ('memory=512 << 20 or memory=100', '--memory 512MiB or --memory 100')
    """
    for bits, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        number = size >> bits
        if number and number << bits == size:
            return either(f"{name}={number} << {bits}", f"{flag_of(name)} {number}{unit}")
    return setting(name, size)


class Words(str):
    """A message with settings in it, as it is told to who calls Python; `flags` is for the command line."""

    flags: str

    def __new__(cls, text: str) -> "Words":
        if isinstance(text, cls):
            return text
        made = super().__new__(cls, _EITHER.sub(r"\1", text))
        made.flags = _EITHER.sub(r"\2", text)
        return made


class MillstreamError(Exception):
    """The root; its text is one message for a person, without a traceback."""

    exit_code = 1

    def __init__(self, message: str) -> None:
        self.words = Words(message)
        super().__init__(self.words)


class RequestError(MillstreamError):
    exit_code = 2


class ResumeRefused(RequestError):
    pass


class RunError(MillstreamError):
    pass


class AskStopped(RunError):
    def __init__(self, message: str, outcomes: list[Any]) -> None:
        super().__init__(message)
        self.outcomes = outcomes


class DataError(RunError):
    pass


class EngineMismatch(RunError):
    pass


class LedgerError(RunError):
    pass


class WorkerDied(RunError):
    pass


class Unusable(Exception):
    """A document that cannot be used: `reason` is a word for the ledger, `message` is for a person."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message
