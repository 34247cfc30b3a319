"""One attempt over the wire: a request body out, an answer, an error or a stream in, over aiohttp.

What an attempt can fail with is a `WireError` that says whether asking again makes sense (`retry`), whether every other
request would fail likewise (`fatal`), and how long the server wants to be left alone (`retry_after`). Scheduling is not
decided here.
"""

import io
import random
from collections.abc import Mapping
from typing import Any

from aiohttp import (
    ClientConnectorDNSError,
    ClientError,
    ClientHttpProxyError,
    ClientProxyConnectionError,
    ClientResponse,
    ClientSession,
    ClientTimeout,
    DummyCookieJar,
    TCPConnector,
)
from aiohttp.hdrs import CONTENT_ENCODING
from yarl import URL

from millstream.errors import RequestError
from millstream.llm.addresses import CHAT, address_of, basic, checked_headers, secrets_in, secrets_of
from millstream.llm.events import ReplyPieces, streamed
from millstream.llm.peers import Peer
from millstream.llm.proxies import Proxy, proxy_for
from millstream.llm.replies import MOST, Answer, answer_in, unusable, whole
from millstream.llm.said import seconds_of
from millstream.llm.unpacking import BadPacking, Unpacker
from millstream.llm.verdicts import CONNECTION, PROXY, WireError

__all__ = ["CHAT", "Answer", "ReplyPieces", "Wire", "WireError", "seconds_of", "wait_before_retry"]

FIRST_WAIT = 0.5
LONGEST_WAIT = 60.0
_DOUBLINGS = 30  # lead beyond any wait, and 2.0**1024 is an error

_LONGEST_HEADER = 64 << 10  # bytes; proxies and policies make them long
_AT_ONCE = 1 << 20  # bytes; aiohttp warns of more in one piece


