"""How replies ended, as their rows tell it: whole, cut by the limit of ids, filtered or refused."""

from collections import Counter
from collections.abc import Iterable

import msgspec

from millstream.errors import RequestError, setting

WHOLE, UNKNOWN = "whole", "unknown"
CUT, FILTERED, REFUSED = "length", "content_filter", "refusal"
NOT_WHOLE = (CUT, FILTERED, REFUSED)
"""What a reply may be instead of whole, by the names that users give."""

_ALSO = {"max_tokens": CUT, "safety": FILTERED}  # what some servers say for the same
_MARK = b',"finish_reason":'
_STOP = b'"stop",'
_WHOLE = _MARK + _STOP + b'"usage":'
_SAYS_MORE = (b'"refusal"', b'"texts"')


class _Row(msgspec.Struct, gc=False):
    finish_reason: str | None = None
    refusal: str | None = None
    finish_reasons: list[str | None] = []


_decode = msgspec.json.Decoder(_Row).decode


def ending_of(row: bytes) -> str:
    """How the reply in a row ended, in JSON as `rows.row_of` has it; of several choices, the worst counts.

    A row of a journal from before rows told it is "unknown". No JSON is read for a row that says "stop" and no more: in
    a row, the first finish_reason is its own, since the quotes of id and text before it are escaped.

    >>> ending_of(b'{"id":"a","index":0,"text":"yes","finish_reason":"length","usage":{}}')
    'length'
    >>> ending_of(b'{"id":"a","index":0,"text":"yes","usage":{}}')
    'unknown'
    """
    at = row.find(_MARK) + len(_MARK)
    if at < len(_MARK):
        return UNKNOWN
    if row.startswith(_STOP, at) and not row.startswith(_SAYS_MORE, at + len(_STOP)):
        return WHOLE
    told = _decode(row)
    found = {_ALSO.get(reason or "", reason) for reason in (told.finish_reason, *told.finish_reasons)}
    found |= {REFUSED} if told.refusal else set()
    return next((each for each in NOT_WHOLE if each in found), WHOLE)


def endings_of(rows: bytes, count: int) -> Counter[str]:
    """How so many replies ended, whose rows stand in `rows` with a line end between two.

    >>> row = b'{"id":"a","index":0,"text":"yes","finish_reason":"stop","usage":{}}'
    >>> endings_of(b"\\n".join([row, row.replace(b"stop", b"length")]), 2) == {"whole": 1, "length": 1}
    True
    """
    told = rows.count(_MARK)
    if not told:
        return Counter({UNKNOWN: count})
    if told == count == rows.count(_WHOLE):
        return Counter({WHOLE: count})
    return Counter(map(ending_of, rows.split(b"\n")))


def checked_endings(names: Iterable[str]) -> frozenset[str]:
    """Raises RequestError for a name of no ending.

    >>> checked_endings(["short"])
    Traceback (most recent call last):
        ...
    millstream.errors.RequestError: no reply ends with 'short': retry_finish takes length, content_filter, refusal
    """
    for name in names:
        if name not in NOT_WHOLE:
            raise RequestError(f"no reply ends with {name!r}: {setting('retry_finish')} takes {', '.join(NOT_WHOLE)}")
    return frozenset(names)
