"""The base URL of a server, and the secrets in it."""

import base64
from urllib.parse import unquote, urlsplit

from millstream.errors import RequestError

CHAT = "/chat/completions"


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
