"""Replies that come in pieces: server-sent events in, pieces of text out, and the whole of it at the end."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

import msgspec

from millstream.llm.peers import Peer
from millstream.llm.replies import Answer, Incoming, Message, answer_in, instead_of_text, whole
from millstream.llm.verdicts import WireError, mapping


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
                self.answer = answer_in(self._peer, await whole(incoming))
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
        self._refused: list[str] = []
        self._thought: list[str] = []
        self._called = _ToolCalls()

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
            failed = self._peer.failed(event.error or mapping(data))
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
        if delta is not None:
            self._refused += filter(None, [delta.refused])
            self._thought += filter(None, [delta.thought])
            self._called.add(delta.called or [])
        said = choice.text if delta is None else delta.content
        text: str | None = said if isinstance(said, str) else instead_of_text(delta)
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
        told = {
            "refusal": "".join(self._refused) or None,
            "tool_calls": self._called.whole or None,
            "reasoning": "".join(self._thought) or None,
        }
        message = {"role": "assistant", "content": text, **{name: value for name, value in told.items() if value}}
        choices = [{"index": 0, "message": message, "finish_reason": self.finish_reason}]
        raw = msgspec.json.encode({"model": self.model, "choices": choices, "usage": self.usage})
        return Answer(text, self.model, self.usage, self.finish_reason, raw, self._peer.url, **told)  # type: ignore[arg-type]

    def _unusable(self, reason: str) -> WireError:
        return self._peer.error("unusable", reason, status=200, retry=True, usage=self.usage)


class _ToolCalls:
    """The calls of tools that a stream tells in pieces: the arguments come letter by letter, the rest once.

    >>> calls = _ToolCalls()
    >>> calls.add([{"index": 0, "id": "a", "function": {"name": "add", "arguments": '{"x":'}}])
    >>> calls.add([{"index": 0, "function": {"arguments": "1}"}}])
    >>> calls.whole
    [{'id': 'a', 'function': {'name': 'add', 'arguments': '{"x":1}'}}]
    """

    def __init__(self) -> None:
        self._calls: dict[Any, dict[str, Any]] = {}

    def add(self, pieces: list[Any]) -> None:
        for piece in pieces:
            if isinstance(piece, dict):
                index = piece.get("index")
                # Some servers number nothing and send each call whole.
                at = index if isinstance(index, int) else len(self._calls)
                _join(self._calls.setdefault(at, {}), {name: piece[name] for name in piece if name != "index"})

    @property
    def whole(self) -> list[Any]:
        return list(self._calls.values())


def _join(whole: dict[str, Any], piece: dict[str, Any]) -> None:
    for name, value in piece.items():
        if isinstance(value, dict) and isinstance(whole.get(name), dict):
            _join(whole[name], value)
        elif name == "arguments" and isinstance(value, str) and isinstance(whole.get(name), str):
            whole[name] += value
        elif value is not None or name not in whole:
            whole[name] = dict(value) if isinstance(value, dict) else value


def streamed(body: Mapping[str, Any] | bytes) -> dict[str, Any]:
    """A request's body that asks for a stream, and for the usage at its end.

    >>> streamed({"model": "m"})
    {'model': 'm', 'stream': True, 'stream_options': {'include_usage': True}}
    """
    given = msgspec.json.decode(body) if isinstance(body, bytes) else body
    options = {"include_usage": True, **(given.get("stream_options") or {})}
    return {**given, "stream": True, "stream_options": options}


class _PieceOfChoice(msgspec.Struct):
    index: int = 0
    delta: Message | None = None
    text: Any = None
    finish_reason: Any = None


class _Event(msgspec.Struct):
    choices: list[_PieceOfChoice] = []
    model: Any = None
    usage: Any = None
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode
