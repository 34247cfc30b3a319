"""What a server's reply means: an answer, an error, or the pieces of a stream.

No connection is opened here, so that the replies of every HTTP library are judged alike. What is wrong is a
`WireError`, with a message of one line that says what to do and never holds a key.
"""

import base64
import email.utils
import math
import re
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol
from urllib.parse import unquote, urlsplit

import msgspec

from millstream.errors import RequestError

CHAT = "/chat/completions"

_LONGEST_WORDS = 300  # characters of what a server says that a message quotes
_SHORT = 8  # characters; a key has more
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
_ADVICE = {
    "unauthorized": "check the API key (OPENAI_API_KEY)",
    "forbidden": "this key may not do that",
    "model_not_found": "check the model's name",
    "quota": "the account has no quota left",
    "too_large": "the prompt is too long for this server",
    "not_found": _WRONG_URL,
    "tls": "the server wants TLS; does its URL start with https://?",
}
_STATUSES = {"rate_limit_exceeded": 429, "rate_limit_error": 429, "invalid_request_error": 400}  # of errors without one
_MODEL = re.compile(r"\bmodel\b", re.IGNORECASE)
_NO_MODEL = re.compile(r"\bmodel (does )?not exist\b|\b(not a valid|unknown) model\b", re.IGNORECASE)
_WANTS_TLS = re.compile(r"\bHTTP request\b.*\bHTTPS\b", re.IGNORECASE)  # nginx and Go, with status 400
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")  # what older and newer OpenSSL call it
# What aiohttp and httpx say, in this order, of a connection that ended too early, and of bytes that are no HTTP.
_DISCONNECTED = re.compile(r"ServerDisconnected|Server disconnected")
_BROKEN = re.compile(r"payload is not completed|without sending complete message body")
_NO_HTTP = re.compile(r"Bad status line|illegal request line")
_TLS_ALERT = re.compile(r"\\x15\\+x03")  # the first bytes of TLS's own complaint, in an error that quotes them


class Answer(msgspec.Struct, frozen=True):
    """What the model said: the text of the first choice, and what the server tells of it.

    `usage` is the server's own count of ids; `raw` the whole reply, JSON; `server` the base URL that gave it.
    """

    text: str
    model: str | None
    usage: dict[str, Any]
    finish_reason: str | None
    raw: bytes
    server: str

    @property
    def body(self) -> dict[str, Any]:
        """The whole reply, decoded anew each time."""
        found: dict[str, Any] = msgspec.json.decode(self.raw.decode(errors="replace"))
        return found


