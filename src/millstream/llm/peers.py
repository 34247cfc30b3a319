"""A server as messages speak of it: in one line that says what to do, and never holds a key."""

import re
import socket
import ssl
from collections.abc import Iterable, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from millstream.llm.addresses import CHAT
from millstream.llm.verdicts import ADVICE, STATUSES, Said, Verdict, WireError, said_by, said_in, seconds_of, verdict

_LONGEST_WORDS = 300  # characters of what a server says that a message quotes
_SHORT = 8  # characters; a key has more
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")  # what older and newer OpenSSL call it
# What aiohttp and httpx say, in this order, of a connection that ended too early, and of bytes that are no HTTP.
_DISCONNECTED = re.compile(r"ServerDisconnected|Server disconnected")
_BROKEN = re.compile(r"payload is not completed|without sending complete message body")
_NO_HTTP = re.compile(r"Bad status line|illegal request line")
_TLS_ALERT = re.compile(r"\\x15\\+x03")  # the first bytes of TLS's own complaint, in an error that quotes them


class Peer:
    """A server as messages speak of it: its URL without credentials, and the secrets that no message may hold.

    >>> peer = Peer("http://127.0.0.1:8000/v1", ["sk-secret"])
    >>> print(peer.refused(400, b'{"error": {"message": "no sk-secret please"}}', {}))
    http://127.0.0.1:8000/v1: HTTP 400: no *** please
    """

    def __init__(self, url: str, secrets: Iterable[str] = ()) -> None:
        self.url = url
        self._secrets = [_pattern(secret) for secret in sorted(filter(None, secrets), key=len, reverse=True)]

    def error(self, kind: str, message: str, **more: Any) -> WireError:
        return WireError(kind, f"{self.url}: {message}", **{"brief": message, **more})

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

    def refused(self, status: int, content: bytes, headers: Mapping[str, str]) -> WireError:
        """An HTTP error as a WireError, with the server's own words if it has some."""
        said = said_in(content)
        found = verdict(status, said, self.url)
        if 300 <= status < 400:
            target = self.shown(headers.get("Location") or "nowhere").removesuffix(CHAT)
            found = found._replace(fatal=True, advice=f"it redirects to {target}; give that as the base URL")
        return self._judged(f"HTTP {status}", said, found, status, seconds_of(headers.get("Retry-After")))

    def failed(self, error: Any) -> WireError:
        """An error that came with status 200: in the middle of a stream, or instead of choices."""
        said = said_by(error)
        code = error.get("code") if isinstance(error, dict) else None
        if isinstance(code, int) and 400 <= code < 600:
            status = code
        else:
            status = STATUSES.get(said.code or "", STATUSES.get(said.type or "", 500))
        return self._judged("an error instead of a reply", said, verdict(status, said, self.url), 200)

    def _judged(
        self, what: str, said: Said, found: Verdict, status: int, retry_after: float | None = None
    ) -> WireError:
        words = self.shown(said.message).rstrip(".")
        message = f"{what}{words and f': {words}'}{found.advice and f'; {found.advice}'}"
        kind, retry, fatal, _ = found
        return self.error(kind, message, status=status, retry=retry, fatal=fatal, retry_after=retry_after, brief=what)

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
            return self.error("tls", ADVICE["tls"], fatal=True)
        if _NO_HTTP.search(words):
            return self.error("connection", f"what answers there speaks no HTTP{hint}; check the base URL", retry=True)
        if _DISCONNECTED.search(words):
            return self.error("connection", f"the server closed the connection without an answer{hint}", retry=True)
        if _BROKEN.search(words):
            return self.error("connection", "the connection broke in the middle of the reply", retry=True)
        return self.error("connection", self.shown(words), retry=True)


def _pattern(secret: str) -> re.Pattern[str]:
    """Where a secret stands; one of a few letters, as servers at home take them, only where it is a word."""
    exact = re.escape(secret)
    return re.compile(exact if len(secret) >= _SHORT else rf"(?<!\w){exact}(?!\w)")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


_encode = msgspec.json.Encoder(enc_hook=_plain).encode


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what it came from, told or hidden (``from None``); what else was going on is another's."""
    while error is not None:
        yield error
        for each in getattr(error, "exceptions", ()):  # of a group
            yield from _causes(each)
        error = error.__cause__ or (error.__context__ if error.__suppress_context__ else None)
