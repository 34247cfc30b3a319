"""Ask LLM servers many things at once: the place where `aio` (many calls) and `llm` (one attempt) meet."""

import asyncio
import contextlib
import dataclasses
import os
import random
from collections import Counter
from collections.abc import (
    AsyncIterable,
    Callable,
    Iterable,
    Mapping,
    Sequence,
)
from functools import partial
from typing import Any, Literal

from msgspec.structs import replace

from millstream.aio import Fault, Flow, race
from millstream.aio.hedging import Hedge
from millstream.aio.limits import Adaptive, Fixed
from millstream.aio.places import Places
from millstream.aio.rates import All, Gate, Rate, RetryBudget, per_minute
from millstream.bridge import run
from millstream.client import descriptors
from millstream.client.bodies import Recipe
from millstream.client.checks import check_options
from millstream.client.embedding import Embedder, Embedding, Texts
from millstream.client.given import Given, Prompt, is_one, several
from millstream.client.outcomes import Outcomes, collected, leave_with
from millstream.client.pieces import StreamedReply
from millstream.client.purse import Guess, Price, Purse
from millstream.client.requests import Reply, Request, outcome_of
from millstream.client.retrying import LONGEST_ASKED, Retrying
from millstream.client.servers import Servers
from millstream.errors import RequestError
from millstream.llm.forms import form_of
from millstream.llm.replies import MOST
from millstream.llm.usage import NOT_TOLD, Usage, added, paid_ids
from millstream.llm.verdicts import ENDED_EARLY, SCHEMA, of_row
from millstream.llm.wire import LONGEST_WAIT, Answer, Wire, WireError

_DEFAULT: Any = object()
_WINDOW_BYTES = 64 << 20  # of replies that wait to be handed out


