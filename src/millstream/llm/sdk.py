"""One attempt through a user's own `openai.AsyncOpenAI`: its HTTP client, proxies, headers and key, but our judgement.

The SDK takes a stream that was cut for a whole one and hides what went wrong on the network, so only its way of sending
is used: replies come as bytes and are read by the code that reads those of `Wire`.
"""

import sys
from collections.abc import Mapping
from typing import Any

import msgspec

from millstream.llm.addresses import CHAT, address_of, checked_headers, secrets_in
from millstream.llm.events import ReplyPieces, streamed
from millstream.llm.peers import Peer
from millstream.llm.replies import MOST, Answer, answer_in, whole

_RAISE = {  # the SDK and the libraries that it may send with, and what they raise
    "openai": ("OpenAIError",),
    "httpx": ("HTTPError", "InvalidURL", "StreamError"),
    "httpx2": ("HTTPError", "InvalidURL", "StreamError"),
    "anyio": ("BrokenResourceError", "ClosedResourceError", "EndOfStream"),
}


class SdkWire:
    """`Wire`'s face for an `openai.AsyncOpenAI`, whose own retries and timeouts are switched off, and which stays open.

    ``async with SdkWire(AsyncOpenAI(...)) as wire: await wire.send(body)``. It knows the packages by what the user
    brings: `openai` is imported by nobody else.
    """

    def __init__(self, client: Any, *, headers: Mapping[str, str] | None = None, most: int = MOST) -> None:
        self._most, self._headers = most, checked_headers(headers or {})
        self._client = client.with_options(max_retries=0, timeout=None)
        self._address = address_of(str(client.base_url))
        self.base_url = self._address.url

    def __repr__(self) -> str:
        return f"SdkWire({self.base_url!r})"

    async def __aenter__(self) -> "SdkWire":
        return self

    async def __aexit__(self, *_: object) -> None:
        pass  # the user's client is the user's to close

    async def send(self, body: Mapping[str, Any] | bytes, path: str = CHAT) -> Answer:
        """Make one attempt with a mapping, or with bytes that are JSON already. Raises WireError."""
        response = await self._begin(body, path)
        try:
            content = await whole(self._peer(), response, self._most)
        finally:
            await response.close()
        if response.status != 200:
            raise self._peer().refused(response.status, content, response.headers)
        return answer_in(self._peer(), content, path)

    def pieces(self, body: Mapping[str, Any] | bytes, path: str = CHAT) -> ReplyPieces:
        """One attempt whose text comes piece by piece; see `Wire.pieces`."""
        return ReplyPieces(self._peer(), lambda: self._begin(streamed(body), path), self._most)

    async def _begin(self, body: Mapping[str, Any] | bytes, path: str) -> "_Response":
        peer = self._peer()
        # A mapping, as clients for Azure look for the model in it; what cannot be written as JSON is told beforehand.
        data = msgspec.json.decode(body if isinstance(body, bytes) else peer.encoded(body))
        # Under this header, by which its own `with_streaming_response` works, the SDK hands over the response unread.
        options = {"headers": {**self._headers, "X-Stainless-Raw-Response": "stream"}}
        try:
            raw = await self._client.post(path, cast_to=object, body=data, options=options)
        except _errors() as error:
            response = getattr(error, "response", None)
            if response is None:
                raise peer.lost(error.__cause__ or error) from None
            raise peer.refused(response.status_code, response.content, response.headers) from None
        return _Response(raw.http_response, peer)

    def _peer(self) -> Peer:
        """The server with the secrets of now: a key may be renewed between two requests."""
        sent = getattr(self._client, "default_headers", {})
        keys = [str(value) for name, value in sent.items() if _is_secret(name)]
        key = getattr(self._client, "api_key", None)
        given = [*self._address.secrets, *secrets_in(self._headers)]
        return Peer(self.base_url, [key if isinstance(key, str) else "", *keys, *given])


class _Response:
    """httpx's response, as `ReplyPieces` reads it."""

    def __init__(self, response: Any, peer: Peer) -> None:
        self._response, self._peer = response, peer
        self._chunks = response.aiter_bytes()
        self.status: int = response.status_code
        self.headers: Mapping[str, str] = response.headers

    async def chunk(self) -> bytes:
        try:
            found: bytes = await anext(self._chunks, b"")
            return found
        except _errors() as error:
            raise self._peer.lost(error) from None

    async def close(self) -> None:
        await self._chunks.aclose()
        await self._response.aclose()


def _is_secret(header: str) -> bool:
    name = header.lower()
    return any(word in name for word in ("key", "auth", "token", "cookie", "secret"))


def _errors() -> tuple[type[BaseException], ...]:
    """What the SDK raises, and the libraries below it, as far as they are loaded."""
    found = [(sys.modules[name], errors) for name, errors in _RAISE.items() if name in sys.modules]
    return (OSError, *(getattr(module, error) for module, errors in found for error in errors))
