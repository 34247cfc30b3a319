"""What the simulator is told to do, and how that decides what becomes of a request."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from statistics import NormalDist
from struct import unpack
from typing import Literal, NamedTuple

from millstream.errors import RequestError

_NORMAL = NormalDist()

ERRORS: dict[str, tuple[int, str, str | None, str]] = {
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

WAITS_FIRST = {"500", "408"}  # what a server finds out only after it has worked on the request; the rest comes at once
_SECONDS = {"429": 1.0, "503": None, "529": None, "slow-bytes": 0.05}  # kinds with a time: the one when none is given

KINDS = (
    *ERRORS,
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


class Treatment(NamedTuple):
    seconds: float
    fault: Fault | None
    draws: Iterator[float]


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


def key_of(seed: int, body: bytes) -> bytes:
    return blake2b(body, digest_size=16, key=seed.to_bytes(16, "little", signed=True)).digest()


def treatment_of(behaviour: Behaviour, key: bytes, attempt: int, stream: bool) -> Treatment:
    """What happens to a request whose body was seen `attempt` times before.

    >>> behaviour = Behaviour(faults=(parse_fault("503:1:times=2"), parse_fault("cut:1")))
    >>> [treatment_of(behaviour, b"key", attempt, False).fault.kind for attempt in range(4)]
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
    return Treatment(seconds, chosen, draws)