class WireError(Exception):
    """One attempt that failed. `kind` is one word, `status` the HTTP status if there was one.

    `retry`: asking again makes sense; `fatal`: every other request would fail likewise; `retry_after`: the seconds the
    server wants to be left alone; `usage`: what was paid for all the same, in the server's words.
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
    ) -> None:
        super().__init__(message)
        self.kind, self.status, self.retry, self.fatal = kind, status, retry, fatal
        self.retry_after = retry_after
        self.usage: dict[str, Any] = usage or {}


class Peer:
    """A server as messages speak of it: its URL without credentials, and the secrets that no message may hold.

    >>> peer = Peer("http://127.0.0.1:8000/v1", ["sk-secret"])
    >>> print(peer.refused(400, b'{"error": {"message": "no sk-secret please"}}', {}))
    http://127.0.0.1:8000/v1: HTTP 400: no *** please
    >>> peer.answer(b'{"choices": [{"message": {"content": "Paris"}}], "usage": {"total_tokens": 9}}').usage
    {'total_tokens': 9}
    """

    def __init__(self, url: str, secrets: Iterable[str] = ()) -> None:
        self.url = url
        self._secrets = [_pattern(secret) for secret in sorted(filter(None, secrets), key=len, reverse=True)]

    def error(self, kind: str, message: str, **more: Any) -> WireError:
        return WireError(kind, f"{self.url}: {message}", **more)

    def shown(self, words: str) -> str:
        """Somebody else's words, fit for a message: in one line, not too long, without secrets."""
        for secret in self._secrets:
            words = secret.sub("***", words)
        line = " ".join("".join(letter if letter.isprintable() else " " for letter in words).split())
        return line if len(line) <= _LONGEST_WORDS else line[: _LONGEST_WORDS - 4] + " ..."

    def encoded(self, body: Mapping[str, Any]) -> bytes:
        """A request's body as JSON."""
        try:
            return _encode(body)
        except (TypeError, ValueError, RecursionError) as error:
            raise self.error(
                "bad_request", f"the request cannot be written as JSON: {self.shown(str(error))}"
            ) from None

    def answer(self, content: bytes) -> Answer:
        """The answer in a reply with status 200. Raises WireError: what cannot be used is asked again like a 502."""
        try:
            body = _decode(content)
            choice = body.choices[0]
        except (msgspec.DecodeError, UnicodeDecodeError, IndexError):
            raise self.unusable(content) from None
        message = choice.message
        text = choice.text if message is None else message.content
        if not isinstance(text, str):
            text = _instead_of_text(message)
            if text is None:
                raise self.unusable(content, "a reply without text")
        usage = body.usage
        return Answer(text, body.model, usage if type(usage) is dict else {}, choice.finish_reason, content, self.url)

    def unusable(self, content: bytes, reason: str | None = None) -> WireError:
        """What to say of a reply with status 200 that is no answer."""
        body = _mapping(content)
        if error := body.get("error"):
            return self.failed(error)
        usage = body.get("usage")
        usage = usage if isinstance(usage, dict) else None
        return self.error("unusable", reason or _unusable(content), status=200, retry=True, usage=usage)

    def refused(self, status: int, content: bytes, headers: Mapping[str, str]) -> WireError:
        """An HTTP error as a WireError, with the server's own words if it has some."""
        said = _said(content)
        verdict = _verdict(status, said, self.url)
        if 300 <= status < 400:
            target = self.shown(headers.get("Location") or "nowhere").removesuffix(CHAT)
            verdict = verdict._replace(fatal=True, advice=f"it redirects to {target}; give that as the base URL")
        return self._judged(f"HTTP {status}", said, verdict, status, seconds_of(headers.get("Retry-After")))

    def failed(self, error: Any) -> WireError:
        """An error that came with status 200: in the middle of a stream, or instead of choices."""
        said = _said_by(error)
        code = error.get("code") if isinstance(error, dict) else None
        if isinstance(code, int) and 400 <= code < 600:
            status = code
        else:
            status = _STATUSES.get(said.code or "", _STATUSES.get(said.type or "", 500))
        return self._judged("an error instead of a reply", said, _verdict(status, said, self.url), 200)

    def _judged(
        self, what: str, said: "_Said", verdict: "_Verdict", status: int, retry_after: float | None = None
    ) -> WireError:
        words = self.shown(said.message).rstrip(".")
        message = f"{what}{words and f': {words}'}{verdict.advice and f'; {verdict.advice}'}"
        kind, retry, fatal, _ = verdict
        return self.error(kind, message, status=status, retry=retry, fatal=fatal, retry_after=retry_after)

    def lost(self, error: BaseException) -> WireError:
        """No reply, or not a whole one: what the network or the HTTP library raised, as a WireError."""
        causes = list(_causes(error))
        words = next((words for cause in causes if (words := str(cause))), "no reason given")
        for cause in reversed(causes):  # aiohttp's own look like those that they came from
            if isinstance(cause, ssl.SSLCertVerificationError):
                reason = self.shown(cause.verify_message)
                advice = "for an authority of your own, set SSL_CERT_FILE"
                return self.error("tls", f"its certificate is not trusted: {reason}; {advice}", fatal=True)
            if isinstance(cause, ssl.SSLError) and cause.reason in _NO_TLS:
                return self.error("tls", "no TLS is spoken there; does its URL start with http://?", fatal=True)
            if isinstance(cause, ConnectionRefusedError):
                return self.error("connection", "connection refused; is the server running?", retry=True)
            if isinstance(cause, socket.gaierror) or "DNS" in type(cause).__name__:
                host = urlsplit(self.url).hostname
                return self.error("connection", f"the host {host} is unknown; check the base URL", retry=True)
        words = f"{type(error).__name__}: {words}"
        hint = " (if it always does, it may want https://)" if self.url.startswith("http:") else ""
        if _TLS_ALERT.search(words):
            return self.error("tls", _ADVICE["tls"], fatal=True)
        if _NO_HTTP.search(words):
            return self.error("connection", f"what answers there speaks no HTTP{hint}; check the base URL", retry=True)
        if _DISCONNECTED.search(words):
            return self.error("connection", f"the server closed the connection without an answer{hint}", retry=True)
        if _BROKEN.search(words):
            return self.error("connection", "the connection broke in the middle of the reply", retry=True)
        return self.error("connection", self.shown(words), retry=True)


