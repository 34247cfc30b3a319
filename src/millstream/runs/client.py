"""Ask LLM servers many things at once: the place where `aio` (many calls) and `llm` (one attempt) meet."""

import contextlib
import itertools
import os
import random
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias, TypeVar

from millstream.aio import Fault, Flow, race
from millstream.aio import Reply as Done
from millstream.bridge import run
from millstream.errors import RequestError, RunError
from millstream.llm.wire import CHAT, Answer, Wire, WireError, wait_before_retry

Prompt: TypeAlias = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""A text (what the user says), a list of messages, or a mapping with "prompt" or "messages" and other parameters."""

B = TypeVar("B")
_DEFAULT: Any = object()


@dataclass(frozen=True, slots=True)
class Reply:
    """What the model said to request number `index`.

    `latency` is in seconds from admission to answer, waits and retries included; `usage` is the server's count of ids;
    `body` its whole reply; `server` the base URL that gave it.
    """

    index: int
    text: str
    latency: float
    attempts: int
    model: str | None
    usage: dict[str, Any]
    finish_reason: str | None
    server: str
    body: dict[str, Any]


class Outcomes(AsyncIterator[Reply | Fault]):
    """The outcomes of a run of requests, inside ``async with``; after the block nothing of it is alive.

    Raises RunError, once, at the first fault that every other request would share: a wrong key, no such model, no
    quota left.
    """

    def __init__(self, flow: Flow[Any, Answer]) -> None:
        self._flow = flow

    async def __aenter__(self) -> "Outcomes":
        await self._flow.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._flow.__aexit__(*error)

    async def __anext__(self) -> Reply | Fault:
        outcome = await anext(self._flow)
        if isinstance(outcome, Done):
            return _reply(outcome)
        if isinstance(outcome.error, WireError) and outcome.error.fatal:
            raise RunError(f"{outcome.error}. Stopped: every other request would end the same way")
        return _named(outcome)


class Client:
    """A client of one or several OpenAI-compatible servers: ``async with Client(url, model="...") as client``.

    `base_url` (one or a list: attempts go round) and `api_key` are OPENAI_BASE_URL and OPENAI_API_KEY unless given.
    `params` go into every request's body (temperature, max_tokens, ...), `system` before its messages. At most
    `in_flight` attempts run at once; `timeout` bounds one of them, `deadline` a request with all its retries and waits
    (seconds; None: no bound); `attempts` are made at most. A request that fails is a `Fault`, never an exception.
    """

    def __init__(
        self,
        base_url: str | Sequence[str] | None = None,
        *,
        model: str | None = None,
        api_key: str | None = None,
        system: str | None = None,
        in_flight: int = 64,
        window: int | None = None,
        timeout: float | None = 600.0,
        deadline: float | None = None,
        attempts: int = 5,
        params: Mapping[str, Any] | None = None,
        seed: int | None = None,
    ) -> None:
        found = base_url or os.environ.get("OPENAI_BASE_URL")
        if not found:
            raise RequestError("no server given: name its base URL, or set OPENAI_BASE_URL")
        key = api_key or os.environ.get("OPENAI_API_KEY")
        self._wires = [Wire(url, key) for url in ([found] if isinstance(found, str) else found)]
        self._turn = itertools.cycle(self._wires)
        self._model, self._system, self._params = model, system, dict(params or {})
        self._options = {"in_flight": in_flight, "window": window, "timeout": timeout, "deadline": deadline}
        self._attempts = attempts
        self._draw = random.Random(seed)
        self._stack = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "Client":
        for wire in self._wires:
            await self._stack.enter_async_context(wire)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def ask(self, prompt: Prompt, *, timeout: float | None = _DEFAULT) -> Reply | Fault:
        """One request's outcome. `timeout` in seconds instead of the client's; None: no bound."""
        flow = self._flow([self._body(prompt)], True, **({} if timeout is _DEFAULT else {"timeout": timeout}))
        async with flow:
            outcome = await anext(flow)
        return _reply(outcome) if isinstance(outcome, Done) else _named(outcome)

    async def gather(self, prompts: Iterable[Prompt] | AsyncIterable[Prompt]) -> list[Reply | Fault]:
        """All outcomes, in the prompts' order. Raises RunError as `Outcomes` does."""
        async with self.ordered(prompts) as outcomes:
            return [outcome async for outcome in outcomes]

    def as_completed(self, prompts: Iterable[Prompt] | AsyncIterable[Prompt]) -> Outcomes:
        """Outcomes as they come: ``async with client.as_completed(prompts) as outcomes: async for ... in outcomes``."""
        return Outcomes(self._flow(_mapped(self._body, prompts), False))

    def ordered(self, prompts: Iterable[Prompt] | AsyncIterable[Prompt]) -> Outcomes:
        """Outcomes in the prompts' order, each as soon as its turn has come."""
        return Outcomes(self._flow(_mapped(self._body, prompts), True))

    async def race(self, prompts: Prompt | Iterable[Prompt], *, models: Sequence[str] | None = None) -> Reply | Fault:
        """The first reply to any of several prompts, or to one prompt from any of several `models`.

        The losers are cancelled and awaited. If all fail: a Fault of kind ``race`` with all of theirs in `faults`.
        """
        if models is not None:
            bodies = [{**self._body(prompts), "model": model} for model in models]
        elif isinstance(prompts, str | Mapping):
            raise RequestError("a race needs several prompts, or one prompt and several models")
        else:
            bodies = [self._body(prompt) for prompt in prompts]
        if not bodies:
            raise RequestError("a race needs somebody to run it")
        outcome = await race(self._attempt, bodies, **self._with(in_flight=len(bodies)))
        return _reply(outcome) if isinstance(outcome, Done) else _named(outcome)

    def _flow(self, bodies: Any, in_order: bool, **options: Any) -> Flow[dict[str, Any], Answer]:
        return Flow(self._attempt, bodies, in_order=in_order, **self._with(**options))

    def _with(self, **options: Any) -> dict[str, Any]:
        """The options of a `Flow`: the client's, and `options` in their place."""

        def delay(error: Exception, attempts: int) -> float | None:
            return wait_before_retry(error, attempts, self._attempts, self._draw)

        return {**self._options, "delay": delay, **options}

    async def _attempt(self, body: dict[str, Any]) -> Answer:
        return await next(self._turn).send(body, CHAT)

    def _body(self, prompt: Any) -> dict[str, Any]:
        """The request's body. Raises RequestError for what is no prompt."""
        body: dict[str, Any] = {"model": self._model, **self._params}
        if isinstance(prompt, Mapping):
            given = dict(prompt)
            text = given.pop("prompt", None)
            messages = given.pop("messages", None)
            body |= given
            if messages is None and isinstance(text, str):
                messages = [{"role": "user", "content": text}]
        elif isinstance(prompt, str):
            messages = [{"role": "user", "content": prompt}]
        else:
            messages = prompt
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            raise RequestError(f"no prompt: {prompt!r:.80}; give a text, messages, or a mapping with one of the two")
        if not body["model"]:
            raise RequestError("no model given: name one with model=")
        system = [{"role": "system", "content": self._system}] if self._system else []
        return {**body, "messages": [*system, *messages]}


