"""Replies that come in pieces: server-sent events in, pieces of text out, and the whole of it at the end."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any

import msgspec

from millstream.llm.peers import Peer
from millstream.llm.replies import (
    GIVEN_UP,
    MOST,
    Answer,
    Incoming,
    Message,
    answer_in,
    instead_of_text,
    message_of,
    not_whole,
    too_large,
    unusable,
    whole,
)
from millstream.llm.tolerant import BLANK, fitted, json_of, text_in, usage_of, whole_letters, word_of
from millstream.llm.verdicts import CUT, WireError

_EVENTS = (b"data", b"event", b"id", b"retry", b":")  # how server-sent events begin
_FIRST_HALVES = ("\ud800", "\udbff")  # of surrogate pairs: from, to


class ReplyPieces(AsyncIterator[str]):
    """A reply in pieces of text, none of them empty: ``async with wire.pieces(body) as pieces: async for piece ...``.

    After the last piece, `answer` is all of it. Raises WireError: of kind "cut" if the stream ends before the server
    says that it does. The connection is closed with the block.
    """

    def __init__(self, peer: Peer, begin: Callable[[], Awaitable[Incoming]], most: int = MOST) -> None:
        self._peer, self._begin, self._most = peer, begin, most
        self._incoming: Incoming | None = None
        self._events = _Events(peer, most)
        self._begun = False
        self._ready: Iterator[str] = iter(())
        self._said: list[str] = []
        self.answer: Answer | None = None

    async def __aenter__(self) -> "ReplyPieces":
        incoming = self._incoming = await self._begin()
        try:
            if incoming.status != 200:
                raise self._peer.refused(incoming.status, await whole(self._peer, incoming), incoming.headers)
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
            chunk = await self._chunk(self._incoming)
            if not self._begun:
                chunk = await self._first(self._incoming, chunk)
            if self.answer is None:
                self._ready = self._events.pieces(chunk)

    async def _first(self, incoming: Incoming, chunk: bytes) -> bytes:
        """The first bytes that are not blank. If they begin no event, all of it is read as a whole reply.

        What they look like decides, as what servers and proxies say of it in Content-Type is often not so.
        """
        blank = 0
        while chunk and not chunk.lstrip(BLANK):
            blank += len(chunk)
            if blank > self._most:
                raise too_large(self._peer, self._most)
            chunk = await self._chunk(incoming)
        self._begun = True
        chunk = chunk.lstrip(BLANK)
        form = incoming.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        declared = form in ("application/json", "text/html")  # it does not stream, or it is none of those servers
        if chunk.startswith((b"{", b"[", b"<")) or (declared and not chunk.startswith(_EVENTS)):
            self.answer = answer_in(self._peer, chunk + await whole(self._peer, incoming, self._most))
            self._ready = iter([self.answer.text] if self.answer.text else [])
        return chunk

    async def _chunk(self, incoming: Incoming) -> bytes:
        try:
            return await incoming.chunk()
        except WireError as error:
            raise self._events.cut(str(error).removeprefix(f"{self._peer.url}: ")) from None

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

    def __init__(self, peer: Peer, most: int) -> None:
        self._peer, self._most = peer, most
        self._bytes = 0
        self._rest: list[bytes] = []  # the begin of a line whose end is not here yet
        self._data = b""  # of an event that goes on in its next line
        self._half = ""  # of a letter that goes on in the next piece
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
        self._bytes += len(chunk)
        if self._bytes > self._most:
            raise too_large(self._peer, self._most)
        for line in self._lines(chunk):
            if not self.done and (piece := self._line(line)):
                yield piece
        if not chunk and not self.done:
            if self._data or self.finish_reason is None:
                raise self.cut("it ended without [DONE]")
            self.done = True  # not all servers say so, but this one has told how the reply ended
        if self.done and self._half:
            self._half = ""
            yield "\ufffd"

    def _lines(self, chunk: bytes) -> list[bytes]:
        """The lines that end in this chunk; at the end, what was left of one."""
        if chunk and b"\n" not in chunk and b"\r" not in chunk:
            self._rest.append(chunk)
            return []
        lines = b"".join([*self._rest, chunk]).splitlines(keepends=True)
        # A line end may be half here: \r, and \n with the next chunk.
        self._rest = [lines.pop()] if chunk and not lines[-1].endswith(b"\n") else []
        return lines

    def _line(self, line: bytes) -> str | None:
        """The piece of text that ends in this line."""
        field, _, value = line.partition(b":")
        if field == b"data" and (value := value.rstrip(b"\r\n").removeprefix(b" ")):
            return self._piece(value)
        if line.strip() and not line.endswith((b"\n", b"\r")):
            raise self.cut("it ended in the middle of a line")
        if field == b"event":
            self._is_error = value.strip() == b"error"
        elif self._data and not line.strip():
            raise unusable(self._peer, "a stream with an event that is none", self.usage)
        return None

    def _piece(self, data: bytes) -> str | None:
        if data.strip() == b"[DONE]" and not self._data:
            self.done = True
            return None
        data = b"\n".join([self._data, data]) if self._data else data
        try:
            event = _decode_event(data)
        except (ValueError, RecursionError):
            try:
                found = json_of(data, mend=False)
            except ValueError:
                self._data = data  # perhaps its next line has the rest
                return None
            event = self._tolerantly(found)
        self._data = b""
        if event.error or self._is_error:
            raise not_whole(self._peer, event.error or json_of(data), None, self.usage)
        return self._told(event)

    def _tolerantly(self, found: Any) -> "_Event":
        """What there is of an event that is not quite as it should be; null is none."""
        given = found if isinstance(found, Mapping) else {}
        choices = given.get("choices") or []
        if not isinstance(choices, list):
            raise unusable(self._peer, "a stream with an event that is none", self.usage)
        return fitted(_Event, given, choices=[_piece_of(choice) for choice in choices if choice is not None])

    def _told(self, event: "_Event") -> str | None:
        self.model = event.model or self.model
        self.usage = usage_of(event.usage) or self.usage
        for choice in event.choices:
            if choice.error:
                raise not_whole(self._peer, choice.error, None, self.usage)
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
        text = choice.text if delta is None else delta.content
        if text is None:
            text = instead_of_text(delta)
        self._has_text = self._has_text or text is not None
        return self._with_half(text) if text else text

    def _with_half(self, text: str) -> str:
        """A piece of text without the half of a letter that it may end in: it goes before the next piece."""
        text, self._half = self._half + text, ""
        if _FIRST_HALVES[0] <= text[-1] <= _FIRST_HALVES[1]:
            text, self._half = text[:-1], text[-1]
        return whole_letters(text)

    def cut(self, reason: str) -> WireError:
        return self._peer.error(CUT, f"the stream was cut: {reason}", status=200, usage=self.usage)

    def ended(self, text: str) -> Answer:
        """The stream said that it ended: all of it as one answer."""
        if not self._has_choice:
            raise unusable(self._peer, "a stream without choices", self.usage)
        if self.finish_reason is None:
            raise self.cut("it ended without a finish_reason")
        if not self._has_text or self.finish_reason in GIVEN_UP:
            raise not_whole(self._peer, None, self.finish_reason, self.usage)
        told = {
            "refusal": "".join(self._refused) or None,
            "tool_calls": self._called.whole or None,
            "reasoning": "".join(self._thought) or None,
        }
        message = {"role": "assistant", "content": text, **{name: value for name, value in told.items() if value}}
        choices = [{"index": 0, "message": message, "finish_reason": self.finish_reason}]
        raw = msgspec.json.encode({"model": self.model, "choices": choices, "usage": self.usage})
        return Answer(text, self.model, self.usage, self.finish_reason, raw, self._peer.url, **told)  # type: ignore[arg-type]


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
    text: str | None = None
    finish_reason: str | None = None
    error: Any = None


class _Event(msgspec.Struct):
    choices: list[_PieceOfChoice] = []
    model: str | None = None
    usage: Any = None
    error: Any = None


_decode_event = msgspec.json.Decoder(_Event).decode


def _piece_of(given: Any) -> _PieceOfChoice:
    named = given if isinstance(given, Mapping) else {}
    delta = named.get("delta")
    return fitted(
        _PieceOfChoice,
        named,
        delta=None if delta is None else message_of(delta),
        text=text_in(named.get("text")),
        finish_reason=word_of(named.get("finish_reason")),
    )