class Client:
    """A client of OpenAI-compatible servers: ``async with Client(url, model="...") as client``.

    `base_url` and `api_key` are OPENAI_BASE_URL and OPENAI_API_KEY unless given. Several URLs share the load; an
    `openai.AsyncOpenAI` of your own does as well as a URL, and brings its connections, key, headers and proxy.
    `headers` go with every request, and no message shows their values. `proxy` is the URL of one; without it,
    HTTPS_PROXY, HTTP_PROXY and NO_PROXY count, but never for this machine itself.

    `params` go into every request's body (temperature, max_tokens, ...), `system` before its messages. `schema`, a JSON
    schema or a pydantic model, asks for JSON that fits it; a reply that does not is tried again, and `parsed` of one
    that does is the value, or the instance of the model.

    `in_flight` attempts run at once, over all that the client does; ``"auto"`` finds out how many. `timeout` bounds one
    attempt, `deadline` a request with all its retries and waits (seconds; None: no bound); `attempts` are made at most,
    not counting those for which the server was too busy while others got through. A server that asks to be left alone
    for longer than `longest_wait` (seconds) is, while there is anything else to ask.
    `rpm` and `tpm` bound the requests and the ids of a minute. `hedge` asks slow requests a second time, at another
    server if there is one, and takes the first reply. A reply has at most `max_reply` bytes, unpacked.

    `price` is that of a million ids in prompts, in replies and, if a third number is given, in prompts where they were
    cached; then `cost` tells what was spent. No attempt is made that could bring it above `max_cost`: what is not asked
    for that reason is a Fault of kind ``stopped``.

    A request that fails is a `Fault`, never an exception.
    """

    def __init__(
        self,
        base_url: Any = None,
        *,
        model: str | None = None,
        api_key: str | None = None,
        system: str | None = None,
        in_flight: int | Literal["auto"] = 64,
        window: int | None = None,
        timeout: float | None = 600.0,
        deadline: float | None = None,
        attempts: int = 5,
        longest_wait: float = LONGEST_ASKED,
        rpm: float | None = None,
        tpm: float | None = None,
        hedge: bool = False,
        price: Sequence[float] | None = None,
        max_cost: float | None = None,
        schema: Any = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        proxy: str | None = None,
        max_reply: int = MOST,
        seed: int | None = None,
    ) -> None:
        self._options = {name: value for name, value in locals().items() if name != "self"}
        check_options(self._options)
        found = base_url or os.environ.get("OPENAI_BASE_URL") or []
        places = [found] if isinstance(found, str) or not isinstance(found, Sequence) else found
        key = api_key or os.environ.get("OPENAI_API_KEY")
        self.servers = Servers([_wire(one, key, headers, proxy, max_reply) for one in places])
        self.params = dict(params or {})  # of every request's body
        self._given = Given(model, self.params, system)
        self._attempts, self._draw = attempts, random.Random(seed)
        self.form = None if schema is None else form_of(schema)
        if self.form:
            self.params["response_format"] = self.form.response_format
        if in_flight == "auto":
            self.limit: Fixed | Adaptive = Adaptive(overloaded=_overloaded, work=_work)
        else:
            self.limit = Fixed(in_flight)
        self.places = Places(self.limit)
        self._guess, self._by_ids = Guess(), bool(tpm) or max_cost is not None
        self.purse = Purse(Price.of_numbers(price) if price else None, max_cost, self._guess)
        gates: list[Gate] = [Rate(per_minute(rpm))] if rpm else []
        gates += [Rate(per_minute(tpm), self._guess.likely, _ids_of)] if tpm else []
        gates += [self.purse] if max_cost is not None else []
        self.gate = All(gates) if gates else None
        self.used: Counter[str] = Counter()  # prompt_tokens and completion_tokens of replies, as the servers told
        self.wasted: Counter[str] = Counter()  # the same of replies that could not be used
        self._flows: dict[str, Any] = {
            "in_flight": self.places,
            "window": window,
            "window_bytes": _WINDOW_BYTES,
            "weigh": lambda answer: len(answer.raw),
            "timeout": timeout,
            "deadline": deadline,
            "delay": Retrying(self.servers, attempts, self._draw).delay,
            "longest_wait": longest_wait + LONGEST_WAIT,  # what a server asks for, and the wait beside it
            "gate": self.gate,
            "budget": RetryBudget(),
            "hedge": Hedge(self.attempt) if hedge else None,
        }
        self._stack = contextlib.AsyncExitStack()
        self._state = "was not entered"  # why nothing can be asked; empty: it can

    def __reduce__(self) -> tuple[Any, ...]:
        """In another process it is made again, of the same options."""
        return partial(Client, **self._options), ()

    async def __aenter__(self) -> "Client":
        if not self._state:
            raise RequestError("the client is entered already: whoever asks at the same time needs one of its own")
        self._clock = asyncio.get_running_loop().time
        for wire in self.servers.wires:
            await self._stack.enter_async_context(wire)
        descriptors.raise_limit()
        if (most := descriptors.for_connections()) is not None:
            self.places.bound(most)
        self._state = ""
        return self

    async def __aexit__(self, *_: object) -> None:
        self._state = "was left"
        await self._stack.aclose()

    # Asking ---------------------------------------------------------------------------------------------------------

    async def ask(self, prompt: Prompt, *, timeout: float | None = _DEFAULT) -> Reply | Fault:
        """One request's outcome. `timeout` bounds it as a whole, retries included, in seconds."""
        flow = self.flow([self._given.request(prompt)], **_whole(timeout))
        async with flow:
            return outcome_of(await anext(flow))

    async def gather(
        self, prompts: Iterable[Prompt] | AsyncIterable[Prompt], *, timeout: float | None = _DEFAULT
    ) -> list[Reply | Fault]:
        """All outcomes, in the prompts' order; `timeout` as in `ask`, for each.

        A prompt that is none is a Fault of kind ``bad_row`` in its place. Raises AskStopped as `Outcomes` does; that,
        and whatever else ends it early, carries what came until then in `outcomes`.
        """
        return await collected(self.as_completed(prompts, timeout=timeout), [])

    def as_completed(
        self, prompts: Iterable[Prompt] | AsyncIterable[Prompt], *, timeout: float | None = _DEFAULT
    ) -> Outcomes:
        """Outcomes as they come: ``async with client.as_completed(prompts) as outcomes: async for ... in outcomes``."""
        return Outcomes(self.flow(self._given.requests(prompts), **_whole(timeout)))

    def ordered(
        self, prompts: Iterable[Prompt] | AsyncIterable[Prompt], *, timeout: float | None = _DEFAULT
    ) -> Outcomes:
        """Outcomes in the prompts' order, each as soon as its turn has come."""
        return Outcomes(self.flow(self._given.requests(prompts), in_order=True, **_whole(timeout)))

    async def embed(
        self, texts: Texts, *, per_request: int = 1, timeout: float | None = _DEFAULT, **params: Any
    ) -> list[Embedding | Fault]:
        """The vectors of texts, in their order, with all that the client does for prompts; its `params` stay out of it.

        `per_request` texts go into a request; if it is refused for what one of them is, each is asked for alone.
        `params` go into every body (dimensions, encoding_format="base64", ...); `timeout` is as in `ask`.
        """
        body = {"model": self._given.model, **params}
        if not body["model"]:
            raise RequestError("no model given: name one with model=")
        return await Embedder(lambda requests: Outcomes(self.flow(requests, **_whole(timeout))), body).all_of(
            texts, per_request
        )

    async def race(
        self,
        prompts: Prompt | Iterable[Prompt],
        *,
        models: Sequence[str] | None = None,
        timeout: float | None = _DEFAULT,
    ) -> Reply | Fault:
        """The first reply to any of several prompts, or to one prompt from any of several `models`.

        The losers are cancelled and awaited. If all fail: a Fault of kind ``race`` with all of theirs in `faults`.
        """
        if models is not None:
            requests = [self._given.request(prompts, model=model) for model in models]
        elif is_one(prompts):
            raise RequestError("a race needs several prompts, or one prompt and several models")
        else:
            requests = [self._given.request_or_fault(prompt, at) for at, prompt in enumerate(several(prompts))]
        if not requests:
            raise RequestError("a race needs somebody to run it")
        self._refuse_outside()
        return outcome_of(await race(self.attempt, requests, **{**self._flows, **_whole(timeout)}))

    def stream(self, prompt: Prompt, *, timeout: float | None = _DEFAULT) -> StreamedReply:
        """One reply piece by piece: ``async with client.stream("...") as pieces: async for piece in pieces``.

        Then `pieces.outcome` is the Reply or the Fault. `timeout` bounds all of it, in seconds.
        """
        self._refuse_outside()
        wire = self.servers.wires[self.servers.pick(-1, self._clock())]
        whole = _whole(timeout).get("deadline", self._flows["deadline"] or self._flows["timeout"])
        body = self._given.data(prompt)
        longest_wait: float = self._flows["longest_wait"]
        return StreamedReply(
            wire,
            body,
            timeout=whole,
            attempts=self._attempts,
            longest_wait=longest_wait,
            draw=self._draw,
            purse=self.purse,
        )

    def holding(self, on_held: Callable[[Exception], None], on_long: Callable[[Exception], None]) -> Retrying:
        """How failures are asked again where a request may be held until the servers are back: see `Retrying`."""
        longest: float = self._flows["longest_wait"] - LONGEST_WAIT
        return Retrying(
            self.servers, self._attempts, self._draw, on_held=on_held, longest_asked=longest, on_long=on_long
        )

    @property
    def recipe(self) -> Recipe:
        """What its requests have in common."""
        return Recipe(self._given.model, self._given.system, params=self.params)

    def with_value(self, reply: Reply) -> Reply:
        """A reply that was kept as text, with the value in it if there is a schema that it fits."""
        form = self.form
        if form is None or reply.refusal or form.misfit(reply.text) is not None:
            return reply
        return dataclasses.replace(reply, parsed=form.parse(reply.text))

    @property
    def cost(self) -> float | None:
        """What was spent so far, in the money of `price`; None: there is none."""
        return self.purse.cost

    @property
    def shortage(self) -> str | None:
        """What this machine was short of, in a sentence; None: of nothing."""
        if not self.places.was_short:
            return None
        most = f"{self.places.most:.0f} attempt{'' if self.places.most == 1 else 's'} at once"
        return f"open files: no more than {most}, since ulimit -n is {descriptors.limit()}"

    # The parts of it ------------------------------------------------------------------------------------------------

    def flow(self, requests: Any, **options: Any) -> Flow[Request, Answer]:
        """The answers to `requests`, as a `Flow` with the client's options and `options` in their place."""
        self._refuse_outside()
        return Flow(self.attempt, requests, **{**self._flows, **options})

    def _refuse_outside(self) -> None:
        if self._state:
            raise RequestError(f"the client {self._state}: ask inside its block, async with Client(...) as client")

    async def attempt(self, request: Request) -> Answer:
        """One attempt at one request, at the next server in turn. Raises WireError."""
        if self._state:
            self._refuse_outside()
        if request.fault:
            raise WireError(of_row(request.fault[0]), request.fault[1])
        request.server = self.servers.pick(request.server, self._clock())
        in_vain, ids = True, NOT_TOLD
        try:
            answer = await self.servers.send(request.server, request.data, request.path, self._clock)
            ids = paid_ids(answer.usage)
            answer = self._formed(answer)
            in_vain = False
        except WireError as error:
            ids = paid_ids(error.usage)
            in_vain = not error.unpaid or ids != NOT_TOLD
            _count(self.wasted, ids)
            raise
        finally:
            if in_vain:  # also what was cancelled: at a timeout, or as the loser of a race
                self.purse.failed(request, ids)
                request.paid = added(request.paid, ids)
        _count(self.used, ids)
        if self._by_ids:  # it takes a while, and who else asks
            self._guess.learn(request, ids)
        self.purse.answered(request, ids)
        return answer

    def _formed(self, answer: Answer) -> Answer:
        """An answer with the value in its text, if there is a schema. Raises WireError if it does not fit that; one
        that was cut would be cut again, and is final."""
        form = self.form
        if form is None or answer.opaque or answer.refusal or (answer.tool_calls and not answer.text):
            return answer
        reason = form.misfit(answer.text)
        if reason is not None:
            verdict, ended = ENDED_EARLY.get(answer.finish_reason or "", (SCHEMA, ""))
            message = f"{answer.server}: the reply does not fit the schema: {ended}{reason}"
            raise WireError(verdict, message, status=200, usage=answer.usage)
        return replace(answer, parsed=form.parse(answer.text))


