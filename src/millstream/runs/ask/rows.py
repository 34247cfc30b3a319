"""The rows of an ask run: what is kept of an outcome in the journal, and what the output makes of it."""

from collections.abc import Mapping
from typing import Any

import msgspec

from millstream.aio import Fault, Returned
from millstream.client.requests import Reply, Request, named
from millstream.llm.batch import output_row
from millstream.llm.wire import Answer, WireError

_encode = msgspec.json.encode


def row_of(request: Request, outcome: Returned[Answer] | Fault, *, whole: bool = False) -> dict[str, Any]:
    """The row of an outcome as the journal keeps it; `whole` keeps the body that the server sent, too.

    `endings.ending_of` relies on the order of the first fields.
    """
    tail = {"latency_s": round(outcome.seconds, 4), "attempts": outcome.attempts}
    if isinstance(outcome, Returned):
        answer = outcome.value
        body = {"body": answer.body} if whole or answer.opaque else {}
        return {**_head(request), **_told(answer), "usage": answer.usage, "model": answer.model, **tail, **body}
    fault = named(outcome)
    status = {"status": fault.error.status} if isinstance(fault.error, WireError) and fault.error.status else {}
    paid = {"usage": request.paid} if request.paid else {}
    return {**_head(request), "fault": {"kind": fault.kind, "message": fault.message, **status}, **paid, **tail}


def _told(answer: Answer) -> dict[str, Any]:
    """What the model said and how it ended; what there is not is left out."""
    if not (answer.refusal or answer.texts or answer.reasoning or answer.tool_calls):
        return {"text": None if answer.opaque else answer.text, "finish_reason": answer.finish_reason}
    more = {
        "refusal": answer.refusal,
        "texts": answer.texts,
        "finish_reasons": answer.finish_reasons,
        "reasoning": answer.reasoning,
        "tool_calls": answer.tool_calls,
    }
    there = {name: value for name, value in more.items() if value}
    return {"text": None if answer.opaque else answer.text, "finish_reason": answer.finish_reason, **there}


def row_of_none(request: Request) -> dict[str, Any]:
    """The row of a row of the prompts that makes no request: its fault."""
    assert request.fault
    return {**_head(request), "fault": dict(zip(("kind", "message"), request.fault, strict=True))}


class _KeptFault(msgspec.Struct, gc=False):
    kind: str
    message: str


class _Kept(msgspec.Struct, gc=False):
    """A row as `row_of` makes it."""

    text: str | None = None
    fault: _KeptFault | None = None
    finish_reason: str | None = None
    usage: Any = None
    model: str | None = None
    latency_s: float = 0.0
    attempts: int = 0
    refusal: str | None = None
    texts: tuple[str | None, ...] = ()
    finish_reasons: tuple[str | None, ...] = ()
    reasoning: str | None = None
    tool_calls: list[Any] | None = None
    body: msgspec.Raw = msgspec.Raw(b"")


_kept = msgspec.json.Decoder(_Kept).decode


def outcome_in(row: bytes, index: int) -> Reply | Fault:
    """What a row tells of the outcome of request number `index`: of a reply, all but which server gave it.

    >>> outcome_in(b'{"id":"a","index":7,"fault":{"kind":"filtered","message":"no"},"latency_s":0.5,"attempts":1}', 0)
    Fault(index=0, kind='filtered', message='no', seconds=0.5, attempts=1, error=None, faults=(), held=False)
    """
    kept = _kept(row)
    if kept.fault is not None:
        return Fault(index, kept.fault.kind, kept.fault.message, kept.latency_s, kept.attempts)
    return Reply(
        index=index,
        text=kept.text or "",
        latency=kept.latency_s,
        attempts=kept.attempts,
        model=kept.model,
        usage=kept.usage if isinstance(kept.usage, dict) else {},
        finish_reason=kept.finish_reason,
        server="",
        raw=bytes(kept.body),
        refusal=kept.refusal,
        tool_calls=kept.tool_calls,
        reasoning=kept.reasoning,
        texts=kept.texts,
        finish_reasons=kept.finish_reasons,
    )


def with_input(row: bytes, given: bytes) -> bytes:
    """A row in JSON with the prompt's own fields, in JSON too.

    >>> with_input(b'{"id":"a","text":"yes"}', b'{"prompt":"well?"}')
    b'{"id":"a","text":"yes","input":{"prompt":"well?"}}'
    """
    return row[:-1] + b',"input":' + given + b"}"


def batch_line(request: Request, row: Mapping[str, Any]) -> bytes:
    """A row in the shape of an OpenAI Batch output line."""
    custom_id = str(request.index) if request.id is None else request.id
    name, fault = f"batch_req_{request.key.hex()}", row.get("fault")
    if fault is None:
        return _encode(output_row(custom_id, name=name, body=row["body"] if "body" in row else _body(row)))
    error, status = {"code": fault["kind"], "message": fault["message"]}, fault.get("status", 200)
    if status == 200:
        return _encode(output_row(custom_id, name=name, error=error))
    return _encode(output_row(custom_id, name=name, status=status, body={"error": error}))


def _head(request: Request) -> dict[str, Any]:
    return {"id": request.id, "index": request.index}


def _body(row: Mapping[str, Any]) -> dict[str, Any]:
    """The reply's body, made again from a row that did not keep it. What the row does not tell is null."""
    more = {name: row[name] for name in ("refusal", "reasoning", "tool_calls") if row.get(name)}
    content = None if row.get("refusal") == row["text"] else row["text"]
    message = {"role": "assistant", "content": content, **more}
    choices = [{"index": 0, "message": message, "finish_reason": row.get("finish_reason")}]
    others = list(zip(row.get("texts") or (), row.get("finish_reasons") or (), strict=True))[1:]
    choices += [
        {"index": at, "message": {"role": "assistant", "content": text}, "finish_reason": reason}
        for at, (text, reason) in enumerate(others, 1)
    ]
    return {"object": "chat.completion", "model": row["model"], "choices": choices, "usage": row["usage"]}