class Wire:
    """A connection pool to one server, for one event loop: ``async with Wire(url) as wire: await wire.send(body)``.

    The number of connections is not limited here: whoever calls `send` bounds how many run at once. A user and password
    in the URL are sent instead of the key, a query behind every path, `headers` with every request and in the place of
    our own. `proxy` is the URL of one; without it, the environment may name it. A reply has at most `most` bytes.
    Raises RequestError for what is no URL, and for a key or header that cannot be sent.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        *,
        headers: Mapping[str, str] | None = None,
        proxy: str | None = None,
        most: int = MOST,
    ) -> None:
        self._most = most
        self._address = address_of(base_url)
        self.base_url, login = self._address.url, self._address.login
        given = checked_headers(headers or {})
        self._proxy = proxy_for(self.base_url, proxy)
        if api_key and not (api_key.isascii() and api_key.isprintable()):
            raise RequestError("the API key has a line break or a letter that is not ASCII; was it copied whole?")
        behind = secrets_of(self._proxy.login) if self._proxy else []
        self._peer = Peer(self.base_url, [api_key or "", *self._address.secrets, *secrets_in(given), *behind])
        # All that aiohttp would add is given: what it has to look up and merge for each request costs time.
        self._headers = {
            "Content-Type": "application/json",
            "Accept": "*/*",
            "Accept-Encoding": "identity",
            "User-Agent": "millstream",
        }
        if login:
            self._headers["Authorization"] = basic(login)
        elif api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        ours = {name.lower(): name for name in self._headers}
        self._headers |= {ours.get(name.lower(), name): value for name, value in given.items()}
        self._options = self._through(self._proxy) if self._proxy else {}  # of each request
        self._urls: dict[str, URL] = {}
        self._session: ClientSession | None = None

    def _through(self, proxy: Proxy) -> dict[str, Any]:
        """What aiohttp is told with each request that goes through a proxy.

        The headers are among it: a session's own would go to the proxy, too, the key as its Proxy-Authorization.
        """
        login = {"Proxy-Authorization": basic(proxy.login)} if proxy.login else {}
        if self.base_url.startswith("https:"):  # the proxy opens a tunnel, and sees nothing else
            return {"proxy": URL(proxy.url), "headers": self._headers, "proxy_headers": login}
        return {"proxy": URL(proxy.url), "headers": {**self._headers, **login}}

    def __repr__(self) -> str:
        return f"Wire({self.base_url!r})"  # and not the key

    async def __aenter__(self) -> "Wire":
        self._session = ClientSession(
            connector=TCPConnector(limit=0, ttl_dns_cache=300),
            timeout=ClientTimeout(total=None),  # the caller's clock is the only one
            headers=None if self._proxy else self._headers,
            cookie_jar=DummyCookieJar(),
            auto_decompress=False,  # it would unpack any amount at once
            max_line_size=_LONGEST_HEADER,
            max_field_size=_LONGEST_HEADER,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._session:
            await self._session.close()

    async def send(self, body: Mapping[str, Any] | bytes, path: str = CHAT) -> Answer:
        """Make one attempt with a mapping, or with bytes that are JSON already. Raises WireError."""
        try:
            async with self._post(body, path) as response:
                content = await self._content(response)
        except (ClientError, OSError) as error:
            raise self._lost(error) from None  # its cause may hold the key
        if response.status != 200:
            raise self._peer.refused(response.status, content, response.headers)
        return answer_in(self._peer, content, path)

    async def _content(self, response: ClientResponse) -> bytes:
        """The body of a reply, as far as it is read."""
        size = response.content_length
        if size is not None and size <= self._most and CONTENT_ENCODING not in response.headers:
            return await response.read()
        incoming = _Response(response, self._peer)
        try:
            return await whole(self._peer, incoming, self._most)
        finally:
            await incoming.close()

    def pieces(self, body: Mapping[str, Any] | bytes, path: str = CHAT) -> ReplyPieces:
        """One attempt whose text comes piece by piece: ``async with wire.pieces(body) as pieces: async for piece ...``.

        Leaving the block early closes the connection. Raises WireError, on entering the block and later.
        """

        async def begin() -> _Response:
            try:
                return _Response(await self._post(streamed(body), path), self._peer)
            except (ClientError, OSError) as error:
                raise self._lost(error) from None

        return ReplyPieces(self._peer, begin, self._most)

    def _lost(self, error: ClientError | OSError) -> WireError:
        """What to say of an attempt that got no answer: it may not have come further than the proxy."""
        lost = self._peer.lost(error)
        if not self._proxy or lost.no_place:
            return lost
        if isinstance(error, ClientHttpProxyError):
            said = f"HTTP {error.status} {self._peer.shown(error.message)}".rstrip()
            found = CONNECTION if error.status >= 500 or error.status == 429 else PROXY
            words = f"the proxy {self._proxy.url} lets no request through: {said}"
            return self._peer.error(found, words, unpaid=True)
        if isinstance(
            error, ClientProxyConnectionError | ClientConnectorDNSError
        ):  # a server's name is the proxy's to find
            words = f"the proxy {self._proxy.url} cannot be reached; check --proxy, HTTPS_PROXY or NO_PROXY"
            return self._peer.error(CONNECTION, words, unpaid=True)
        return lost

    def _post(self, body: Mapping[str, Any] | bytes, path: str) -> Any:
        assert self._session, "use it inside `async with`"
        data = body if isinstance(body, bytes) else self._peer.encoded(body)
        url = self._urls.get(path)
        if url is None:
            url = self._urls[path] = URL(self._address.at(path))
        large = len(data) > _AT_ONCE
        return self._session.post(url, data=io.BytesIO(data) if large else data, allow_redirects=False, **self._options)


class _Response:
    """aiohttp's response, as `ReplyPieces` reads it."""

    def __init__(self, response: ClientResponse, peer: Peer) -> None:
        self._response, self._peer = response, peer
        self.status: int = response.status
        self.headers: Mapping[str, str] = response.headers
        packing = response.headers.get(CONTENT_ENCODING, "identity").strip().lower()
        self._packing = "" if packing == "identity" else packing
        self._unpacker: Unpacker | None = None

    async def chunk(self) -> bytes:
        try:
            return await (self._unpacked() if self._packing else self._response.content.readany())
        except BadPacking as error:
            if self.status != 200:
                return b""  # its status says enough
            raise unusable(self._peer, str(error), {}) from None
        except (ClientError, OSError) as error:
            raise self._peer.lost(error) from None

    async def _unpacked(self) -> bytes:
        unpacker = self._unpacker = self._unpacker or Unpacker(self._packing)
        while not (chunk := unpacker.chunk()):
            packed = await self._response.content.readany()
            if not packed:
                unpacker.end()
                break
            unpacker.feed(packed)
        return chunk

    async def close(self) -> None:
        self._response.close()


def wait_before_retry(error: Exception, attempts: int, most: int, draw: random.Random) -> float | None:
    """Seconds to wait before the next attempt, or None to give up after `most` attempts or a final error.

    Full jitter: anywhere from 0 to a bound that doubles with each attempt, up to a minute (Brooker, "Exponential
    Backoff and Jitter", 2015); what the server asks for is a lower bound.

    >>> from millstream.llm.verdicts import CONNECTION, UNSENT
    >>> draw = random.Random(0)
    >>> wait_before_retry(WireError(UNSENT, "no"), 1, 5, draw) is None
    True
    >>> wait_before_retry(WireError(CONNECTION, "slow", retry_after=7.0), 1, 5, draw) >= 7.0
    True
    """
    again = error.retry if isinstance(error, WireError) else isinstance(error, TimeoutError)
    if not again or attempts >= most:
        return None
    asked: float | None = getattr(error, "retry_after", None)
    return (asked or 0.0) + backoff(attempts, draw)


def backoff(attempts: int, draw: random.Random, longest: float = LONGEST_WAIT) -> float:
    """Seconds to wait after so many attempts, at random up to a bound that doubles and is never above `longest`."""
    return draw.uniform(0.0, min(longest, FIRST_WAIT * 2.0 ** min(attempts, _DOUBLINGS)))
