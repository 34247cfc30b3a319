"""What the journal's runs have spent: the replies' own usage, and a file of what no reply's row tells."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import msgspec

from millstream.client.purse import Purse
from millstream.errors import RunError
from millstream.llm.usage import Usage, paid_ids
from millstream.runs.ask.answers import SPENT
from millstream.store import at, file_at


class _Row(msgspec.Struct, gc=False):
    """What of a row in the journal tells what it cost; the usage of a fault is in the spendings, too."""

    usage: Any = None
    fault: msgspec.Raw | None = None


_row = msgspec.json.Decoder(_Row).decode


class Spendings:
    """`spent.jsonl` beside the journal at `journal`: a line for what an attempt cost that brought no reply.

    Failed attempts are paid for as well, and so may be those that were cut off; a rerun with a bound on the cost has to
    know of them, and a request that is still to be asked has no row yet.

    >>> import tempfile
    >>> rows = b'{"usage":{"prompt_tokens":9,"completion_tokens":2}}', b'{"fault":{},"usage":{"prompt_tokens":3}}'
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with open(os.path.join(folder, "journal.jsonl"), "wb") as file:
    ...         _ = file.write(b"\\n".join(rows))
    ...     spendings = Spendings(file.name)
    ...     spendings.append(Usage(given=5, told=0))
    ...     [(usage.given, usage.told) for usage in spendings.all()]
    [(9, 2), (5, 0)]
    """

    def __init__(self, journal: str) -> None:
        self._journal, self.path = journal, os.path.join(os.path.dirname(journal), SPENT)
        self._unwritten = b""

    def append(self, usage: Usage) -> None:
        """When this returns, it survives this process; what the disk does not take is written with the next one."""
        given, told, cached = usage
        line: dict[str, Any] = {"prompt_tokens": given, "completion_tokens": told}
        line |= {"prompt_tokens_details": {"cached_tokens": cached}} if cached else {}
        self._unwritten += b"\n" + msgspec.json.encode(line)  # so that a torn line spoils no other
        with contextlib.suppress(OSError):
            self._write()

    def close(self) -> None:
        """Raises RunError if something could not be written."""
        try:
            self._write()
        except OSError as error:
            on = "What was answered is kept: the same command again goes on"
            raise RunError(f"cannot write {self.path}: {error.strerror}. {on}") from error

    def _write(self) -> None:
        if self._unwritten:
            with at(os.path.dirname(self.path)).append(SPENT) as file:
                file.write(self._unwritten)
            self._unwritten = b""

    def all(self) -> Iterator[Usage]:
        """Of all lines of both files, whatever prompts they are of; damaged ones count as nothing."""
        for line in _lines(self._journal):
            row = _parsed(_row, line)
            if row is not None and row.fault is None and row.usage:
                yield paid_ids(row.usage)
        for line in _lines(self.path):
            if not line.isspace():
                yield paid_ids(_parsed(msgspec.json.decode, line))


@contextlib.contextmanager
def kept_spendings(journal: str, purse: Purse) -> Iterator[None]:
    """What attempts in vain cost is written beside the journal; where there is a bound, what earlier runs spent counts,
    once."""
    with contextlib.closing(Spendings(journal)) as spendings:
        purse.keep = spendings.append
        if purse.most is not None and not purse.cost:
            purse.pay_earlier(spendings.all())
        yield


def _lines(path: str) -> Iterator[bytes]:
    try:
        with file_at(path).open(1 << 20) as file:
            yield from file
    except FileNotFoundError:
        return
    except OSError as error:
        raise RunError(f"cannot read {path}: {error.strerror}") from error


def _parsed(decode: Any, line: bytes) -> Any:
    try:
        return decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
