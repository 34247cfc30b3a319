"""What a server says of an error, in whatever form: its words, its codes, and how long it wants to be left alone."""

import email.utils
import math
import re
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from millstream.llm.tolerant import json_of

_STATUSES = {
    **dict.fromkeys(("invalid_request_error", "invalid_argument", "bad_request"), 400),
    **dict.fromkeys(("authentication_error", "unauthenticated", "invalid_api_key"), 401),
    **dict.fromkeys(("permission_error", "permission_denied"), 403),
    **dict.fromkeys(("not_found_error", "not_found"), 404),
    **dict.fromkeys(("rate_limit_exceeded", "rate_limit_error", "resource_exhausted", "too_many_requests"), 429),
    **dict.fromkeys(("unavailable", "service_unavailable"), 503),
    **dict.fromkeys(("deadline_exceeded", "timeout_error"), 504),
    "overloaded_error": 529,
}
"""What servers call an HTTP status where they give none."""

_SECONDS = re.compile(r"(\d+(?:\.\d+)?)s")
_CODES = ("code", "type", "status", "reason")


class Said(NamedTuple):
    """What a server says of an error.

    `codes` are its names for it, in lower case; `param` is what of the request it names; `status` the HTTP status that
    the body names; `seconds` how long it wants to be left alone. `is_error`: in the form of some API's errors;
    `is_page`: no JSON at all.
    """

    message: str
    codes: frozenset[str] = frozenset()
    param: str = ""
    status: int | None = None
    seconds: float | None = None
    is_error: bool = False
    is_page: bool = False


def said_in(content: bytes) -> Said:
    """What a body says that came with an HTTP error."""
    try:
        body = json_of(content)
    except ValueError:
        return _page(content.decode(errors="replace"))
    if isinstance(body, list) and body:  # Google puts its errors into an array
        body = body[0]
    if not isinstance(body, dict):
        return Said(str(body) if isinstance(body, str) else "", is_page=not content.strip())
    if error := body.get("error"):
        return said_by({**body, **error} if isinstance(error, dict) else {**body, "message": error})
    if isinstance(body.get("detail"), list):
        return _misfit(body["detail"])
    words = body.get("message") or body.get("detail")
    told = said_by({**body, "message": words if isinstance(words, str) else ""})
    return told._replace(is_error=bool(told.codes or told.status))


def said_by(error: Any) -> Said:
    """What an error says that stands in some JSON.

    >>> said_by({"code": "429", "message": "Slow", "details": [{"retryDelay": "34.5s"}]})[:5]
    ('Slow', frozenset(), '', 429, 34.5)
    >>> said_by({"code": 429, "status": "RESOURCE_EXHAUSTED"}).codes, said_by("no").message
    (frozenset({'resource_exhausted'}), 'no')
    """
    if not isinstance(error, Mapping):
        return Said(str(error), is_error=True)
    given = [*_codes_of(error), *_codes_of(error.get("innererror"))]
    numbers = [int(code) for code in given if code.isdecimal() and len(code) == 3 and 400 <= int(code) < 600]
    codes = frozenset(code for code in given if not (code.isdecimal() and len(code) == 3))
    param = error.get("param")
    return Said(
        _text(error.get("message")),
        codes,
        param if isinstance(param, str) else "",
        next(iter(numbers), None) or next((_STATUSES[code] for code in given if code in _STATUSES), None),
        _google(error.get("details")),
        is_error=True,
    )


def seconds_of(retry_after: str | None) -> float | None:
    """The seconds a Retry-After header asks for: a number, or a date.

    >>> seconds_of("2"), seconds_of("0.5"), seconds_of("soon"), seconds_of("inf"), seconds_of(None)
    (2.0, 0.5, None, None, None)
    """
    if retry_after is None:
        return None
    try:
        seconds = float(retry_after)
    except ValueError:
        pass
    else:
        return max(0.0, seconds) if math.isfinite(seconds) else None
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except (ValueError, OverflowError):
        return None


def asked_in(headers: Mapping[str, str], said: Said) -> float | None:
    """The seconds that a server wants to be left alone, wherever it says so: the most exact one counts.

    >>> asked_in({"retry-after-ms": "1500", "Retry-After": "2"}, Said("")), asked_in({"Retry-After": "2"}, Said(""))
    (1.5, 2.0)
    >>> asked_in({}, Said("", seconds=34.5)), asked_in({}, Said(""))
    (34.5, None)
    """
    exact = seconds_of(headers.get("retry-after-ms"))
    if exact is not None:
        return exact / 1000
    asked = seconds_of(headers.get("Retry-After"))
    return said.seconds if asked is None else asked


def _codes_of(error: Any) -> Iterator[str]:
    for name in _CODES:
        value = error.get(name) if isinstance(error, Mapping) else None
        if isinstance(value, str | int) and not isinstance(value, bool):
            yield str(value).lower()


def _google(details: Any) -> float | None:
    """Google's retryDelay, such as "34.074824224s"."""
    for detail in details if isinstance(details, list) else ():
        delay = detail.get("retryDelay") if isinstance(detail, Mapping) else None
        if isinstance(delay, str) and (found := _SECONDS.fullmatch(delay)):
            return float(found[1])
    return None


def _misfit(details: list[Any]) -> Said:
    """FastAPI's list of what does not fit its model: the first one."""
    first = details[0] if details and isinstance(details[0], Mapping) else {}
    where = first.get("loc")
    names = [str(name) for name in where if name != "body"] if isinstance(where, list) else []
    return Said(": ".join(filter(None, [".".join(names), _text(first.get("msg"))])), param=".".join(names))


def _page(text: str) -> Said:
    if text.lstrip()[:1] == "<":
        title = re.search(r"<title>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        return Said(title[1] if title else "", is_page=True)
    return Said("" if "\0" in text or "\ufffd" in text else text, is_page=True)


def _text(words: Any) -> str:
    return words if isinstance(words, str) else "" if words is None else str(words)
