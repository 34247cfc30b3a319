"""The client of a bucket, which is obstore: credentials and endpoints as others have them, and errors in words."""

import errno
import itertools
import os
import re
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies

from millstream.errors import RequestError
from millstream.store.aws import endpoint, region
from millstream.store.credentials import keys_of
from millstream.store.ranges import without_secrets
from millstream.store.waiting import interruptible

T = TypeVar("T")
_ATTEMPTS = 4
_TRIES, _PATIENCE = 10, timedelta(minutes=3)

_BROKEN = re.compile("body error|error decoding")
_MOVED = re.compile("status code: 30[1278]")
_ODD = re.compile(r'(?:invalid path|parse path)[^"]*(?:Path )(".*?")')
_CODES = {
    "NoSuchBucket": "there is no such bucket: make it, or mend the address",
    "InvalidAccessKeyId": "the server does not know this access key: give another AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "SignatureDoesNotMatch": "the secret key does not fit the access key: give another AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the credentials have expired: get new ones",
    "InvalidToken": "the session token is not valid: give another AWS_SESSION_TOKEN",
    "ExpiredTokenException": "the credentials have expired: get new ones",
    "RequestTimeTooSkewed": "this machine's clock differs from the server's by more than it allows: set it",
    "PermanentRedirect": "the bucket is in another region: give it as AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket is in another region: give it as AWS_REGION",
    "IllegalLocationConstraintException": "the bucket is in another region: give it as AWS_REGION",
}
"""What a person can mend, by the code that a server gives."""
_DENIED = "the credentials may not do that there: allow it, or give others"

_process: int | None = None
"""The process that has begun to use obstore: its threads do not come along into a fork, which would wait for ever."""


def client_of(root: str) -> Any:
    """obstore's store of a bucket. Raises RequestError without obstore, without credentials, and in a fork."""
    global _process
    _process = _process or os.getpid()
    if _process != os.getpid():
        raise RequestError(
            f"{root} was opened before this process was forked, and cannot be read here: start processes with "
            "forkserver (a DataLoader: multiprocessing_context='forkserver')"
        )
    return _client(root, tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_"))))


@lru_cache(maxsize=16)
def _client(root: str, _environment: tuple[tuple[str, str], ...]) -> Any:
    try:
        import obstore.store  # noqa: F401
    except ImportError:
        raise RequestError(f"{root} needs obstore: pip install 'millstream[s3]'") from None
    options: dict[str, Any] = {"timeout": "120s", "connect_timeout": "5s", "user_agent": "millstream"}
    retries: Any = {"max_retries": _TRIES, "retry_timeout": _PATIENCE}
    if not root.startswith("s3://"):
        return _opened(root, client_options=options, retry_config=retries)
    config: Any = {"region": region()}
    address = endpoint()
    if address:
        if urlsplit(address).scheme not in ("http", "https") or not urlsplit(address).hostname:
            raise RequestError(f"{without_secrets(address)} is no endpoint: AWS_ENDPOINT_URL is http(s)://HOST[:PORT]")
        _reach(address)
        config["endpoint"] = address
        options["allow_http"] = address.startswith("http://")
    keys = keys_of(root)
    if keys is None:
        config["skip_signature"] = True
    return _opened(root, config=config, client_options=options, retry_config=retries, credential_provider=keys)


def _opened(root: str, **options: Any) -> Any:
    from obstore.exceptions import BaseError
    from obstore.store import from_url

    try:
        return from_url(root, **options)
    except (BaseError, ValueError) as error:
        first = without_secrets(str(error).partition("\n")[0].rstrip(": "))
        raise RequestError(f"{root} cannot be opened: {first}") from error


def _reach(address: str) -> None:
    """Raises OSError if a server is not there, soon: obstore would try for minutes."""
    place = urlsplit(address)
    if getproxies():
        return
    port = place.port or (443 if place.scheme == "https" else 80)
    for attempt in range(_ATTEMPTS):
        try:
            socket.create_connection((place.hostname or "", port), timeout=5).close()
            return
        except OSError as error:
            if attempt == _ATTEMPTS - 1:
                told = f"cannot reach {without_secrets(address)} ({error.strerror or error}): mend AWS_ENDPOINT_URL"
                raise OSError(errno.ECONNREFUSED, told) from error
            time.sleep(0.2 * 2**attempt)


# Errors -----------------------------------------------------------------------------------------------------------


def asked(root: str, name: str, ask: Callable[[], T]) -> T:
    """What obstore answers. What it raises comes as a store says it: as OSError, or RequestError for what a person can
    mend at once.

    An answer that breaks off is asked for again: obstore does that for some requests alone.
    """
    from obstore.exceptions import BaseError

    for attempt in itertools.count():
        try:
            return interruptible(ask)
        except (BaseError, OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            if attempt == _TRIES or not _BROKEN.search(str(error)):
                raise _in_words(error, root, name) from error
        time.sleep(min(0.05 * 2**attempt, 5.0))
    raise AssertionError


def code_of(error: BaseException) -> str:
    """The code that a server gave, or its status."""
    text = str(error)
    found = re.search(r"<Code>(\w+)</Code>", text) or re.search(r"response error \"(\w+)\"", text)
    status = re.search(r"status code: (\d+)", text)
    return found[1] if found else status[1] if status else ""


def _in_words(error: Exception, root: str, name: str) -> Exception:
    code, path = code_of(error), f"{root}/{name}" if name else root
    if "incorrectly configured region" in str(error) or _MOVED.search(str(error)):  # what obstore makes of a redirect
        code = "PermanentRedirect"
    if code in _CODES:
        wanted = re.search(r"<Region>([\w-]+)</Region>|expecting '([\w-]+)'", str(error))
        more = f" ({wanted[1] or wanted[2]})" if wanted else ""
        return RequestError(f"{root}: {_CODES[code]}{more}")
    if odd := _ODD.search(str(error)):
        return RequestError(
            f"{root} has a name in it that cannot be read, {odd[1]}: no folder may have the name '', '.' or '..'; "
            "rename what is called so, or give folders beside it"
        )
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
    if code in ("AccessDenied", "403", "401") or type(error).__name__ == "PermissionDeniedError":
        return PermissionError(errno.EACCES, _DENIED, path)
    first = without_secrets(str(error).partition("\n")[0].rstrip(": "))
    return OSError(errno.EIO, f"{first} {code}".rstrip() if code not in first else first, path)
