"""What an HTTP status, and what a server says with it, come to.

No connection is opened here, so that the errors of every HTTP library are judged alike.
"""

import email.utils
import math
import re
import time
from typing import Any, NamedTuple

from millstream.llm.tolerant import mapping

_AGAIN = {408, 409, 425, 429}  # and all from 500 on
_KINDS = {
    400: "bad_request",
    401: "unauthorized",
    402: "quota",
    403: "forbidden",
    404: "not_found",
    408: "server_timeout",
    413: "too_large",
    422: "bad_request",
    429: "rate_limited",
}
_FATAL = {"unauthorized", "forbidden", "model_not_found", "quota", "tls"}
_WRONG_URL = "check the base URL: it mostly ends in /v1"
ADVICE = {
    "unauthorized": "check the API key (OPENAI_API_KEY)",
    "forbidden": "this key may not do that",
    "model_not_found": "check the model's name",
    "quota": "the account has no quota left",
    "too_large": "the prompt is too long for this server",
    "not_found": _WRONG_URL,
    "tls": "the server wants TLS; does its URL start with https://?",
}
STATUSES = {"rate_limit_exceeded": 429, "rate_limit_error": 429, "invalid_request_error": 400}  # of errors without one
_MODEL = re.compile(r"\bmodel\b", re.IGNORECASE)
_NO_MODEL = re.compile(r"\bmodel (does )?not exist\b|\b(not a valid|unknown) model\b", re.IGNORECASE)
_WANTS_TLS = re.compile(r"\bHTTP request\b.*\bHTTPS\b", re.IGNORECASE)  # nginx and Go, with status 400


class WireError(Exception):
    """One attempt that failed. `kind` is one word, `status` the HTTP status if there was one.

    `retry`: asking again makes sense; `fatal`: every other request would fail likewise; `retry_after`: the seconds the
    server wants to be left alone; `usage`: what was paid for all the same, in the server's words; `brief`: the message,
    where it is told beside others.
    """

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        status: int | None = None,
        retry: bool = False,
        fatal: bool = False,
        retry_after: float | None = None,
        usage: dict[str, Any] | None = None,
        brief: str | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, self.status, self.retry, self.fatal = kind, status, retry, fatal
        self.retry_after, self.brief = retry_after, brief or message
        self.usage: dict[str, Any] = usage or {}


class Said(NamedTuple):
    """What a server says of an error; `is_error`: in the form of OpenAI's API."""

    message: str
    code: str | None = None
    type: str | None = None
    is_error: bool = False


class Verdict(NamedTuple):
    kind: str
    retry: bool
    fatal: bool
    advice: str


def verdict(status: int, said: Said, url: str) -> Verdict:
    """What an HTTP status and the words with it come to."""
    kind = _KINDS.get(status, "server_error" if status >= 500 else "refused")
    if "insufficient_quota" in (said.code, said.type):
        kind = "quota"
    elif (
        (status in (400, 404) and said.code == "model_not_found")
        or (status == 404 and said.is_error and _MODEL.search(said.message))
        or (status == 400 and _NO_MODEL.search(said.message))
    ):
        kind = "model_not_found"
    elif status == 400 and url.startswith("http:") and _WANTS_TLS.search(said.message):
        kind = "tls"
    elif status in (404, 405) and (not said.is_error or said.code == "unknown_url"):
        return Verdict(kind, False, True, _WRONG_URL)
    retry = (status in _AGAIN or status >= 500) and kind != "quota"
    return Verdict(kind, retry, kind in _FATAL, ADVICE.get(kind, ""))


def said_in(content: bytes) -> Said:
    body = mapping(content)
    if error := body.get("error"):
        return said_by(error)
    if body:
        words = body.get("message") or body.get("detail")
        return Said(words if isinstance(words, str) else "")
    text = content.decode(errors="replace")
    if text.lstrip()[:1] == "<":
        title = re.search(r"<title>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        return Said(title[1] if title else "")
    return Said("" if "\0" in text or "\ufffd" in text else text)


def said_by(error: Any) -> Said:
    if not isinstance(error, dict):
        return Said(str(error), is_error=True)
    code, kind = error.get("code"), error.get("type")
    return Said(
        str(error.get("message") or ""),
        code if isinstance(code, str) else None,
        kind if isinstance(kind, str) else None,
        True,
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