class Incoming(Protocol):
    """A reply whose head is here and whose body is on its way, whatever library brings it.

    `chunk` is the next bytes, none at the end; it raises WireError if the connection breaks.
    """

    status: int
    headers: Mapping[str, str]

    async def chunk(self) -> bytes: ...

    async def close(self) -> None: ...


async def whole(incoming: Incoming) -> bytes:
    """All of the body."""
    chunks = []
    while chunk := await incoming.chunk():
        chunks.append(chunk)
    return b"".join(chunks)


class Stream(AsyncIterator[str]):
    """A reply in pieces of text, none of them empty: ``async with wire.pieces(body) as pieces: async for piece ...``.

    After the last piece, `answer` is all of it. Raises WireError: of kind "cut" if the stream ends before the server
    says that it does. The connection is closed with the block.
    """

    def __init__(self, peer: Peer, begin: Callable[[], Awaitable[Incoming]]) -> None:
        self._peer, self._begin = peer, begin
        self._incoming: Incoming | None = None
        self._events = _Events(peer)
        self._ready: Iterator[str] = iter(())
        self._said: list[str] = []
        self.answer: Answer | None = None

    async def __aenter__(self) -> "Stream":
        incoming = self._incoming = await self._begin()
        try:
            if incoming.status != 200:
                raise self._peer.refused(incoming.status, await whole(incoming), incoming.headers)
            form = incoming.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if form in ("application/json", "text/html"):  # it does not stream, or it is none of those servers
                self.answer = self._peer.answer(await whole(incoming))
                self._ready = iter([self.answer.text] if self.answer.text else [])
        except BaseException:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._incoming is not None:
            incoming, self._incoming = self._incoming, None
            await incoming.close()

    async def __anext__(self) -> str:
        while True:
            for piece in self._ready:
                self._said.append(piece)
                return piece
            if self.answer is not None:
                raise StopAsyncIteration
            if self._events.done:
                self.answer = self._events.ended("".join(self._said))
                continue
            assert self._incoming, "use it inside `async with`"
            try:
                chunk = await self._incoming.chunk()
            except WireError as error:
                raise self._events.cut(str(error).removeprefix(f"{self._peer.url}: ")) from None
            self._ready = self._events.pieces(chunk)

    @property
    def model(self) -> str | None:
        return self.answer.model if self.answer else self._events.model

    @property
    def usage(self) -> dict[str, Any]:
        """The server's count of ids, known at the end."""
        return self.answer.usage if self.answer else self._events.usage

    @property
    def finish_reason(self) -> str | None:
        return self.answer.finish_reason if self.answer else self._events.finish_reason


