"""The base URL of a server and what is sent with every request; and what of it no message may show."""

import base64
import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import unquote, unquote_plus, urlsplit

from millstream.errors import RequestError

CHAT = "/chat/completions"

_ENDPOINTS = (CHAT, "/completions", "/embeddings", "/responses", "/rerank", "/score")
_VERSION = re.compile(r"/v\d+$")
_OPEN = {"api-version"}  # queries that are no secrets: messages of servers speak of them
_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # what a header's name is made of
_OURS = {  # headers that say how a body is sent
    *("accept-encoding", "connection", "content-encoding", "content-length", "content-type", "expect", "keep-alive"),
    *("proxy-authorization", "te", "trailer", "transfer-encoding", "upgrade"),
}


class Address(NamedTuple):
    """Where a server is: its base `url` without a login or a query, as messages show it; and these, as given.

    >>> address = address_of("https://ann:secret@example.org/v1/chat/completions?api-version=2024-10-21")
    >>> address.url, address.login, address.at("/embeddings")
    ('https://example.org/v1', 'ann:secret', 'https://example.org/v1/embeddings?api-version=2024-10-21')
    >>> address.at("/v2/rerank")
    'https://example.org/v2/rerank?api-version=2024-10-21'
    """

    url: str
    login: str | None = None
    query: str = ""

    def at(self, path: str) -> str:
        """The URL of an endpoint; a path with a version of its own takes the place of the base URL's."""
        base = _VERSION.sub("", self.url) if re.match(r"/v\d+/", path) else self.url
        return f"{base}{path}{self.query and '?'}{self.query}"

    @property
    def secrets(self) -> list[str]:
        """All that would give away the login, or what the query holds."""
        found = secrets_of(self.login)
        for pair in self.query.split("&"):
            name, _, value = pair.partition("=")
            if name.lower() not in _OPEN:
                found += [value or name, unquote_plus(value or name)]
        return found


def address_of(base_url: str) -> Address:
    """The address in a base URL, or in that of an endpoint such as .../v1/chat/completions.

    Raises RequestError, which shows neither login nor query, if it is no URL.

    >>> address_of("http://127.0.0.1:8000/v1/")
    Address(url='http://127.0.0.1:8000/v1', login=None, query='')
    >>> address_of("127.0.0.1:8000")
    Traceback (most recent call last):
        ...
    millstream.errors.RequestError: the base URL 127.0.0.1:8000 is none: it starts with http:// or https://
    """
    url = base_url.strip()
    login, has_login, rest = url.rpartition("@")
    shown = f"***@{rest}" if has_login else url
    shown = "***" if "?" in login or "#" in login else shown  # then nobody knows where the login ends
    shown = shown.partition("?")[0].partition("#")[0]
    if not url.startswith(("http://", "https://")):
        raise RequestError(f"the base URL {shown} is none: it starts with http:// or https://")
    try:
        parts = urlsplit(url)
        name = (parts.hostname or "").encode("idna")
        sound = name and parts.port != 0 and "@" not in parts.path + parts.query
        sound = sound and url.isprintable() and " " not in url
    except ValueError:
        sound = False
    if not sound:
        advice = "; in a user, password or query, write @ as %40, / as %2F, # as %23" if has_login else ""
        raise RequestError(f"the base URL {shown!r} is none{advice}")
    if "#" in url:
        raise RequestError(f"the base URL {shown} ends before its #; in a password or query, write it as %23")
    login, _, host = parts.netloc.rpartition("@")
    path = parts.path.rstrip("/")
    path = path.removesuffix(next(filter(path.endswith, _ENDPOINTS), "")).rstrip("/")
    return Address(f"{parts.scheme}://{host}{path}", login or None, parts.query)


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


def checked_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """Headers that can be sent with every request. Raises RequestError, which shows no value.

    >>> checked_headers({"X-Team": " mill "})
    {'X-Team': 'mill'}
    >>> checked_headers({"Content-Length": "7"})
    Traceback (most recent call last):
        ...
    millstream.errors.RequestError: the header Content-Length cannot be given: it says how a request is sent
    """
    found: dict[str, str] = {}
    for name, value in headers.items():
        if not isinstance(name, str) or not isinstance(value, str) or not _TOKEN.fullmatch(name):
            raise RequestError("a header has a name of letters, digits and dashes, and text as its value")
        if name.lower() in _OURS:
            raise RequestError(f"the header {name} cannot be given: it says how a request is sent")
        value = value.strip()
        if not (value.isascii() and value.isprintable()):
            raise RequestError(f"the header {name} has a line break or a letter that is not ASCII in its value")
        found[name] = value
    return found


def secrets_in(headers: Mapping[str, str]) -> list[str]:
    """All that would give the values of headers away, a token without the word before it, too.

    >>> secrets_in({"Authorization": "Bearer sk-1"})
    ['Bearer sk-1', 'sk-1']
    """
    return [secret for value in headers.values() for secret in dict.fromkeys([value, value.rpartition(" ")[2]])]
