"""Small requests over HTTP that obstore does not make."""

import errno
import http.client
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

_PATIENCE, _TIMES = 30.0, 4
_NEAR = urllib.request.ProxyHandler({})


class Refused(OSError):
    """A server says no: what it says, in one line."""


class _Here(urllib.request.HTTPRedirectHandler):
    """Follows to nowhere: a token or a signature is for whom it was made for, and urllib would take it along."""

    def redirect_request(self, *_: object) -> None:
        return None


def fetched(
    method: str,
    url: str,
    data: bytes | None = None,
    headers: Mapping[str, str] | None = None,
    *,
    near: bool = False,
    patience: float = _PATIENCE,
    times: int = _TIMES,
) -> bytes:
    """What a server answers, which is asked again where that may help; `near`: without a proxy.

    Raises Refused, and OSError where it cannot be reached; TimeoutError if it took the request and says nothing.
    """
    request = urllib.request.Request(url, data, dict(headers or {}), method=method)
    opener = urllib.request.build_opener(_Here, *([_NEAR] if near else []))
    for attempt in range(times):
        try:
            with opener.open(request, timeout=patience) as answer:
                found: bytes = answer.read()
                return found
        except urllib.error.HTTPError as error:
            with error:
                if error.code < 500:
                    raise Refused(_why(error)) from None
            failure: Exception = error
        except (http.client.HTTPException, OSError) as error:
            failure = error
        if attempt < times - 1:
            time.sleep(0.1 * 2**attempt)
    if isinstance(failure, TimeoutError):
        raise failure
    why = getattr(failure, "reason", failure)
    raise OSError(errno.EIO, f"cannot reach {url} ({why or type(why).__name__})") from failure


def _why(error: urllib.error.HTTPError) -> str:
    """What an answer says, in Amazon's XML or otherwise."""
    text = error.read().decode("utf-8", "replace")
    told = [re.search(rf"<{tag}>([^<]+)</{tag}>", text) for tag in ("Code", "Message")]
    return ": ".join(" ".join(each[1].split()) for each in told if each) or f"{error.code} {error.reason}"