def ask(prompts: Prompt | Iterable[Prompt], base_url: str | Sequence[str] | None = None, **options: Any) -> Any:
    """Ask from synchronous code, a notebook with a running loop included.

    One prompt gives its outcome, several give a list in their order; `options` are those of `Client`.
    """
    one = isinstance(prompts, str | Mapping)

    async def main() -> Any:
        async with Client(base_url, **options) as client:
            if one:
                return await client.ask(prompts)  # type: ignore[arg-type]
            return await client.gather(prompts)

    return run(main())


def _mapped(function: Any, items: Iterable[Any] | AsyncIterable[Any]) -> Any:
    """`map` for either kind of iterable, which closes its source with itself."""
    if isinstance(items, AsyncIterable):

        async def mapped() -> AsyncIterator[Any]:
            async for item in items:
                yield function(item)

        return mapped()
    return (function(item) for item in items)


def _reply(done: "Done[Answer]") -> Reply:
    answer = done.value
    return Reply(
        done.index,
        answer.text,
        done.seconds,
        done.attempts,
        answer.model,
        answer.usage,
        answer.finish_reason,
        answer.server,
        answer.body,
    )


def _named(fault: Fault) -> Fault:
    """A fault in the server's own words, without the exception's class in front."""
    if fault.faults:
        faults = tuple(map(_named, fault.faults))
        return replace(fault, message=f"all {len(faults)} failed, the last with {faults[-1].message}", faults=faults)
    if not isinstance(fault.error, WireError):
        return fault
    return replace(fault, kind=fault.error.kind, message=str(fault.error))