def ask(prompts: Prompt | Iterable[Prompt], base_url: Any = None, **options: Any) -> Any:
    """Ask from synchronous code, a notebook with a running loop included.

    One prompt, which may be a list of messages, gives its outcome; several give a list in their order. `options` are
    those of `Client`. What ends it early, Ctrl-C too, carries what came until then in its `outcomes`.
    """
    found: list[Reply | Fault] = []

    async def main() -> Any:
        async with Client(base_url, **options) as client:
            if is_one(prompts):
                return await client.ask(prompts)  # type: ignore[arg-type]
            return await collected(client.as_completed(prompts), found)

    try:
        return run(main())
    except KeyboardInterrupt as stopped:  # the loop has seen another exception, and raised this one for it
        leave_with(stopped, found)
        raise


def _whole(timeout: float | None) -> dict[str, Any]:
    """A timeout given with a call bounds its requests as a whole, retries included."""
    if timeout is _DEFAULT:
        return {}
    check_options({"timeout": timeout})
    return {"timeout": None, "deadline": timeout}


def _wire(place: Any, key: str | None, headers: Mapping[str, str] | None, proxy: str | None, most: int) -> Any:
    """A wire to a base URL, or one that goes through an `openai.AsyncOpenAI`."""
    if isinstance(place, str):
        return Wire(place, key, headers=headers, proxy=proxy, most=most)
    from millstream.llm.sdk import SdkWire

    return SdkWire(place, headers=headers, most=most)


def _count(total: Counter[str], ids: Usage) -> None:
    total["prompt_tokens"] += ids.given or 0
    total["completion_tokens"] += ids.told or 0


def _overloaded(error: BaseException) -> bool:
    return isinstance(error, WireError) and (error.verdict.then == "busy" or error.status == 503)


def _work(answer: Answer) -> float:
    return float(paid_ids(answer.usage).told or 1)


def _ids_of(answer: Answer) -> float | None:
    given, told, _ = paid_ids(answer.usage)
    return None if given is None or told is None else float(given + told)
