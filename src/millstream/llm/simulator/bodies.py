"""What the simulator reads and says: requests and replies of OpenAI's API, as JSON."""

from collections.abc import Iterator
from typing import Annotated, Any, NamedTuple

import msgspec

from millstream.llm.simulator.behaviour import Behaviour

_CHARACTERS_PER_ID = 4
CREATED = 1_700_000_000  # seconds since 1970, always the same: a reply depends on the request and the seed alone
_CAPITALS = {"france": "France is Paris", "germany": "Germany is Berlin", "italy": "Italy is Rome"}
_FILLING = ("the", "wheel", "turns", "and", "grain", "becomes", "flour", "as", "water", "runs", "over", "stone")


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


_Limit = Annotated[int, msgspec.Meta(ge=1)] | None


class Chat(msgspec.Struct):
    model: str
    messages: Annotated[list[_Message], msgspec.Meta(min_length=1)]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: _Limit = None
    max_completion_tokens: _Limit = None
    response_format: _Format | None = None

    def said(self) -> tuple[str, int]:
        """The last user message, and the characters of all messages."""
        last, characters = "", 0
        for message in self.messages:
            content = message.content or ""
            text = content if isinstance(content, str) else "".join(part.text for part in content)
            characters += len(text)
            if message.role == "user":
                last = text
        return last, characters


class Completion(msgspec.Struct):
    model: str
    prompt: str | list[int]
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: _Limit = None

    max_completion_tokens = None
    response_format = None

    def said(self) -> tuple[str, int]:
        if isinstance(self.prompt, str):
            return self.prompt, len(self.prompt)
        return f"{len(self.prompt)} ids", len(self.prompt) * _CHARACTERS_PER_ID


class Reply(NamedTuple):
    """What to answer, apart from how. `text` is None for null-content."""

    chat: bool
    name: str
    model: str
    text: str | None
    finish: str
    ids_in: int
    ids_out: int

    @property
    def usage(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.ids_in,
            "completion_tokens": self.ids_out,
            "total_tokens": self.ids_in + self.ids_out,
        }

    def whole(self, empty: bool = False) -> bytes:
        """The body of a reply at once; `empty`: without choices."""
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": self.finish}
        if self.chat:
            choice["message"] = {"role": "assistant", "content": self.text}
        else:
            choice["text"] = self.text
        return msgspec.json.encode(
            {
                "id": self.name,
                "object": "chat.completion" if self.chat else "text_completion",
                "created": CREATED,
                "model": self.model,
                "choices": [] if empty else [choice],
                "usage": self.usage,
            }
        )

    def events(self, include_usage: bool, empty: bool = False) -> list[bytes]:
        """The events of a streamed reply, without the closing one: role, pieces of 4 characters, finish, usage."""
        common: dict[str, Any] = {
            "id": self.name,
            "object": "chat.completion.chunk" if self.chat else "text_completion",
            "created": CREATED,
            "model": self.model,
        }
        if include_usage:
            common["usage"] = None
        encode = msgspec.json.encode

        def event(piece: str | None, finish: str | None, **more: str) -> bytes:
            said: dict[str, Any] = {"delta": {**more, "content": piece}} if self.chat else {"text": piece}
            choices = [] if empty else [{"index": 0, **said, "logprobs": None, "finish_reason": finish}]
            return b"data: %b\n\n" % encode({**common, "choices": choices})

        text = self.text
        pieces: list[str | None] = [None] if text is None else [*_pieces(text)]
        events = [event(piece, None) for piece in pieces]
        if self.chat:
            events.insert(0, event(None if text is None else "", None, role="assistant"))
        events.append(event(None if text is None else "", self.finish))
        if include_usage:
            events.append(b"data: %b\n\n" % encode({**common, "choices": [], "usage": self.usage}))
        return events


