"""One attempt over the wire: a request body out, an answer or an error in, over aiohttp.

What an attempt can fail with is a `WireError` that says whether asking again makes sense (`retry`), whether every other
request would fail likewise (`fatal`), and how long the server wants to be left alone (`retry_after`). Scheduling is not
decided here.
"""

import asyncio
import email.utils
import random
import time
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import ClientError, ClientSession, ClientTimeout, TCPConnector

from millstream.errors import RequestError

CHAT = "/chat/completions"
FIRST_WAIT = 0.5
LONGEST_WAIT = 60.0

_AGAIN = {408, 409, 425, 429, 529}  # and all from 500 on
_FATAL = {401, 403}
_KINDS = {
    400: "bad_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    408: "server_timeout",
    413: "too_large",
    422: "bad_request",
    429: "rate_limited",
}
_ADVICE = {
    401: "check the API key (OPENAI_API_KEY)",
    403: "this key may not do that",
    404: "check the model's name and that the base URL ends as the server wants it, mostly in /v1",
    413: "the prompt is too long for this server",
}


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model said: the text of the first choice, and what the server tells of it.

    `usage` is the server's own count of ids; `body` is the whole reply; `server` the base URL that gave it.
    """

    text: str
    model: str | None
    usage: dict[str, Any]
    finish_reason: str | None
    body: dict[str, Any]
    server: str


class WireError(Exception):
    """One attempt that failed. `kind` is one word, `status` the HTTP status if there was one."""

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        status: int | None = None,
        retry: bool = False,
        fatal: bool = False,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.kind, self.status, self.retry, self.fatal = kind, status, retry, fatal
        self.retry_after = retry_after


class Wire:
    """A connection pool to one server, for one event loop: ``async with Wire(url) as wire: await wire.send(body)``.

    The number of connections is not limited here: whoever calls `send` bounds how many run at once.
    """

    def __init__(self, base_url: str, api_key: str | None = None) -> None:
        if not base_url.startswith(("http://", "https://")):
            raise RequestError(f"the base URL {base_url!r} is none: it starts with http:// or https://")
        self.base_url = base_url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._session: ClientSession | None = None

    def __repr__(self) -> str:
        return f"Wire({self.base_url!r})"  # and not the key

    async def __aenter__(self) -> "Wire":
        self._session = ClientSession(
            connector=TCPConnector(limit=0, ttl_dns_cache=300),
            timeout=ClientTimeout(total=None),  # the caller's clock is the only one
            headers=self._headers,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session:
            await self._session.close()

    async def send(self, body: dict[str, Any], path: str = CHAT) -> Answer:
        """Make one attempt. Raises WireError."""
        assert self._session, "use it inside `async with`"
        data = msgspec.json.encode(body)
        try:
            async with self._session.post(self.base_url + path, data=data) as response:
                content = await response.read()
                status, headers = response.status, response.headers
        except (ClientError, OSError, asyncio.IncompleteReadError) as error:
            raise self._lost(error) from error
        if status != 200:
            raise _refused(status, content, headers.get("Retry-After"), self.base_url)
        return self._answer(content)

    def _lost(self, error: BaseException) -> WireError:
        reason = str(error) or type(error).__name__
        certificate = "certificate" in type(error).__name__.lower()
        kind = "tls" if certificate else "connection"
        return WireError(kind, f"{self.base_url}: {reason}", retry=not certificate, fatal=certificate)

    def _answer(self, content: bytes) -> Answer:
        """A 200 whose body cannot be used is as bad as a 502, and asked again like one."""
        try:
            body = msgspec.json.decode(content)
            choice = body["choices"][0]
            message = choice.get("message")
            text = choice["text"] if message is None else message["content"]
        except (msgspec.DecodeError, UnicodeDecodeError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise WireError("unusable", f"{self.base_url}: {_unusable(content)}", status=200, retry=True) from error
        if not isinstance(text, str):
            if message and message.get("tool_calls"):
                text = ""
            else:
                raise WireError("unusable", f"{self.base_url}: a reply without text", status=200, retry=True)
        usage = body.get("usage")
        return Answer(
            text,
            body.get("model"),
            usage if isinstance(usage, dict) else {},
            choice.get("finish_reason"),
            body,
            self.base_url,
        )


def _unusable(content: bytes) -> str:
    start = content[:200].lstrip().lower()
    if not start:
        return "an empty reply"
    if start.startswith((b"<!doctype", b"<html")):
        return "HTML instead of JSON; is this the address of an OpenAI-compatible server?"
    return "a reply that is no completion"


def _refused(status: int, content: bytes, retry_after: str | None, url: str) -> WireError:
    """An HTTP error as a WireError, with the server's own words if it has some."""
    message, code = _words(content)
    kind = _KINDS.get(status, "server_error" if status >= 500 else "refused")
    quota = code == "insufficient_quota"
    model = status == 404 and code == "model_not_found"
    if quota or model:
        kind = "quota" if quota else "model_not_found"
    advice = f"; {_ADVICE[status]}" if status in _ADVICE else ""
    return WireError(
        kind,
        f"{url}: HTTP {status}{': ' + message if message else ''}{advice}",
        status=status,
        retry=(status in _AGAIN or status >= 500) and not quota,
        fatal=status in _FATAL or quota or model,
        retry_after=seconds_of(retry_after),
    )


def _words(content: bytes) -> tuple[str, str | None]:
    try:
        error = msgspec.json.decode(content)["error"]
    except (msgspec.DecodeError, UnicodeDecodeError, KeyError, TypeError):
        return "", None
    if isinstance(error, str):
        return error[:300], None
    if not isinstance(error, dict):
        return "", None
    code = error.get("code")
    return str(error.get("message") or "")[:300], code if isinstance(code, str) else None


def seconds_of(retry_after: str | None) -> float | None:
    """The seconds a Retry-After header asks for: a number, or a date.

    >>> seconds_of("2"), seconds_of("0.5"), seconds_of("soon"), seconds_of(None)
    (2.0, 0.5, None, None)
    """
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None


def wait_before_retry(error: Exception, attempts: int, most: int, draw: random.Random) -> float | None:
    """Seconds to wait before the next attempt, or None to give up after `most` attempts or a final error.

    Full jitter: anywhere from 0 to a bound that doubles with each attempt, up to a minute (Brooker, "Exponential
    Backoff and Jitter", 2015); what the server asks for is a lower bound.

    >>> draw = random.Random(0)
    >>> wait_before_retry(WireError("bad_request", "no", status=400), 1, 5, draw) is None
    True
    >>> wait_before_retry(WireError("rate_limited", "slow", retry=True, retry_after=7.0), 1, 5, draw) >= 7.0
    True
    """
    again = error.retry if isinstance(error, WireError) else isinstance(error, TimeoutError)
    if not again or attempts >= most:
        return None
    wait = draw.uniform(0.0, min(LONGEST_WAIT, FIRST_WAIT * 2.0**attempts))
    asked = getattr(error, "retry_after", None)
    return wait if asked is None else asked + wait
