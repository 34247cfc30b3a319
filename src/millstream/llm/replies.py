"""A whole reply with status 200: the answer in it, or why there is none."""

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from millstream.llm.peers import Peer
from millstream.llm.verdicts import WireError, mapping


class Answer(msgspec.Struct, frozen=True):
    """What the model said: the text of the first choice, and what the server tells of it.

    `usage` is the server's own count of ids; `raw` the whole reply, JSON; `server` the base URL that gave it. A model
    that refused or called tools may have said nothing else: then `refusal` is the text, too, or the text is empty.
    `reasoning` is what it thought before it spoke, where the server shows that. Of several choices, `texts` and
    `finish_reasons` have all.
    """

    text: str
    model: str | None
    usage: dict[str, Any]
    finish_reason: str | None
    raw: bytes
    server: str
    refusal: str | None = None
    tool_calls: list[Any] | None = None
    reasoning: str | None = None
    texts: tuple[str | None, ...] = ()
    finish_reasons: tuple[str | None, ...] = ()

    @property
    def body(self) -> dict[str, Any]:
        """The whole reply, decoded anew each time."""
        found: dict[str, Any] = msgspec.json.decode(self.raw.decode(errors="replace"))
        return found


class Incoming(Protocol):
    """A reply whose head is here and whose body is on its way, whatever library brings it.

    `chunk` is the next bytes, none at the end; it raises WireError if the connection breaks.
    """

    status: int
    headers: Mapping[str, str]

    async def chunk(self) -> bytes: ...

    async def close(self) -> None: ...


async def whole(incoming: Incoming) -> bytes:
    """All of the body."""
    chunks = []
    while chunk := await incoming.chunk():
        chunks.append(chunk)
    return b"".join(chunks)


def answer_in(peer: Peer, content: bytes) -> Answer:
    """The answer in a reply with status 200. Raises WireError: what cannot be used is asked again like a 502.

    >>> answer_in(Peer(""), b'{"choices": [{"message": {"content": "Paris"}}], "usage": {"total_tokens": 9}}').usage
    {'total_tokens': 9}
    """
    try:
        body = _decode(content)
        choice = body.choices[0]
    except (msgspec.DecodeError, UnicodeDecodeError, IndexError):
        raise unusable(peer, content) from None
    text = _text_of(choice)
    if text is None:
        raise unusable(peer, content, "a reply without text")
    usage = body.usage if type(body.usage) is dict else {}
    message = choice.message or _NO_MESSAGE
    several = body.choices if len(body.choices) > 1 else ()
    return Answer(
        text,
        body.model,
        usage,
        choice.finish_reason,
        content,
        peer.url,
        refusal=message.refused,
        tool_calls=message.called,
        reasoning=message.thought,
        texts=tuple(map(_text_of, several)),
        finish_reasons=tuple(each.finish_reason for each in several),
    )


def unusable(peer: Peer, content: bytes, reason: str | None = None) -> WireError:
    """What to say of a reply with status 200 that is no answer."""
    body = mapping(content)
    if error := body.get("error"):
        return peer.failed(error)
    usage = body.get("usage")
    usage = usage if isinstance(usage, dict) else None
    return peer.error("unusable", reason or _looks_like(content), status=200, retry=True, usage=usage)


class Message(msgspec.Struct):
    """A message, or a piece of one in a stream, as servers send it.

    What the model thought is called `reasoning_content` by DeepSeek and most, `reasoning` by OpenRouter and newer vLLM.
    """

    content: Any = None
    tool_calls: Any = None
    refusal: Any = None
    reasoning_content: Any = None
    reasoning: Any = None

    @property
    def refused(self) -> str | None:
        return self.refusal if isinstance(self.refusal, str) and self.refusal else None

    @property
    def called(self) -> list[Any] | None:
        return self.tool_calls if isinstance(self.tool_calls, list) and self.tool_calls else None

    @property
    def thought(self) -> str | None:
        for text in (self.reasoning_content, self.reasoning):
            if isinstance(text, str) and text:
                return text
        return None


_NO_MESSAGE = Message()


class _Choice(msgspec.Struct):
    message: Message | None = None
    text: Any = None
    finish_reason: Any = None


class _Body(msgspec.Struct):
    choices: list[_Choice]
    model: Any = None
    usage: Any = None


_decode = msgspec.json.Decoder(_Body).decode  # only what is needed: a third of the time of decoding all


def _text_of(choice: _Choice) -> str | None:
    message = choice.message
    text = choice.text if message is None else message.content
    return text if isinstance(text, str) else instead_of_text(message)


def instead_of_text(message: Message | None) -> str | None:
    """The model may have refused or called a tool where it should have said something."""
    if message is None:
        return None
    if isinstance(message.refusal, str):
        return message.refusal
    return "" if message.tool_calls else None


def _looks_like(content: bytes) -> str:
    start = content[:200].lstrip().lower()
    if not start:
        return "an empty reply"
    if start.startswith((b"<!doctype", b"<html")):
        return "HTML instead of JSON; is this the address of an OpenAI-compatible server?"
    return "a reply that is no completion"
