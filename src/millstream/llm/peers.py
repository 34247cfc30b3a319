"""A server as messages speak of it: in one line that says what to do, and never holds a key."""

import errno
import re
import socket
import ssl
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import msgspec

from millstream.llm.addresses import CHAT
from millstream.llm.said import Said, asked_in, said_by, said_in
from millstream.llm.verdicts import CONNECTION, NO_PLACE, TLS, UNSENT, Verdict, WireError, verdict
from millstream.store.pipe import refused

_LONGEST_WORDS = 300  # characters of what a server says that a message quotes
_LONG = 60.0  # seconds to be left alone for that a message tells
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE)
_SHORT = 8  # characters; a key has more
_NO_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")  # what older and newer OpenSSL call it
# What aiohttp and httpx say, in this order, of a connection that ended too early, and of bytes that are no HTTP.
_DISCONNECTED = re.compile(r"ServerDisconnected|Server disconnected")
_BROKEN = re.compile(r"payload is not completed|without sending complete message body")
_NO_CONNECTION = re.compile(r"Connector|ConnectError|ConnectTimeout|PoolTimeout")  # in an error's class
_NO_HTTP = re.compile(r"Bad status line|Expected HTTP/|illegal request line")
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

    def error(self, found: Verdict, message: str, **more: Any) -> WireError:
        return WireError(found, f"{self.url}: {message}", **{"brief": message, **more})

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
            raise self.error(UNSENT, f"the request cannot be written as JSON: {self.shown(str(error))}") from None

    def refused(self, status: int, content: bytes, headers: Mapping[str, str]) -> WireError:
        """An HTTP error as a WireError, with the server's own words if it has some."""
        said = said_in(content)
        seconds = asked_in(headers, said)
        found = verdict(status, said, self.url, seconds)
        if 300 <= status < 400:
            target = self.shown(headers.get("Location") or "nowhere").removesuffix(CHAT)
            found = replace(found, advice=f"it redirects to {target}; give that as the base URL")
        return self._judged(f"HTTP {status}", said, found, status=status, seconds=seconds)

    def failed(self, error: Any) -> WireError:
        """An error that came with status 200: in the middle of a stream, or instead of choices."""
        said = said_by(error)
        found = verdict(said.status, said, self.url, said.seconds)
        failed = self._judged("an error instead of a reply", said, found, status=200, seconds=said.seconds)
        failed.unpaid = True
        return failed

    def _judged(self, what: str, said: Said, found: Verdict, *, status: int, seconds: float | None) -> WireError:
        words = self.shown(said.message).rstrip(".")
        asks = f"it asks to be left alone for {_time(seconds)}" if seconds and seconds >= _LONG else ""
        message = "; ".join(filter(None, [f"{what}{words and f': {words}'}", found.advice, asks]))
        return self.error(found, message, status=status, retry_after=seconds, brief=what)

    def lost(self, error: BaseException) -> WireError:
        """No reply, or not a whole one: what the network or the HTTP library raised, as a WireError."""
        causes = list(_causes(error))
        words = next((words for cause in causes if (words := str(cause))), "no reason given")
        for cause in reversed(causes):  # aiohttp's own look like those that they came from
            if isinstance(cause, ssl.SSLCertVerificationError):
                reason = self.shown(cause.verify_message)
                advice = "for an authority of your own, set SSL_CERT_FILE"
                return self.error(TLS, f"its certificate is not trusted: {reason}; {advice}", unpaid=True)
            if isinstance(cause, ssl.SSLError) and cause.reason in _NO_TLS:
                return self.error(TLS, "no TLS is spoken there; does its URL start with http://?", unpaid=True)
            if isinstance(cause, ConnectionRefusedError):
                return self.error(CONNECTION, "connection refused; is the server running?", unpaid=True)
            unknown = isinstance(cause, socket.gaierror) or "DNS" in type(cause).__name__
            if getattr(cause, "errno", None) in _OUT_OF_FILES or (unknown and _is_out_of_files()):
                return self.error(
                    NO_PLACE, "no file descriptor is free for a connection; ulimit -n says how many are", unpaid=True
                )
            if unknown:
                host = urlsplit(self.url).hostname
                return self.error(CONNECTION, f"the host {host} is unknown; check the base URL", unpaid=True)
        words = f"{type(error).__name__}: {words}"
        hint = " (if it always does, it may want https://)" if self.url.startswith("http:") else ""
        if _TLS_ALERT.search(words):
            return self.error(TLS, "the server wants TLS; does its URL start with https://?", unpaid=True)
        if _NO_HTTP.search(words):
            return self.error(CONNECTION, f"what answers there speaks no HTTP{hint}; check the base URL")
        if _DISCONNECTED.search(words):
            return self.error(CONNECTION, f"the server closed the connection without an answer{hint}")
        if _BROKEN.search(words):
            return self.error(CONNECTION, "the connection broke in the middle of the reply")
        unpaid = any(_NO_CONNECTION.search(type(cause).__name__) for cause in causes)
        return self.error(CONNECTION, self.shown(words), unpaid=unpaid)


def _time(seconds: float) -> str:
    """Seconds as one says them.

    >>> _time(90.0), _time(5400.0), _time(86_400.0), _time(172_800.0)
    ('90 s', '90 min', '24 h', '2 days')
    """
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _is_out_of_files() -> bool:
    """Whether it was for want of a file descriptor that a name could not be looked up, which tells no reason."""
    return refused() in _OUT_OF_FILES


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
