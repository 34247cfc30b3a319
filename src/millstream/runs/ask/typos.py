"""A typo that every row fails on, told from rows that are bad themselves."""

import re
from collections.abc import Iterator

from millstream.client.requests import Request
from millstream.errors import RequestError

_FIRST = 32  # rows; as many as of prompts that a server refuses

_digits = re.compile(r"\d+")


def unless_all_fail(batches: Iterator[list[Request]]) -> Iterator[list[Request]]:
    """The same lists. Raises RequestError if the first rows all fail to make a request, for the same reason.

    >>> typo = [Request(n, None, b"", b"", fault=("bad_row", f"line {n}: no field 'txet'")) for n in range(40)]
    >>> list(unless_all_fail(iter([typo])))
    Traceback (most recent call last):
        ...
    millstream.errors.RequestError: line 0: no field 'txet'. Stopped: the first 32 rows all fail this way
    >>> [len(batch) for batch in unless_all_fail(iter([typo[:31], [Request(31, None, b"", b"{}"), *typo]]))]
    [31, 41]
    """
    failed = 0
    reason = ""
    for batch in batches:
        for request in batch if failed < _FIRST else ():
            message = request.fault[1] if request.fault and request.fault[0] == "bad_row" else None
            if message is None or (reason and _digits.sub("", message) != _digits.sub("", reason)):
                failed = _FIRST  # looked at enough
                break
            failed, reason = failed + 1, reason or message
            if failed == _FIRST:
                raise RequestError(f"{reason.rstrip('.')}. Stopped: the first {_FIRST} rows all fail this way")
        yield batch