class _Events:
    """The server-sent events of one reply: bytes in, cut anywhere; pieces of text out."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self._rest = b""  # the begin of a line whose end is not here yet
        self._is_error = False
        self._has_choice = self._has_text = False
        self.done = False
        self.model: str | None = None
        self.usage: dict[str, Any] = {}
        self.finish_reason: str | None = None

    def pieces(self, chunk: bytes) -> Iterator[str]:
        """The pieces of text that end in this chunk; an empty one is the end.

        Raises WireError for an error event, for what is no event, and at an end that came too early.
        """
        lines = (self._rest + chunk).splitlines(keepends=True)
        self._rest = lines.pop() if lines and not lines[-1].endswith((b"\n", b"\r")) else b""
        for line in lines:
            field, _, value = line.partition(b":")
            data = value.strip()
            if field == b"event":
                self._is_error = data == b"error"
            if field == b"data" and data and not self.done and (piece := self._piece(data)):
                yield piece
        if not chunk and not self.done:
            self.done = self._rest.replace(b" ", b"") == b"data:[DONE]"  # without an end of line
            if not self.done:
                raise self.cut("it ended without [DONE]")

    def _piece(self, data: bytes) -> str | None:
        if data == b"[DONE]":
            self.done = True
            return None
        try:
            event = _decode_event(data)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise self._peer.error(
                "unusable", "a stream with an event that is none", status=200, retry=True, usage=self.usage
            ) from None
        if event.error or self._is_error:
            failed = self._peer.failed(event.error or _mapping(data))
            failed.usage = self.usage
            raise failed
        self.model = event.model or self.model
        if type(event.usage) is dict:
            self.usage = event.usage
        for choice in event.choices:
            if choice.index == 0:
                return self._said(choice)
        return None

    def _said(self, choice: "_PieceOfChoice") -> str | None:
        self._has_choice = True
        self.finish_reason = choice.finish_reason or self.finish_reason
        delta = choice.delta
        said = choice.text if delta is None else delta.content
        text: str | None = said if isinstance(said, str) else _instead_of_text(delta)
        self._has_text = self._has_text or text is not None
        return text

    def cut(self, reason: str) -> WireError:
        return self._peer.error("cut", f"the stream was cut: {reason}", status=200, retry=True, usage=self.usage)

    def ended(self, text: str) -> Answer:
        """The stream said that it ended: all of it as one answer."""
        if not self._has_choice:
            raise self._unusable("a stream without choices")
        if self.finish_reason is None:
            raise self.cut("it ended without a finish_reason")
        if not self._has_text:
            raise self._unusable("a reply without text")
        message = {"role": "assistant", "content": text}
        choices = [{"index": 0, "message": message, "finish_reason": self.finish_reason}]
        raw = msgspec.json.encode({"model": self.model, "choices": choices, "usage": self.usage})
        return Answer(text, self.model, self.usage, self.finish_reason, raw, self._peer.url)

    def _unusable(self, reason: str) -> WireError:
        return self._peer.error("unusable", reason, status=200, retry=True, usage=self.usage)


def streamed(body: Mapping[str, Any] | bytes) -> dict[str, Any]:
    """A request's body that asks for a stream, and for the usage at its end.

    >>> streamed({"model": "m"})
    {'model': 'm', 'stream': True, 'stream_options': {'include_usage': True}}
    """
    given = msgspec.json.decode(body) if isinstance(body, bytes) else body
    options = {"include_usage": True, **(given.get("stream_options") or {})}
    return {**given, "stream": True, "stream_options": options}


def without_login(base_url: str) -> tuple[str, str | None]:
    """A base URL without the user and password that it may hold, and these.

    Raises RequestError, which shows neither, if it is no URL.

    >>> without_login("http://ann:secret@127.0.0.1:8000/v1/")
    ('http://127.0.0.1:8000/v1', 'ann:secret')
    >>> without_login("127.0.0.1:8000")
    Traceback (most recent call last):
        ...
    millstream.errors.RequestError: the base URL 127.0.0.1:8000 is none: it starts with http:// or https://
    """
    url = base_url.strip()
    _, has_login, rest = url.rpartition("@")
    shown = f"***@{rest}" if has_login else url
    shown = shown.partition("?")[0].partition("#")[0]
    if not url.startswith(("http://", "https://")):
        raise RequestError(f"the base URL {shown} is none: it starts with http:// or https://")
    try:
        parts = urlsplit(url)
        name = (parts.hostname or "").encode("idna")
        sound = name and parts.port != 0 and "@" not in parts.path and url.isprintable() and " " not in url
    except ValueError:
        sound = False
    if not sound:
        advice = "; in a user or password, write @ as %40, / as %2F, # as %23" if has_login else ""
        raise RequestError(f"the base URL {shown!r} is none{advice}")
    if parts.query or parts.fragment:
        raise RequestError(f"the base URL {shown} ends before its ? or #; paths are put behind it")
    login, _, host = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{host}{parts.path}".rstrip("/"), login or None


def secrets_of(login: str | None) -> list[str]:
    """All that would give a login away: as it is written, as it is meant, as it is sent."""
    if login is None:
        return []
    password = login.partition(":")[2]
    return [password, unquote(password), basic(login).removeprefix("Basic ")]


def basic(login: str) -> str:
    """The header for a user and password out of a URL.

    >>> basic("ann:pass%40word")
    'Basic YW5uOnBhc3NAd29yZA=='
    """
    user, _, password = login.partition(":")
    return "Basic " + base64.b64encode(f"{unquote(user)}:{unquote(password)}".encode()).decode()


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


class _Message(msgspec.Struct):
    content: Any = None
    tool_calls: Any = None
    refusal: Any = None


class _Choice(msgspec.Struct):
    message: _Message | None = None
    text: Any = None
    finish_reason: Any = None


class _Body(msgspec.Struct):
    choices: list[_Choice]
    model: Any = None
    usage: Any = None


class _PieceOfChoice(msgspec.Struct):
    index: int = 0
    delta: _Message | None = None
    text: Any = None
    finish_reason: Any = None


class _Event(msgspec.Struct):
    choices: list[_PieceOfChoice] = []
    model: Any = None
    usage: Any = None
    error: Any = None


def _pattern(secret: str) -> re.Pattern[str]:
    """Where a secret stands; one of a few letters, as servers at home take them, only where it is a word."""
    exact = re.escape(secret)
    return re.compile(exact if len(secret) >= _SHORT else rf"(?<!\w){exact}(?!\w)")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


_encode = msgspec.json.Encoder(enc_hook=_plain).encode
_decode = msgspec.json.Decoder(_Body).decode  # only what is needed: a third of the time of decoding all
_decode_event = msgspec.json.Decoder(_Event).decode


def _instead_of_text(message: _Message | None) -> str | None:
    """The model may have refused or called a tool where it should have said something."""
    if message is None:
        return None
    if isinstance(message.refusal, str):
        return message.refusal
    return "" if message.tool_calls else None


def _unusable(content: bytes) -> str:
    start = content[:200].lstrip().lower()
    if not start:
        return "an empty reply"
    if start.startswith((b"<!doctype", b"<html")):
        return "HTML instead of JSON; is this the address of an OpenAI-compatible server?"
    return "a reply that is no completion"


class _Said(NamedTuple):
    """What a server says of an error; `is_error`: in the form of OpenAI's API."""

    message: str
    code: str | None = None
    type: str | None = None
    is_error: bool = False


