"""What the simulator is told to do, and how that decides what becomes of a request."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from statistics import NormalDist
from struct import unpack
from typing import Literal, NamedTuple

from millstream.errors import RequestError
from millstream.llm.simulator.faults import FaultRate

_NORMAL = NormalDist()


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
    hide_limits    no Retry-After with any 429 of a limit, and so nothing tells of it
    quota          ids that may be billed in all; then every request gets 429 with "insufficient_quota"
    price          of a million ids in prompts, in replies and, perhaps, in prompts from a cache: for `Stats.cost`
    api_key        the key to ask for; None: all are welcome
    models         what /v1/models lists; a request may name any other
    """

    latency: Latency = Latency()
    piece_latency: Latency = Latency()
    faults: tuple[FaultRate, ...] = ()
    seed: int = 0
    reply_ids: int | None = None
    capacity: int | None = None
    overload: Literal["queue", "429"] = "queue"
    rpm: int | None = None
    tpm: int | None = None
    hide_limits: bool = False
    quota: int | None = None
    price: tuple[float, ...] | None = None
    api_key: str | None = None
    models: tuple[str, ...] = ("simulated",)

    def __post_init__(self) -> None:
        for name in ("reply_ids", "capacity", "rpm", "tpm", "quota"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise RequestError(f"{name} must be 1 or more, not {number}")
        if self.overload not in ("queue", "429"):
            raise RequestError(f'overload is "queue" or "429", not {self.overload!r}')
        if self.price is not None and (
            len(self.price) not in (2, 3) or not all(0 <= one < math.inf for one in self.price)
        ):
            raise RequestError(f"a price (--price) is IN,OUT or IN,OUT,CACHED, each a number from 0, not {self.price}")


class Treatment(NamedTuple):
    seconds: float
    fault: FaultRate | None
    draws: Iterator[float]

    @property
    def kind(self) -> str:
        """Of its fault; empty: there is none."""
        return self.fault.kind if self.fault else ""

    @property
    def number(self) -> float:
        """Of its fault."""
        return (self.fault and self.fault.number) or 0.0


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

    >>> from millstream.llm.simulator.faults import parse_fault
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
