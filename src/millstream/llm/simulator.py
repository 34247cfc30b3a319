"""A small OpenAI-compatible server for dry runs, tests and benchmarks, with seeded latencies and faults.

A reply depends on the request's body and the seed alone. How a request is treated (latency, fault) depends on these and
on how many times that body came before, so that the same requests are treated alike in any order, at any concurrency.
All time is the event loop's, so that it runs under a virtual clock as well.

    async with running(Behaviour(latency=parse_latency("lognormal 0.8 0.5"))) as server:
        ...  # ask server.url, look at server.stats
"""

import asyncio
import contextlib
import math
import weakref
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from statistics import NormalDist
from struct import unpack
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from aiohttp import web
from yarl import URL

from millstream.errors import RequestError

_CHARACTERS_PER_ID = 4
_CREATED = 1_700_000_000  # seconds since 1970, always the same: a reply depends on the request and the seed alone
_TRICKLES = 16  # pieces of a body that comes slowly
_CAPITALS = {"france": "France is Paris", "germany": "Germany is Berlin", "italy": "Italy is Rome"}
_FILLING = ("the", "wheel", "turns", "and", "grain", "becomes", "flour", "as", "water", "runs", "over", "stone")
_NORMAL = NormalDist()

_ERRORS: dict[str, tuple[int, str, str | None, str]] = {
    "429": (429, "requests", "rate_limit_exceeded", "Rate limit reached; try again later."),
    "500": (500, "server_error", None, "The server had an error while processing your request."),
    "503": (503, "service_unavailable", None, "The engine is overloaded; try again later."),
    "529": (529, "overloaded_error", None, "Overloaded"),
    "408": (408, "timeout", None, "Request timed out."),
    "400": (400, "invalid_request_error", None, "The request is not valid."),
    "401": (401, "invalid_request_error", "invalid_api_key", "Incorrect API key provided."),
    "403": (403, "invalid_request_error", "unsupported_country_region_territory", "You are not allowed to do this."),
    "404-model": (404, "invalid_request_error", "model_not_found", "The model does not exist."),
    "413": (413, "invalid_request_error", "request_too_large", "The request is too large."),
    "quota": (429, "insufficient_quota", "insufficient_quota", "You exceeded your current quota."),
}
"""Kind of fault -> HTTP status, and `type`, `code` and `message` of the body."""

_WAITS_FIRST = {"500", "408"}  # what a server finds out only after it has worked on the request; the rest comes at once
_SECONDS = {"429": 1.0, "503": None, "529": None, "slow-bytes": 0.05}  # kinds with a time: the one when none is given

KINDS = (
    *_ERRORS,
    *("disconnect", "cut", "between", "hang", "slow-bytes", "garbage", "truncated-json", "html"),
    *("empty-choices", "null-content", "bad-schema", "error-event"),
)
"""What can go wrong with a request, beside the HTTP errors:

disconnect      the connection closes before the first byte of the reply
cut             it closes in the middle of the body, of a stream without ``[DONE]``
between         the reply is fine, but the connection closes on the next request that comes over it, without a byte
hang            no answer until the client goes away
slow-bytes      the body comes in 16 pieces, a stream piece by piece, with SECONDS between two
garbage         200 with bytes that are no UTF-8
truncated-json  200 with half of the JSON, in a body that is whole for HTTP
html            200 with an HTML page
empty-choices   200 with an empty list of choices
null-content    200 with null in place of the text
bad-schema      200 with a text that fits no JSON schema of an object
error-event     an error in mid stream, then ``[DONE]``; requests without a stream are spared
"""