class _Verdict(NamedTuple):
    kind: str
    retry: bool
    fatal: bool
    advice: str


def _verdict(status: int, said: _Said, url: str) -> _Verdict:
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
        return _Verdict(kind, False, True, _WRONG_URL)
    retry = (status in _AGAIN or status >= 500) and kind != "quota"
    return _Verdict(kind, retry, kind in _FATAL, _ADVICE.get(kind, ""))


def _said(content: bytes) -> _Said:
    body = _mapping(content)
    if error := body.get("error"):
        return _said_by(error)
    if body:
        words = body.get("message") or body.get("detail")
        return _Said(words if isinstance(words, str) else "")
    text = content.decode(errors="replace")
    if text.lstrip()[:1] == "<":
        title = re.search(r"<title>(.*?)</title>", text, re.IGNORECASE | re.DOTALL)
        return _Said(title[1] if title else "")
    return _Said("" if "\0" in text or "\ufffd" in text else text)


def _said_by(error: Any) -> _Said:
    if not isinstance(error, dict):
        return _Said(str(error), is_error=True)
    code, kind = error.get("code"), error.get("type")
    return _Said(
        str(error.get("message") or ""),
        code if isinstance(code, str) else None,
        kind if isinstance(kind, str) else None,
        True,
    )


def _mapping(content: bytes) -> dict[str, Any]:
    try:
        found = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from, told or hidden (``from None``); what else was going on is another's."""
    while error is not None:
        yield error
        for each in getattr(error, "exceptions", ()):  # of a group
            yield from _causes(each)
        error = error.__cause__ or (error.__context__ if error.__suppress_context__ else None)
