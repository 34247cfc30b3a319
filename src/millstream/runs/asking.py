"""The ask run: prompts from a file to one row each in another, resumable, with nothing asked twice."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import signal
import string
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Any, NamedTuple

import msgspec

from millstream.aio import Fault, Flow, Reply
from millstream.bridge import run
from millstream.errors import RequestError, RunError
from millstream.formats.sources import InputShard, Truncated, chunks, expand
from millstream.llm.wire import CHAT, Answer, Wire, WireError, wait_before_retry
from millstream.runs.answers import AnswerJournal, Keys
from millstream.runs.progress import AskProgress, AskReport

_LONGEST_LINE = 32 << 20


@dataclass(frozen=True)
class AskSettings:
    """What an ask run is asked for. `model`, `system`, `template` and `params` make the requests; the rest sends them.

    `timeout` bounds one attempt and `deadline` a request with all its retries, in seconds; None: no bound.
    """

    model: str | None = None
    system: str | None = None
    template: str | None = None
    params: dict[str, Any] = field(default_factory=dict)
    base_urls: Sequence[str] = ()
    api_key: str | None = None
    in_flight: int = 64
    timeout: float | None = 600.0
    deadline: float | None = None
    attempts: int = 5
    ordered: bool = False
    limit: int | None = None
    retry_faults: bool = False


class _Request(NamedTuple):
    """One row of the prompts; `known` is its outcome where there is one already, `fault` what is wrong with the row."""

    id: str | None
    key: bytes
    body: dict[str, Any]
    known: dict[str, Any] | None = None
    fault: tuple[str, str] | None = None


def ask_to(
    out: str,
    prompts: str,
    settings: AskSettings,
    *,
    journal: str | None = None,
    on_progress: Callable[[AskProgress], None] | None = None,
) -> AskReport:
    """Ask every prompt of `prompts` and write one JSON row each to `out` ("-": replies alone, to standard output).

    The journal (in `out`.run unless `journal` names a folder) is the truth: every outcome is in it before it is
    anywhere else, and the same call after any interruption asks only what has none. Raises RequestError for wrong
    settings, RunError when a server refuses for a reason that every request shares.
    """
    urls = list(settings.base_urls) or [os.environ.get("OPENAI_BASE_URL") or ""]
    if not urls[0]:
        raise RequestError("no server given: name it with --base-url, or set OPENAI_BASE_URL")
    if not settings.model:
        raise RequestError("no model given: name one with --model")
    shards = expand([prompts])
    if len(shards) != 1 or shards[0].kind not in ("jsonl", "text"):
        raise RequestError(f"{prompts}: prompts come from one JSONL or text file, or '-'")
    folder = journal or (None if out == "-" else f"{out}.run")
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(AnswerJournal(folder)) if folder else None
        if out == "-":
            target: IO[bytes] = sys.stdout.buffer
        else:
            target = stack.enter_context(open(out, "wb"))
        return run(_Run(out, shards[0], settings, urls, kept, target, on_progress).main())


class _Run:
    def __init__(
        self,
        out: str,
        prompts: InputShard,
        settings: AskSettings,
        urls: list[str],
        journal: AnswerJournal | None,
        target: IO[bytes],
        on_progress: Callable[[AskProgress], None] | None,
    ) -> None:
        self.out, self.prompts, self.settings = out, prompts, settings
        self.journal, self.target, self.on_progress = journal, target, on_progress
        key = settings.api_key or os.environ.get("OPENAI_API_KEY")
        self.wires = [Wire(url, key) for url in urls]
        self.turn = itertools.cycle(self.wires)
        self.draw = random.Random()
        self.stopping = False
        self.requests: dict[int, _Request] = {}  # admitted and not handed out, by index
        self.counts: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.active = 0
        self.started = time.perf_counter()

    async def main(self) -> AskReport:
        async with contextlib.AsyncExitStack() as stack:
            for wire in self.wires:
                await stack.enter_async_context(wire)
            self._listen_to_interrupts(stack)
            settings = self.settings
            flow = Flow(
                self._outcome_of,
                self._admitted(),
                in_flight=settings.in_flight,
                in_order=settings.ordered or self.out == "-",
                timeout=settings.timeout,
                deadline=settings.deadline,
                delay=lambda error, tried: wait_before_retry(error, tried, settings.attempts, self.draw),
            )
            async with flow:
                async for outcome in flow:
                    self._write(outcome)
        self.target.flush()
        return AskReport(
            self.out,
            self.counts["requests"],
            self.counts["replies"],
            dict(sorted(self.faults.items())),
            self.counts["again"],
            self.counts["attempts"],
            self.counts["ids_in"],
            self.counts["ids_out"],
            time.perf_counter() - self.started,
            self.stopping,
        )

    def _listen_to_interrupts(self, stack: contextlib.AsyncExitStack) -> None:
        """Ctrl-C once: admit no more and let what runs end. Twice: cancel it; it is asked again by the next run."""
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task

        def interrupted() -> None:
            if self.stopping:
                task.cancel()
            self.stopping = True

        with contextlib.suppress(ValueError, NotImplementedError, RuntimeError):  # not in the main thread
            loop.add_signal_handler(signal.SIGINT, interrupted)
            stack.callback(loop.remove_signal_handler, signal.SIGINT)

    def _admitted(self) -> Iterator[_Request]:
        for index, request in enumerate(itertools.islice(_requests(self.prompts, self.settings), self.settings.limit)):
            if self.stopping:
                return
            known = self.journal.find(request.key) if self.journal is not None else None
            if known and "fault" in known and self.settings.retry_faults:
                known = None
            self.requests[index] = request._replace(known=known)
            yield self.requests[index]

    async def _outcome_of(self, request: _Request) -> Answer | None:
        if request.known:
            return None
        if request.fault:
            raise WireError(*request.fault)
        self.counts["attempts"] += 1
        self.active += 1
        try:
            return await next(self.turn).send(request.body, CHAT)
        finally:
            self.active -= 1

    def _write(self, outcome: Reply[Answer | None] | Fault) -> None:
        request = self.requests.pop(outcome.index)
        row = self._row(outcome, request)
        if isinstance(outcome, Fault) and isinstance(outcome.error, WireError) and outcome.error.fatal:
            raise RunError(f"{outcome.error}. Stopped: every other request would end the same way; all else is kept")
        self.counts["requests"] += 1
        self.counts["again"] += request.known is not None
        if self.journal is not None and request.known is None:
            self.journal.append(request.key, row)
        if "fault" in row:
            self.faults[row["fault"]["kind"]] += 1
        else:
            self.counts["replies"] += 1
        usage = row.get("usage") or {}
        self.counts["ids_in"] += usage.get("prompt_tokens") or 0
        self.counts["ids_out"] += usage.get("completion_tokens") or 0
        if self.out != "-" or "fault" not in row:
            self.target.write(msgspec.json.encode(row) + b"\n")
            if self.out == "-":
                self.target.flush()
        if self.on_progress:
            seconds = time.perf_counter() - self.started
            asked = self.counts["requests"] - self.counts["again"]
            faults = self.faults.total()
            done = self.counts["requests"]
            self.on_progress(AskProgress(done, faults, asked, self.active, seconds, self.counts["ids_out"]))

    def _row(self, outcome: Reply[Answer | None] | Fault, request: _Request) -> dict[str, Any]:
        head = {"id": request.id, "index": outcome.index}
        if request.known:
            known = {name: value for name, value in request.known.items() if name != "key"}
            return {**known, **head}
        tail = {"latency_s": round(outcome.seconds, 4), "attempts": outcome.attempts}
        if isinstance(outcome, Reply) and outcome.value:
            answer = outcome.value
            return {**head, "text": answer.text, "usage": answer.usage, "model": answer.model, **tail}
        assert isinstance(outcome, Fault)
        message = str(outcome.error) if isinstance(outcome.error, WireError) else outcome.message
        return {**head, "fault": {"kind": outcome.kind, "message": message}, **tail}


def _requests(prompts: InputShard, settings: AskSettings) -> Iterator[_Request]:
    """The requests of a file, one by one; a row that makes none is one with `fault` set."""
    keys = Keys()
    for number, line in enumerate(_lines(prompts), 1):
        if not line.strip():
            continue
        given: dict[str, Any] = {}
        try:
            if prompts.kind == "jsonl":
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"not a JSON object but {type(row).__name__}")
                given = row
            else:
                given = {"prompt": line.decode().rstrip("\r\n")}
            messages = _messages(given, settings)
        except (ValueError, RecursionError) as error:
            place = f"{prompts.name}, line {number}"
            key = keys.of({"line": line.decode("utf-8", "replace")}, place)
            yield _Request(_id_of(given), key, {}, fault=("bad_row", f"{place}: {error}"))
            continue
        body = {"model": settings.model, "messages": messages, **settings.params}
        named = _id_of(given)
        yield _Request(named, keys.of(body, named), body)


def _id_of(given: dict[str, Any]) -> str | None:
    found = given.get("custom_id", given.get("id"))
    return None if found is None else str(found)


def _messages(given: dict[str, Any], settings: AskSettings) -> list[dict[str, Any]]:
    """The messages of one row. Raises ValueError that says what is missing."""
    if settings.template is not None:
        wanted = {name for _, name, _, _ in string.Formatter().parse(settings.template) if name}
        missing = sorted(wanted - set(given))
        if missing:
            raise ValueError(f"no field {missing[0]!r} for the template; there are {', '.join(given) or 'none'}")
        messages: Any = [{"role": "user", "content": settings.template.format(**given)}]
    elif "messages" in given:
        messages = given["messages"]
    elif isinstance(given.get("prompt"), str):
        messages = [{"role": "user", "content": given["prompt"]}]
    else:
        raise ValueError(f"no 'prompt' or 'messages'; there are {', '.join(given) or 'none'}: give --template")
    if not isinstance(messages, list) or not messages:
        raise ValueError("'messages' is no list of messages")
    system = [{"role": "system", "content": settings.system}] if settings.system else []
    return [*system, *messages]


def _lines(prompts: InputShard) -> Iterator[bytes]:
    held = b""
    try:
        for chunk in chunks(prompts):
            *lines, held = (held + chunk).split(b"\n")
            yield from lines
            if len(held) > _LONGEST_LINE:
                raise RunError(f"{prompts.name} has a line of over {_LONGEST_LINE >> 20} MiB: is it a file of prompts?")
    except (Truncated, OSError) as error:
        raise RunError(f"{prompts.name}: {error}. What was asked before is kept") from error
    if held:
        yield held