def count_ids(characters: int) -> int:
    """The simulator's idea of token ids: one per 4 characters begun.

    >>> count_ids(0), count_ids(1), count_ids(4), count_ids(5)
    (0, 1, 1, 2)
    """
    return -(-characters // _CHARACTERS_PER_ID)


def _pieces(text: str) -> Iterator[str]:
    """
    >>> list(_pieces("Paris."))
    ['Pari', 's.']
    """
    return (text[start : start + _CHARACTERS_PER_ID] for start in range(0, len(text), _CHARACTERS_PER_ID))


def reply_to(message: str, reply_ids: int | None = None, turn: int = 0) -> str:
    """The text that answers a message; `turn` chooses the words that fill it up to `reply_ids` ids of 4 characters.

    >>> reply_to("What is the capital of France?")
    'The capital of France is Paris.'
    >>> reply_to("Why?"), reply_to("x" * 61)[-7:]
    ('reply to: Why?', 'xxx ...')
    >>> reply_to("Why?", reply_ids=6), reply_to("Why?", reply_ids=2)
    ('reply to: Why? the whee.', 'reply t.')
    """
    lowered = message[:200].lower()
    if "capital of " in lowered:
        for country, answer in _CAPITALS.items():
            if f"capital of {country}" in lowered:
                return f"The capital of {answer}."
    text = f"reply to: {message[:60]}" + " ..." * (len(message) > 60)
    if reply_ids is None:
        return text
    length = reply_ids * _CHARACTERS_PER_ID
    turn %= len(_FILLING)
    filling = " " + " ".join(_FILLING[turn:] + _FILLING[:turn])
    text += filling * -(-max(0, length - len(text)) // len(filling))
    return text[: length - 1] + "."


def fitting(schema: dict[str, Any], text: str) -> Any:
    """A value that fits a simple JSON schema, with `text` for free strings; null for what it does not know.

    >>> fitting({"type": "object", "properties": {"city": {"type": "string"}, "people": {"type": "integer"},
    ...     "rivers": {"type": "array", "items": {"enum": ["Seine", "Marne"]}}, "big": {"type": "boolean"}}}, "Paris")
    {'city': 'Paris', 'people': 1, 'rivers': ['Seine'], 'big': True}
    >>> fitting({"type": ["number", "null"], "minimum": 2.5}, "")
    2.5
    """
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type")
    if isinstance(kind, list):
        kind = kind[0] if kind else None
    if kind == "object":
        return {name: fitting(item, text) for name, item in schema.get("properties", {}).items()}
    if kind == "array":
        return [fitting(schema.get("items", {}), text)] * max(1, schema.get("minItems", 1))
    if kind in ("integer", "number"):
        return schema.get("minimum", min(1, schema.get("maximum", 1)))
    return {"string": text, "boolean": True}.get(kind or "")


def error_body(error: str, code: str | None, message: str) -> bytes:
    """
    >>> error_body("overloaded_error", None, "Overloaded")
    b'{"error":{"message":"Overloaded","type":"overloaded_error","param":null,"code":null}}'
    """
    return msgspec.json.encode({"error": {"message": message, "type": error, "param": None, "code": code}})


def reply_of(behaviour: Behaviour, asked: Chat | Completion, chat: bool, key: bytes) -> Reply:
    message, characters = asked.said()
    text = reply_to(message, behaviour.reply_ids, key[0])
    form = asked.response_format
    if form and form.type == "json_schema" and form.json_schema:
        text = msgspec.json.encode(fitting(form.json_schema.schema, text)).decode()
    elif form and form.type == "json_object":
        text = msgspec.json.encode({"reply": text}).decode()
    limit = asked.max_completion_tokens or asked.max_tokens
    finish = "stop"
    if limit and len(text) > limit * _CHARACTERS_PER_ID:
        text, finish = text[: limit * _CHARACTERS_PER_ID], "length"
    name = ("chatcmpl-" if chat else "cmpl-") + key.hex()
    return Reply(chat, name, asked.model, text, finish, count_ids(characters), count_ids(len(text)))