_JSON = {"Content-Type": "application/json"}
_EVENTS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}
_DONE = b"data: [DONE]\n\n"
_HTML = (
    b"<!DOCTYPE html><html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>\n"
)


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind of fault and how often it comes; see `parse_fault`.

    `seconds` is Retry-After for 429, 503 and 529 (None: no such header), the pause between two pieces for slow-bytes.
    `times` limits it to the first that many requests of each body (None: no limit).
    """

    kind: str
    probability: float
    seconds: float | None = None
    times: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise RequestError(f"no fault is called {self.kind!r}; there are: {', '.join(KINDS)}")
        if not 0 <= self.probability <= 1:
            raise RequestError(f"fault {self.kind}: the probability is {self.probability:g}, not within 0 and 1")
        if self.seconds is not None and self.kind not in _SECONDS:
            raise RequestError(f"fault {self.kind} takes no seconds; these do: {', '.join(_SECONDS)}")
        if self.seconds is not None and not 0 <= self.seconds < math.inf:
            raise RequestError(f"fault {self.kind}: {self.seconds:g} seconds is no time to wait")
        if self.times is not None and self.times < 1:
            raise RequestError(f"fault {self.kind}: times must be 1 or more")


def parse_fault(text: str) -> Fault:
    """A fault from ``KIND:PROBABILITY[:SECONDS][:times=N]``.

    >>> parse_fault("429:0.05:2")
    Fault(kind='429', probability=0.05, seconds=2.0, times=None)
    >>> parse_fault("503:1.0:times=2")  # the first two requests of each body fail, then it works
    Fault(kind='503', probability=1.0, seconds=None, times=2)
    >>> parse_fault("429:0.05").seconds
    1.0
    """
    kind, *rest = text.strip().split(":")
    times = int(rest.pop()[6:]) if rest and rest[-1].startswith("times=") and rest[-1][6:].isdecimal() else None
    try:
        probability, *seconds = map(float, rest)
        wait = seconds[0] if seconds else _SECONDS.get(kind)
        if len(seconds) > 1:
            raise ValueError
    except ValueError:
        raise RequestError(f"a fault is KIND:PROBABILITY[:SECONDS][:times=N], not {text!r}") from None
    return Fault(kind, probability, wait, times)


@dataclass(frozen=True, slots=True)
class Latency:
    """How long things take, in seconds: a distribution and its numbers; see `parse_latency`."""

    form: Literal["fixed", "lognormal", "bimodal"] = "fixed"
    numbers: tuple[float, ...] = (0.0,)

    def __post_init__(self) -> None:
        names = {"fixed": "SECONDS", "lognormal": "MEDIAN SIGMA", "bimodal": "FAST SLOW SHARE"}
        if self.form not in names or len(self.numbers) != len(names[self.form].split()):
            raise RequestError(f"a latency is one of: {', '.join(' '.join(item) for item in names.items())}")
        if not all(0 <= number < math.inf for number in self.numbers):
            raise RequestError(f"the numbers of a latency are 0 or more: {self}")
        if self.form == "bimodal" and self.numbers[2] > 1:
            raise RequestError(f"the share of a bimodal latency is within 0 and 1, not {self.numbers[2]:g}")

    def __str__(self) -> str:
        return " ".join([self.form, *(f"{number:g}" for number in self.numbers)])

    def seconds(self, draw: float) -> float:
        """The time at `draw`, a number from 0 up to 1 that says which part of all requests is quicker.

        >>> slow = parse_latency("bimodal 0.05 1.0 0.02")
        >>> slow.seconds(0.5), slow.seconds(0.979), slow.seconds(0.981)
        (0.05, 0.05, 1.0)
        >>> Latency("lognormal", (0.8, 0.5)).seconds(0.5)
        0.8
        """
        if self.form == "lognormal":
            median, sigma = self.numbers
            return median * math.exp(sigma * _NORMAL.inv_cdf(draw or 2**-54))
        if self.form == "bimodal":
            return self.numbers[draw >= 1 - self.numbers[2]]
        return self.numbers[0]


def parse_latency(text: str) -> Latency:
    """A latency from ``fixed SECONDS``, ``lognormal MEDIAN SIGMA`` or ``bimodal FAST SLOW SHARE``; a number is fixed.

    >>> parse_latency("lognormal 0.8 0.5")
    Latency(form='lognormal', numbers=(0.8, 0.5))
    >>> print(parse_latency("0.05"))
    fixed 0.05
    """
    form, *numbers = text.split() or [""]
    try:
        float(form)
    except ValueError:
        pass
    else:
        form, numbers = "fixed", [form, *numbers]
    try:
        return Latency(form, tuple(map(float, numbers)))  # type: ignore[arg-type]
    except ValueError:
        raise RequestError(f"the latency {text!r} has a number that is none") from None


@dataclass(frozen=True, slots=True)
class Behaviour:
    """All that decides what the server does.

    latency        from a request's admission to the head of its reply
    piece_latency  between two pieces of a stream (one piece is about one id); 0 sends them all at once
    faults         each with its own draw; the first that comes up is taken
    seed           of the replies and of all draws
    reply_ids      length of every echoed reply, in ids of 4 characters; None: as long as the echo is
    capacity       requests in service at once; None: no limit
    overload       beyond it: "queue" (wait, first come first served) or "429"
    rpm, tpm       requests and ids a minute; a minute's worth may come at once. Beyond: 429 with Retry-After
    api_key        the key to ask for; None: all are welcome
    models         what /v1/models lists; a request may name any other
    """

    latency: Latency = Latency()
    piece_latency: Latency = Latency()
    faults: tuple[Fault, ...] = ()
    seed: int = 0
    reply_ids: int | None = None
    capacity: int | None = None
    overload: Literal["queue", "429"] = "queue"
    rpm: int | None = None
    tpm: int | None = None
    api_key: str | None = None
    models: tuple[str, ...] = ("simulated",)

    def __post_init__(self) -> None:
        for name in ("reply_ids", "capacity", "rpm", "tpm"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise RequestError(f"{name} must be 1 or more, not {number}")
        if self.overload not in ("queue", "429"):
            raise RequestError(f'overload is "queue" or "429", not {self.overload!r}')


@dataclass(slots=True)
class Stats:
    """What the server saw since it started or was reset. A request counts once its head was read.

    statuses        of the replies begun; a request that is disconnected, dropped or hangs has none
    faults          by kind, those that came up
    turned_away     by reason, before any draw: api-key, body (not valid), rpm, tpm, overload
    dropped         requests that came over a connection the fault "between" had closed
    gone            requests whose client went away before they were answered
    in_flight       requests here, in service or queued; `in_service` those that hold a place of the capacity
    ids_in/ids_out  of the replies with status 200 that were begun: what would be billed
    connections     those over which anything was asked
    bodies          distinct bodies admitted; `asked_again` those of them that were admitted more than once
    """

    requests: int = 0
    statuses: Counter[int] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    turned_away: Counter[str] = field(default_factory=Counter)
    dropped: int = 0
    gone: int = 0
    in_flight: int = 0
    most_in_flight: int = 0
    in_service: int = 0
    most_in_service: int = 0
    queued: int = 0
    most_queued: int = 0
    ids_in: int = 0
    ids_out: int = 0
    connections: int = 0
    bodies: int = 0
    asked_again: int = 0

    def reset(self) -> None:
        """Forget all but what is here now."""
        fresh = Stats()
        for name in ("in_flight", "in_service", "queued"):
            setattr(fresh, name, getattr(self, name))
            setattr(fresh, f"most_{name}", getattr(self, name))
        for item in fields(self):
            setattr(self, item.name, getattr(fresh, item.name))


class Server(NamedTuple):
    """A server that runs: `url` is what clients call the base URL (``http://127.0.0.1:8000/v1``); `stats` is live."""

    url: str
    stats: Stats


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


class _Chat(msgspec.Struct):
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


class _Completion(msgspec.Struct):
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


class _Reply(NamedTuple):
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
                "created": _CREATED,
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
            "created": _CREATED,
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


class _Treatment(NamedTuple):
    seconds: float
    fault: Fault | None
    draws: Iterator[float]


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


def draws_of(key: bytes, attempt: int) -> Iterator[float]:
    """Endless numbers in [0, 1) that depend on the key of a body and how many times it was seen before, nothing else.

    >>> [round(draw, 3) for draw, _ in zip(draws_of(b"key", 0), range(3))]
    [0.522, 0.112, 0.574]
    >>> next(draws_of(b"key", 0)) == next(draws_of(b"key", 0)) != next(draws_of(b"key", 1))
    True
    """
    start = key + attempt.to_bytes(8, "little")
    block = 0
    while True:
        for number in unpack("<8Q", blake2b(start + block.to_bytes(8, "little")).digest()):
            yield (number >> 11) * 2**-53
        block += 1


def _key_of(seed: int, body: bytes) -> bytes:
    return blake2b(body, digest_size=16, key=seed.to_bytes(16, "little", signed=True)).digest()


def _treatment(behaviour: Behaviour, key: bytes, attempt: int, stream: bool) -> _Treatment:
    """What happens to a request whose body was seen `attempt` times before.

    >>> behaviour = Behaviour(faults=(parse_fault("503:1:times=2"), parse_fault("cut:1")))
    >>> [_treatment(behaviour, b"key", attempt, False).fault.kind for attempt in range(4)]
    ['503', '503', 'cut', 'cut']
    """
    draws = draws_of(key, attempt)
    # The latency is drawn first, and every fault has its own draw, so that one more fault leaves the rest as it was.
    seconds = behaviour.latency.seconds(next(draws))
    chosen = None
    for fault in behaviour.faults:
        spared = (fault.times is not None and attempt >= fault.times) or (fault.kind == "error-event" and not stream)
        if next(draws) < fault.probability and not spared and chosen is None:
            chosen = fault
    return _Treatment(seconds, chosen, draws)


class _Quota:
    """Units a minute: a bucket that starts full and fills steadily. More than a bucketful is admitted from a full one
    and leaves a debt."""

    def __init__(self, per_minute: int) -> None:
        self.most = self.level = float(per_minute)
        self.time = asyncio.get_running_loop().time()

    def wait(self, units: int) -> float:
        """Seconds until `units` would be admitted; 0 if they are now."""
        now = asyncio.get_running_loop().time()
        self.level = min(self.most, self.level + (now - self.time) * self.most / 60)
        self.time = now
        return max(0.0, (min(units, self.most) - self.level) * 60 / self.most)

    def take(self, units: int) -> None:
        self.level -= units


class _Simulator:
    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.stats = Stats()
        self.tasks: set[asyncio.Task[Any]] = set()
        self.closing = False
        self.places = asyncio.Semaphore(behaviour.capacity) if behaviour.capacity else None
        # A connection is known by its task: aiohttp's own object for it takes no weak references.
        self.connections: weakref.WeakSet[asyncio.Task[None]] = weakref.WeakSet()
        self.doomed: weakref.WeakSet[asyncio.Task[None]] = weakref.WeakSet()
        self.decoders: dict[bool, msgspec.json.Decoder[Any]] = {
            True: msgspec.json.Decoder(_Chat),
            False: msgspec.json.Decoder(_Completion),
        }
        self._forget()

    def _forget(self) -> None:
        self.seen: dict[bytes, int] = {}  # key of a body -> times it was admitted; about 150 bytes each
        self.quotas: dict[str, _Quota] | None = None
        self.connections.clear()

    # --- what the routes call ---

    async def chat(self, request: web.Request) -> web.StreamResponse:
        return await self._tracked(request, True)

    async def completion(self, request: web.Request) -> web.StreamResponse:
        return await self._tracked(request, False)

    async def models(self, request: web.Request) -> web.StreamResponse:
        if not self._allowed(request):
            return self._error("401", count=False)
        models = [
            {"id": name, "object": "model", "created": _CREATED, "owned_by": "millstream"}
            for name in self.behaviour.models
        ]
        return web.Response(body=msgspec.json.encode({"object": "list", "data": models}), headers=_JSON)

    async def show(self, request: web.Request) -> web.StreamResponse:
        return web.Response(body=msgspec.json.encode(self.stats), headers=_JSON)

    async def reset(self, request: web.Request) -> web.StreamResponse:
        self.stats.reset()
        self._forget()
        return web.Response(body=b"{}", headers=_JSON)

    async def unknown(self, request: web.Request) -> web.StreamResponse:
        message = f"There is no {request.method} {request.path}."
        return web.Response(
            status=404, body=_error_body("invalid_request_error", "unknown_url", message), headers=_JSON
        )

    async def close(self, app: web.Application) -> None:
        """End what is in flight: a hanging request would hold up the end of the server."""
        self.closing = True
        for task in self.tasks:
            task.cancel()

    # --- one request ---

    async def _tracked(self, request: web.Request, chat: bool) -> web.StreamResponse:
        stats, task = self.stats, asyncio.current_task()
        assert task
        stats.requests += 1
        stats.in_flight += 1
        stats.most_in_flight = max(stats.most_in_flight, stats.in_flight)
        if request.task not in self.connections:
            self.connections.add(request.task)
            stats.connections += 1
        self.tasks.add(task)
        try:
            return await self._admitted(request, chat)
        except asyncio.CancelledError:
            stats.gone += not self.closing
            raise
        except ConnectionError:
            stats.gone += not self.closing
            return _closed(request)
        finally:
            stats.in_flight -= 1
            self.tasks.discard(task)

    async def _admitted(self, request: web.Request, chat: bool) -> web.StreamResponse:
        behaviour, stats = self.behaviour, self.stats
        if request.task in self.doomed:
            stats.dropped += 1
            return _closed(request)
        body = await request.read()
        if not self._allowed(request):
            return self._turned_away("api-key", "401")
        try:
            asked: _Chat | _Completion = self.decoders[chat].decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            return self._turned_away("body", "400", message=str(error))
        key = _key_of(behaviour.seed, body)
        reply = _reply(behaviour, asked, chat, key)

        full = behaviour.capacity is not None and stats.in_service >= behaviour.capacity
        if full and behaviour.overload == "429":
            return self._turned_away("overload", "429", 1.0)
        if behaviour.rpm or behaviour.tpm:
            limit, wait = self._over_quota(reply.ids_in + reply.ids_out)
            if limit:
                return self._turned_away(limit, "429", math.ceil(wait))

        attempt = self.seen.get(key, 0)
        self.seen[key] = attempt + 1
        stats.bodies += attempt == 0
        stats.asked_again += attempt == 1
        treatment = _treatment(behaviour, key, attempt, bool(asked.stream))
        fault = treatment.fault
        if fault:
            stats.faults[fault.kind] += 1
            if fault.kind in _ERRORS and fault.kind not in _WAITS_FIRST:
                return self._error(fault.kind, fault.seconds)
        async with self._place():
            if treatment.seconds:
                await asyncio.sleep(treatment.seconds)
            return await self._answered(request, asked, reply, treatment)

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncGenerator[None]:
        """A place in service, after waiting for one where the capacity is limited."""
        stats = self.stats
        if self.places:
            if self.places.locked():
                stats.queued += 1
                stats.most_queued = max(stats.most_queued, stats.queued)
                try:
                    await self.places.acquire()
                finally:
                    stats.queued -= 1
            else:
                await self.places.acquire()
        stats.in_service += 1
        stats.most_in_service = max(stats.most_in_service, stats.in_service)
        try:
            yield
        finally:
            stats.in_service -= 1
            if self.places:
                self.places.release()

    async def _answered(
        self, request: web.Request, asked: _Chat | _Completion, reply: _Reply, treatment: _Treatment
    ) -> web.StreamResponse:
        fault = treatment.fault
        kind = fault.kind if fault else None
        if kind in _ERRORS:
            return self._error(kind)
        if kind == "disconnect":
            return _closed(request)
        if kind == "hang":
            await asyncio.get_running_loop().create_future()
        if kind == "between":
            self.doomed.add(request.task)

        self.stats.statuses[200] += 1
        self.stats.ids_in += reply.ids_in
        self.stats.ids_out += reply.ids_out
        if kind == "null-content":
            reply = reply._replace(text=None)
        elif kind == "bad-schema":
            reply = reply._replace(text='["not", "what", "was", "asked"]')
        elif kind == "html":
            return web.Response(body=_HTML, headers={"Content-Type": "text/html; charset=utf-8"})
        elif kind == "garbage":
            noise = b"\xff" + b"".join(blake2b(reply.name.encode() + bytes([part])).digest() for part in range(4))
            return web.Response(body=noise, headers=_JSON)
        if asked.stream and kind != "truncated-json":
            return await self._streamed(request, asked, reply, treatment)

        body = reply.whole(empty=kind == "empty-choices")
        if kind == "truncated-json":
            body = body[: len(body) // 2]
        if kind not in ("cut", "slow-bytes"):
            return web.Response(body=body, headers=_JSON)
        response = web.StreamResponse(headers=_JSON)
        response.content_length = len(body)
        await response.prepare(request)
        if kind == "cut":
            await response.write(body[: len(body) // 2])
            return _closed(request, response)
        assert fault
        size = -(-len(body) // _TRICKLES)
        for start in range(0, len(body), size):
            await asyncio.sleep(fault.seconds or 0 if start else 0)
            await response.write(body[start : start + size])
        await response.write_eof()
        return response

    async def _streamed(
        self, request: web.Request, asked: _Chat | _Completion, reply: _Reply, treatment: _Treatment
    ) -> web.StreamResponse:
        fault = treatment.fault
        kind = fault.kind if fault else None
        include_usage = asked.stream_options is not None and asked.stream_options.include_usage
        events = reply.events(include_usage, empty=kind == "empty-choices")
        if kind in ("cut", "error-event"):
            del events[len(events) // 2 :]
        if kind == "error-event":
            events.append(b"data: %b\n\n" % _error_body(*_ERRORS["500"][1:]))
        if kind != "cut":
            events.append(_DONE)

        response = web.StreamResponse(headers=_EVENTS)
        await response.prepare(request)
        latency = self.behaviour.piece_latency
        if kind == "slow-bytes":
            assert fault
            latency = Latency("fixed", (fault.seconds or 0.0,))
        if kind == "slow-bytes" or any(latency.numbers):
            for number, event in enumerate(events):
                if number:
                    await asyncio.sleep(latency.seconds(next(treatment.draws)))
                await response.write(event)
        else:
            await response.write(b"".join(events))
        if kind == "cut":
            return _closed(request, response)
        await response.write_eof()
        return response

    # --- what keeps a request out ---

    def _allowed(self, request: web.Request) -> bool:
        key = self.behaviour.api_key
        return key is None or request.headers.get("Authorization") == f"Bearer {key}"

    def _over_quota(self, ids: int) -> tuple[str | None, float]:
        """The quota that is used up, and the seconds until it is not; (None, 0.0) takes the request from both."""
        if self.quotas is None:
            limits = {"rpm": self.behaviour.rpm, "tpm": self.behaviour.tpm}
            self.quotas = {name: _Quota(limit) for name, limit in limits.items() if limit}
        costs = {"rpm": 1, "tpm": ids}
        for name, quota in self.quotas.items():
            if wait := quota.wait(costs[name]):
                return name, wait
        for name, quota in self.quotas.items():
            quota.take(costs[name])
        return None, 0.0

    def _turned_away(
        self, reason: str, kind: str, seconds: float | None = None, message: str | None = None
    ) -> web.Response:
        self.stats.turned_away[reason] += 1
        return self._error(kind, seconds, message)

    def _error(
        self, kind: str, seconds: float | None = None, message: str | None = None, count: bool = True
    ) -> web.Response:
        status, error, code, default = _ERRORS[kind]
        if count:
            self.stats.statuses[status] += 1
        headers = _JSON if seconds is None else {**_JSON, "Retry-After": f"{seconds:.10g}"}
        return web.Response(status=status, body=_error_body(error, code, message or default), headers=headers)


def _error_body(error: str, code: str | None, message: str) -> bytes:
    """
    >>> _error_body("overloaded_error", None, "Overloaded")
    b'{"error":{"message":"Overloaded","type":"overloaded_error","param":null,"code":null}}'
    """
    return msgspec.json.encode({"error": {"message": message, "type": error, "param": None, "code": code}})


def _reply(behaviour: Behaviour, asked: _Chat | _Completion, chat: bool, key: bytes) -> _Reply:
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
    return _Reply(chat, name, asked.model, text, finish, count_ids(characters), count_ids(len(text)))


def _closed(request: web.Request, response: web.StreamResponse | None = None) -> web.StreamResponse:
    """Close the connection after what was written; what is returned is for aiohttp, the client sees none of it."""
    request.protocol.force_close()
    return response or web.Response()


_SIMULATOR = web.AppKey("simulator", _Simulator)


def application(behaviour: Behaviour) -> web.Application:
    """The server as an aiohttp application, to be made inside a running event loop.

    Its runner must be given ``handler_cancellation=True``, or the fault "hang" outlives its client.
    """
    simulator = _Simulator(behaviour)
    app = web.Application(client_max_size=0)
    app[_SIMULATOR] = simulator
    app.on_shutdown.append(simulator.close)
    app.router.add_post("/v1/chat/completions", simulator.chat)
    app.router.add_post("/v1/completions", simulator.completion)
    app.router.add_get("/v1/models", simulator.models)
    app.router.add_get("/_simulator/stats", simulator.show)
    app.router.add_post("/_simulator/reset", simulator.reset)
    app.router.add_route("*", "/{rest:.*}", simulator.unknown)
    return app


@contextlib.asynccontextmanager
async def running(
    behaviour: Behaviour | None = None, *, host: str = "127.0.0.1", port: int = 0
) -> AsyncGenerator[Server]:
    """A server on this event loop for as long as the block lasts; port 0 takes a free one.

    Leaving the block ends every request in flight; no task and no socket of it stays.
    """
    app = application(behaviour or Behaviour())
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, host, port, backlog=4096)
        try:
            await site.start()
        except OSError as error:
            raise RequestError(f"cannot listen on {host}, port {port}: {error.strerror}") from None
        url = URL.build(scheme="http", host=host, port=runner.addresses[0][1], path="/v1")
        yield Server(str(url), app[_SIMULATOR].stats)
    finally:
        await runner.cleanup()
        if tasks := app[_SIMULATOR].tasks:
            await asyncio.wait(tasks)
        # A closed transport tells its connection in the next round of the loop, which ends that connection's task.
        for _ in range(3):
            await asyncio.sleep(0)


async def serve(behaviour: Behaviour, host: str, port: int, ready: Callable[[str], None]) -> None:
    """Run a server until cancelled; `ready` is called with its URL once it listens."""
    async with running(behaviour, host=host, port=port) as server:
        ready(server.url)
        await asyncio.get_running_loop().create_future()
