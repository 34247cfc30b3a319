"""What the simulator reads and writes: requests and replies of OpenAI's API, as JSON."""

import base64
import math
from collections.abc import Callable
from hashlib import blake2b
from struct import pack
from typing import Annotated, Any, NamedTuple, TypeAlias

import msgspec

from millstream.llm.simulator.behaviour import Behaviour, draws_of
from millstream.llm.simulator.words import LETTERS_PER_ID, begin_of, count_ids, fitting, letters_in, pieces_of, reply_to

CREATED = 1_700_000_000  # seconds since 1970, always the same: a reply depends on the request and the seed alone
_DIMENSIONS = 8  # of an embedding that asks for none
_encode = msgspec.json.encode


class _Part(msgspec.Struct):
    text: str = ""


class _Message(msgspec.Struct):
    role: str
    content: str | list[_Part] | None = None


class _StreamOptions(msgspec.Struct):
    include_usage: bool = False


class _Schema(msgspec.Struct):
    schema: dict[str, Any] = {}


class _Format(msgspec.Struct):
    type: str
    json_schema: _Schema | None = None


_Count = Annotated[int, msgspec.Meta(ge=1)] | None


class ChatRequest(msgspec.Struct):
    model: str
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: _Count = None
    max_completion_tokens: _Count = None
    n: _Count = None
    response_format: _Format | None = None

    def said(self) -> tuple[str, int]:
        """The last user message, and the letters of all messages."""
        last, letters = "", 0
        for message in self.messages:
            content = message.content or ""
            text = content if isinstance(content, str) else "".join(part.text for part in content)
            letters += letters_in(text)
            if message.role == "user":
                last = text
        return last, letters

    def reply(self, behaviour: Behaviour, key: bytes) -> "Content":
        return _reply_to(self, behaviour, "chatcmpl-", key)


class CompletionRequest(msgspec.Struct):
    model: str
    prompt: str | list[int]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: _Count = None
    n: _Count = None

    max_completion_tokens = None
    response_format = None

    def said(self) -> tuple[str, int]:
        if isinstance(self.prompt, str):
            return self.prompt, letters_in(self.prompt)
        return f"{len(self.prompt)} ids", len(self.prompt) * LETTERS_PER_ID

    def reply(self, behaviour: Behaviour, key: bytes) -> "Content":
        return _reply_to(self, behaviour, "cmpl-", key)


class EmbeddingRequest(msgspec.Struct):
    model: str
    input: str | list[Any]
    dimensions: _Count = None
    encoding_format: str | None = None

    stream = None
    stream_options = None

    def __post_init__(self) -> None:
        if not all(isinstance(text, str) or _are_ids(text) for text in self.texts):
            raise ValueError("'input' is a text, a list of ids, or a list of either")

    @property
    def texts(self) -> list[Any]:
        return [self.input] if isinstance(self.input, str) or _are_ids(self.input) else self.input

    def reply(self, behaviour: Behaviour, key: bytes) -> "Content":
        texts = self.texts
        letters = [letters_in(text) if isinstance(text, str) else len(text) * LETTERS_PER_ID for text in texts]
        vectors = [_vector(text, self.dimensions or _DIMENSIONS, self.encoding_format) for text in texts]
        return Content("embd-" + key.hex(), self.model, (), sum(map(count_ids, letters)), 0, vectors=vectors)


def _are_ids(given: Any) -> bool:
    return isinstance(given, list) and all(isinstance(one, int) for one in given)


Asked: TypeAlias = ChatRequest | CompletionRequest | EmbeddingRequest


