"""A whole reply with status 200: the answer in it, or why there is none."""

from collections.abc import Mapping
from typing import Any, Protocol

import msgspec

from millstream.llm.addresses import CHAT
from millstream.llm.peers import Peer
from millstream.llm.tolerant import BLANK, fitted, json_of, mapping, text_in, thought_in, usage_of, word_of
from millstream.llm.verdicts import NO_TEXT, SPEECHLESS, TOO_LONG, UNUSABLE, WITHHELD, WireError

MOST = 64 << 20
"""Bytes of a reply, unpacked, unless told otherwise."""

_MOST_OF_ERROR = 1 << 20  # bytes that are read of a reply that is no answer
GIVEN_UP = {"error", "abort"}  # what servers call the end of a reply that they did not end
_NOT_FINISHED = ("failed", "cancelled")  # what the responses endpoint calls that
_WITH_CHOICES = "/completions"  # how the paths end whose replies have choices
_FINAL = {  # finish_reason -> what it means if there is no text: another attempt would be paid for and end the same way
    "length": (NO_TEXT, "no text: all of max_tokens went into thinking; give it more"),
    "content_filter": (WITHHELD, "no text: the server's content filter took it away"),
}


class Answer(msgspec.Struct, frozen=True):
    """What the model said: the text of the first choice, and what the server tells of it.

    `usage` is the server's own count of ids; `raw` the whole reply, JSON; `server` the base URL that gave it. A model
    that refused or called tools may have said nothing else: then `refusal` is the text, too, or the text is empty.
    `reasoning` is what it thought before it spoke, where the server shows that. Of several choices, `texts` and
    `finish_reasons` have all. The reply of an endpoint without choices (embeddings, rerank, ...) is `opaque`: it has no
    text, and all that it says is in its body. `parsed` is the value in the text, where a schema was asked for.
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
    opaque: bool = False
    parsed: Any = None

    @property
    def body(self) -> Any:
        """The whole reply, decoded anew each time: an object; an array, where an endpoint answers with one."""
        return json_of(self.raw)


class Incoming(Protocol):
    """A reply whose head is here and whose body is on its way, whatever library brings it.

    `chunk` is the next bytes, none at the end; it raises WireError if the connection breaks.
    """

    status: int
    headers: Mapping[str, str]

    async def chunk(self) -> bytes: ...

    async def close(self) -> None: ...


async def whole(peer: Peer, incoming: Incoming, most: int = MOST) -> bytes:
    """All of the body, of at most so many bytes: memory must not hang on what a server sends. Raises WireError.

    Of a reply with another status than 200 only the beginning is of use, and more of it is not read.
    """
    failed = incoming.status != 200
    chunks, size = [], 0
    while chunk := await incoming.chunk():
        chunks.append(chunk)
        size += len(chunk)
        if failed and size >= _MOST_OF_ERROR:
            break
        if size > most:
            raise too_large(peer, most)
    return b"".join(chunks)


def too_large(peer: Peer, most: int) -> WireError:
    """Another attempt would bring as much."""
    return peer.error(TOO_LONG, f"a reply of over {most:,} bytes, the most that is read (--max-reply)", status=200)


def answer_in(peer: Peer, content: bytes, path: str = CHAT) -> Answer:
    """The answer in a reply with status 200 to a request for `path`. Raises WireError for what is none.

    >>> answer_in(Peer(""), b'{"choices": [{"message": {"content": "Paris"}}], "usage": {"total_tokens": 9}}').usage
    {'total_tokens': 9}
    >>> answer_in(Peer(""), b'{"data": [], "usage": {"total_tokens": 9}}', "/embeddings").opaque
    True
    """
    if not path.endswith(_WITH_CHOICES):
        return _opaque(peer, content)
    try:
        body = _decode(content)
    except (ValueError, RecursionError):
        body = _tolerantly(content)
    usage = usage_of(body.usage)
    if not body.choices:
        raise peer.failed(body.error) if body.error else unusable(peer, _looks_like(content), usage)
    choice = body.choices[0]
    text = _text_of(choice)
    if body.error or choice.error or text is None or choice.finish_reason in GIVEN_UP:
        raise not_whole(peer, body.error or choice.error, choice.finish_reason, usage)
    message = choice.message or _NO_MESSAGE
    if len(body.choices) == 1 and not message.says_more:  # as nearly all do, and looking for more takes a while
        return Answer(text, body.model, usage, choice.finish_reason, content, peer.url)
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


def _opaque(peer: Peer, content: bytes) -> Answer:
    """A reply of whatever form, as long as it is JSON and neither an error nor a reply that was not finished."""
    try:
        found = json_of(content)
    except ValueError:
        found = None
    if not isinstance(found, dict | list):
        raise unusable(peer, _looks_like(content), {})
    named = found if isinstance(found, dict) else {}
    usage, model, status = usage_of(named.get("usage")), named.get("model"), named.get("status")
    if named.get("error") or status in _NOT_FINISHED:
        raise not_whole(peer, named.get("error"), "error", usage)
    model = model if isinstance(model, str) else None
    return Answer("", model, usage, _why_incomplete(named), content, peer.url, opaque=True)


_INCOMPLETE = {"max_output_tokens": "length"}  # what /responses calls it


def _why_incomplete(named: dict[str, Any]) -> str | None:
    """The finish_reason of a reply of /responses that is not complete.

    >>> _why_incomplete({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}})
    'length'
    """
    details = named.get("incomplete_details")
    reason = details.get("reason") if isinstance(details, dict) else None
    return _INCOMPLETE.get(reason, reason) if isinstance(reason, str) else None


def not_whole(peer: Peer, error: Any, finish_reason: str | None, usage: dict[str, Any]) -> WireError:
    """What to say of a reply that came to its end, and is no answer: it has an error in it, or no text."""
    if error:
        failed = peer.failed(error)
        failed.usage, failed.unpaid = usage, False  # something was said before
        return failed
    if finish_reason in GIVEN_UP:
        return unusable(peer, f"the server gave this reply up, with finish_reason {finish_reason!r}", usage)
    if finish_reason in _FINAL:
        found, words = _FINAL[finish_reason]
        return peer.error(found, words, status=200, usage=usage)
    return peer.error(SPEECHLESS, "a reply without text", status=200, usage=usage)


def unusable(peer: Peer, reason: str, usage: dict[str, Any]) -> WireError:
    """What to say of a reply with status 200 that is no answer, and may be one the next time."""
    return peer.error(UNUSABLE, reason, status=200, usage=usage)


class Message(msgspec.Struct):
    """A message, or a piece of one in a stream, as servers send it.

    What the model thought is called `reasoning_content` by DeepSeek and most, `reasoning` by OpenRouter and newer vLLM.
    """

    content: str | None = None
    tool_calls: Any = None
    refusal: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    function_call: Any = None  # what there was before tools

    @property
    def says_more(self) -> bool:
        """There may be something beside the text."""
        more = self.tool_calls or self.refusal or self.reasoning_content or self.reasoning or self.function_call
        return bool(more)

    @property
    def refused(self) -> str | None:
        return self.refusal or None

    @property
    def called(self) -> list[Any] | None:
        if isinstance(self.function_call, dict):
            return [{"index": 0, "type": "function", "function": self.function_call}]
        return self.tool_calls if isinstance(self.tool_calls, list) and self.tool_calls else None

    @property
    def thought(self) -> str | None:
        return self.reasoning_content or self.reasoning or None


_NO_MESSAGE = Message()


class _Choice(msgspec.Struct):
    message: Message | None = None
    text: str | None = None
    finish_reason: str | None = None
    error: Any = None


class _Body(msgspec.Struct):
    choices: list[_Choice] = []
    model: str | None = None
    usage: Any = None
    error: Any = None


_decode = msgspec.json.Decoder(_Body).decode  # only what is needed: a third of the time of decoding all


def _tolerantly(content: bytes) -> _Body:
    """What there is of a body in a reply that is not quite as it should be."""
    found = mapping(content)
    choices = found.get("choices")
    return fitted(_Body, found, choices=list(map(_choice_of, choices)) if isinstance(choices, list) else [])


def _choice_of(given: Any) -> _Choice:
    named = given if isinstance(given, Mapping) else {}
    message = named.get("message")
    return fitted(
        _Choice,
        named,
        message=None if message is None else message_of(message),
        text=text_in(named.get("text")),
        finish_reason=word_of(named.get("finish_reason")),
    )


def message_of(given: Any) -> Message:
    """A message of any form: its content may have come in parts, or alone."""
    if not isinstance(given, Mapping):
        return Message(content=text_in(given))
    content = given.get("content")
    found = fitted(Message, given, content=text_in(content))
    found.reasoning_content = found.thought or thought_in(content)
    return found


def _text_of(choice: _Choice) -> str | None:
    message = choice.message
    text = choice.text if message is None else message.content
    return instead_of_text(message) if text is None else text


def instead_of_text(message: Message | None) -> str | None:
    """The model may have refused or called a tool where it should have said something."""
    if message is None:
        return None
    if message.refusal is not None:
        return message.refusal
    return "" if message.called else None


def _looks_like(content: bytes) -> str:
    start = content[:200].lstrip(BLANK).lower()
    if not start:
        return "an empty reply"
    if start.startswith((b"<!doctype", b"<html")):
        return "HTML instead of JSON; is this the address of an OpenAI-compatible server?"
    return "a reply that is no completion"
