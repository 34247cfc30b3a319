"""Everything millstream raises on purpose, each with the exit code the command line gives it.

    MillstreamError
    ├── RequestError       2   the request was wrong: a flag, a setting, a folder that is not ours
    │   └── ResumeRefused  2   going on would change the bytes; names what differs
    └── RunError           1   the data, the disk or a worker failed; what is on disk is whole
        ├── AskStopped     1   a server refuses what every request shares; `outcomes` has what came until then
        ├── DataError      1   a document or an input shard cannot be read; names the place
        ├── EngineMismatch 1   two tokenizer engines disagree on a document; names both
        ├── LedgerError    1   what went in is not what came out
        └── WorkerDied     1   a worker process ended by itself

A fault of a single document is no exception but data (`millstream.records.Fault`); only ``on_error="stop"`` turns the
first one into a `DataError`. `Unusable` is how the place that finds a fault tells the reader, and goes no further.
"""

from typing import Any


class MillstreamError(Exception):
    """The root; its text is one message for a person, without a traceback."""

    exit_code = 1


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
