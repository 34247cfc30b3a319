"""What is asked, and what the model said: a `Request` in, a `Reply` out."""

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from millstream.aio import Fault, Returned
from millstream.llm.tolerant import mapping
from millstream.llm.verdicts import BAD_ROW
from millstream.llm.wire import CHAT, Answer, WireError


class Request(msgspec.Struct, eq=False, gc=False):
    """One row of the prompts.

    `index` is its number from 0, blank lines not counted; `id` its custom_id or else its id, as text; `key` the 16
    bytes that name it in the journal; `data` the body for `path`, in JSON, all in the order in which it was given. A
    row that makes no request has no data but a `fault`: (kind, message). `row` is the row itself in JSON, if it is
    wanted. `before` counts the rows before it that are equal. `twin` is another body that the key was made from, if it
    was (see `bodies.Body`). `server` is the client's own, `paid` the usage of
    attempts that brought nothing.
    """

    index: int
    id: str | None
    key: bytes
    data: bytes
    path: str = CHAT
    fault: tuple[str, str] | None = None
    row: bytes | None = None
    before: int = 0
    twin: bytes | None = None
    server: int = -1
    paid: dict[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said to request number `index`.

    `latency` is in seconds from admission to answer, waits and retries included; `usage` is the server's count of ids;
    `raw` its whole reply, JSON; `server` the base URL that gave it. `finish_reason` is "stop" where the model came to
    its end, "length" where the limit of ids cut it, "content_filter" where a filter did, or what else the server says.
    `refusal`, `tool_calls` and `reasoning` (what the model thought before it spoke) are None where there is none; of a
    refusal the text is the same. Of several choices (`n`), `text` is the first one, `texts` and `finish_reasons` have
    all. `parsed` is the value in the text where the client has a `schema`: an instance of its pydantic model, or plain
    JSON.
    """

    index: int
    text: str
    latency: float
    attempts: int
    model: str | None
    usage: dict[str, Any]
    finish_reason: str | None
    server: str
    raw: bytes
    refusal: str | None = None
    tool_calls: list[Any] | None = None
    reasoning: str | None = None
    texts: tuple[str | None, ...] = ()
    finish_reasons: tuple[str | None, ...] = ()
    parsed: Any = None

    @property
    def body(self) -> dict[str, Any]:
        """The whole reply, decoded anew each time."""
        return mapping(self.raw)


def reply_of(answer: Answer, *, index: int, latency: float, attempts: int) -> Reply:
    return Reply(
        index=index,
        text=answer.text,
        latency=latency,
        attempts=attempts,
        model=answer.model,
        usage=answer.usage,
        finish_reason=answer.finish_reason,
        server=answer.server,
        raw=answer.raw,
        refusal=answer.refusal,
        tool_calls=answer.tool_calls,
        reasoning=answer.reasoning,
        texts=answer.texts,
        finish_reasons=answer.finish_reasons,
        parsed=answer.parsed,
    )


def outcome_of(done: Returned[Answer] | Fault) -> Reply | Fault:
    """What a flow of answers ends a request with, as users see it."""
    if isinstance(done, Fault):
        return named(done)
    return reply_of(done.value, index=done.index, latency=done.seconds, attempts=done.attempts)


def named(fault: Fault) -> Fault:
    """A fault in the server's own words, without the exception's class in front."""
    if fault.faults:
        faults = tuple(map(named, fault.faults))
        return replace(fault, message=f"all {len(faults)} failed, the last with {faults[-1].message}", faults=faults)
    if not isinstance(fault.error, WireError):
        return fault
    attempts = 0 if fault.error.verdict is BAD_ROW else fault.attempts  # nothing was sent
    return replace(fault, kind=fault.error.kind, message=str(fault.error), attempts=attempts)


def sentence(fault: Fault) -> str:
    return fault.message if fault.message.endswith((".", "?", "!")) else f"{fault.message}."