class ReplyChoice(NamedTuple):
    """One choice of a reply; `text` is None where something else, or nothing, stands in its place."""

    text: str | None
    finish: str
    refusal: str | None = None
    calls: list[dict[str, Any]] | None = None

    @property
    def said(self) -> dict[str, Any]:
        """What beside the text stands in a message."""
        more: dict[str, Any] = {} if self.refusal is None else {"refusal": self.refusal}
        return more if self.calls is None else {**more, "tool_calls": self.calls}

    def half(self, finish: str) -> "ReplyChoice":
        text = self.text or ""
        return ReplyChoice(text[: len(text) // 2], finish)


class Content(NamedTuple):
    """What to answer, apart from how; `thought` are ids of it that `completion_tokens` does not count, `cached` ids of
    the prompt that were read from a cache. `naming` None: no usage is told."""

    name: str
    model: str
    choices: tuple[ReplyChoice, ...]
    ids_in: int
    ids_out: int
    thought: int = 0
    cached: int = 0
    naming: str | None = "openai"
    vectors: list[Any] | None = None

    @property
    def usage(self) -> dict[str, Any] | None:
        total, told = self.ids_in + self.ids_out, self.ids_out - self.thought
        if self.naming != "openai":
            return self.naming and {"input_tokens": self.ids_in, "output_tokens": told}  # type: ignore[return-value]
        if self.vectors is not None:
            return {"prompt_tokens": self.ids_in, "total_tokens": total}
        usage: dict[str, Any] = {"prompt_tokens": self.ids_in, "completion_tokens": told, "total_tokens": total}
        return {**usage, "prompt_tokens_details": {"cached_tokens": self.cached}} if self.cached else usage

    def whole(self, empty: bool = False) -> bytes:
        """The body of a reply at once; `empty`: without choices."""
        if self.vectors is not None:
            data = [{"object": "embedding", "index": at, "embedding": one} for at, one in enumerate(self.vectors)]
            return _encode({"object": "list", "data": [] if empty else data, "model": self.model, "usage": self.usage})
        choices = [] if empty else [self._choice(at, choice) for at, choice in enumerate(self.choices)]
        return _encode({**self._head(""), "choices": choices, "usage": self.usage})

    def events(self, include_usage: bool, empty: bool = False) -> list[bytes]:
        """The events of a streamed reply, without the closing one: role, pieces of 4 characters, finish, usage."""
        common = self._head(".chunk")
        if include_usage:
            common["usage"] = None
        events = []
        for at, choice in enumerate(self.choices):
            for said, finish in self._pieces(choice):
                choices = [] if empty else [{"index": at, **said, "logprobs": None, "finish_reason": finish}]
                events.append(b"data: %b\n\n" % _encode({**common, "choices": choices}))
        if include_usage:
            events.append(b"data: %b\n\n" % _encode({**common, "choices": [], "usage": self.usage}))
        return events

    @property
    def _is_chat(self) -> bool:
        return self.name.startswith("chat")

    def _head(self, of_a_piece: str) -> dict[str, Any]:
        kind = f"chat.completion{of_a_piece}" if self._is_chat else "text_completion"
        return {"id": self.name, "object": kind, "created": CREATED, "model": self.model}

    def _choice(self, at: int, choice: ReplyChoice) -> dict[str, Any]:
        head: dict[str, Any] = {"index": at, "logprobs": None, "finish_reason": choice.finish}
        if not self._is_chat:
            return {**head, "text": choice.text}
        return {**head, "message": {"role": "assistant", "content": choice.text, **choice.said}}

    def _pieces(self, choice: ReplyChoice) -> list[tuple[dict[str, Any], str | None]]:
        """What each event says of a choice, and its finish_reason."""
        text = choice.text
        ending = None if text is None else ""
        pieces: list[str | None] = [None] if text is None else [*pieces_of(text)]
        if not self._is_chat:
            return [*(({"text": piece}, None) for piece in pieces), ({"text": ending}, choice.finish)]
        calls = choice.calls and [{"index": at, **call} for at, call in enumerate(choice.calls)]
        more = choice._replace(calls=calls).said
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ending}]
        deltas += [{"content": piece, **more} for piece in pieces]
        return [*(({"delta": delta}, None) for delta in deltas), ({"delta": {"content": ending}}, choice.finish)]


def altered(reply: Content, kind: str) -> Content:
    """A reply as the fault `kind` has it, if that changes what it says rather than how it is sent."""
    change = _CHANGES.get(kind)
    return reply if change is None or reply.vectors is not None else change(reply)


_CALL = {"id": "call_1", "type": "function", "function": {"name": "grind", "arguments": '{"grain": "wheat"}'}}
_CHANGES: dict[str, Callable[[Content], Content]] = {
    "null-content": lambda reply: _with(reply, lambda choice: ReplyChoice(None, choice.finish)),
    "bad-schema": lambda reply: _with(
        reply, lambda choice: ReplyChoice('["not", "what", "was", "asked"]', choice.finish)
    ),
    "length": lambda reply: _with(reply, lambda choice: choice.half("length")),
    "filtered": lambda reply: _with(reply, lambda choice: ReplyChoice(None, "content_filter")),
    "half-filtered": lambda reply: _with(reply, lambda choice: choice.half("content_filter")),
    "refused": lambda reply: _with(reply, lambda choice: ReplyChoice(None, "stop", refusal="I cannot help with that.")),
    "tool-calls": lambda reply: _with(reply, lambda choice: ReplyChoice(None, "tool_calls", calls=[_CALL])),
    "all-thought": lambda reply: _with(reply, lambda choice: ReplyChoice(None, "length")),
    "aborted": lambda reply: _with(reply, lambda choice: choice.half("abort")),
    "no-usage": lambda reply: reply._replace(naming=None),
    "other-usage": lambda reply: reply._replace(naming="other"),
    "hidden-thinking": lambda reply: _with(reply, lambda choice: choice.half(choice.finish))._replace(
        thought=reply.ids_out // 2
    ),
    "cached": lambda reply: reply._replace(cached=reply.ids_in // 2),
}


def _with(reply: Content, change: Callable[[ReplyChoice], ReplyChoice]) -> Content:
    return reply._replace(choices=tuple(map(change, reply.choices)))


def _reply_to(asked: ChatRequest | CompletionRequest, behaviour: Behaviour, prefix: str, key: bytes) -> Content:
    message, letters = asked.said()
    limit = asked.max_completion_tokens or asked.max_tokens
    choices, ids_out = [], 0
    for number in range(asked.n or 1):
        text, finish = _formed(reply_to(message, behaviour.reply_ids, key[0], number), asked.response_format), "stop"
        if limit and letters_in(text) > limit * LETTERS_PER_ID:
            text, finish = begin_of(text, limit * LETTERS_PER_ID), "length"
        choices.append(ReplyChoice(text, finish))
        ids_out += count_ids(letters_in(text))
    return Content(prefix + key.hex(), asked.model, tuple(choices), count_ids(letters), ids_out)


def _formed(text: str, form: _Format | None) -> str:
    if form and form.type == "json_schema" and form.json_schema:
        return _encode(fitting(form.json_schema.schema, text)).decode()
    if form and form.type == "json_object":
        return _encode({"reply": text}).decode()
    return text


def _vector(text: str | list[int], dimensions: int, encoding: str | None) -> Any:
    """The direction that a text, or a list of ids, points to: of length 1, and the same for the same text."""
    key = blake2b(_encode(text), digest_size=16).digest()
    numbers = [2 * draw - 1 for draw, _ in zip(draws_of(key, 0), range(dimensions), strict=False)]
    length = math.sqrt(sum(number * number for number in numbers)) or 1.0
    numbers = [number / length for number in numbers]
    return base64.b64encode(pack(f"<{dimensions}f", *numbers)).decode() if encoding == "base64" else numbers


def error_body(message: str, kind: str, code: str | None) -> bytes:
    """
    >>> error_body("Overloaded", "overloaded_error", None)
    b'{"error":{"message":"Overloaded","type":"overloaded_error","param":null,"code":null}}'
    """
    return _encode({"error": {"message": message, "type": kind, "param": None, "code": code}})
