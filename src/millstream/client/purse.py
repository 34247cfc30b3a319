"""What requests cost: what each may cost, what was spent, and the most that may be."""

import math
import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec

from millstream.client.requests import Request
from millstream.errors import RequestError, either, setting
from millstream.llm.usage import NOT_TOLD, Usage
from millstream.options import is_count

_CHARACTERS_PER_ID = 4.0
_FIRST_GUESS = 256.0  # ids of a reply, before any has come
_PER_MEDIUM = 2048  # ids of an image or a recording, which are no text: a guess
_MEDIUM = re.compile(rb';base64,[A-Za-z0-9+/=_-]+|"data":"[A-Za-z0-9+/=_-]{1024,}"')
_SILENT = frozenset({"/embeddings", "/rerank", "/score", "/moderations"})  # nothing is said there
_AGAIN = 0.1  # seconds until to look whether other attempts have ended


class Price(NamedTuple):
    """What a million ids cost: in prompts, in replies, and in prompts where they were read from a cache."""

    given: float
    told: float
    cached: float

    @classmethod
    def of_numbers(cls, numbers: Any) -> "Price":
        """Raises RequestError for what are no prices.

        >>> Price.of_numbers([0.15, 0.6])
        Price(given=0.15, told=0.6, cached=0.15)
        """
        prices = tuple(numbers) if isinstance(numbers, Iterable) else (numbers,)
        if len(prices) not in (2, 3) or not all(
            isinstance(price, int | float) and 0 <= price < math.inf for price in prices
        ):
            raise RequestError(f"{setting('price')} is IN,OUT or IN,OUT,CACHED, each a number from 0, not {prices}")
        given, told, cached = prices if len(prices) == 3 else (*prices, prices[0])
        return cls(given, told, cached)

    def cost(self, usage: Usage) -> float:
        """What is not told costs nothing.

        >>> round(Price(1.0, 2.0, 0.5).cost(Usage(given=1_000_000, told=1_000_000, cached=400_000)), 9)
        2.8
        """
        given, told, cached = usage
        return ((given or 0) * self.given + cached * (self.cached - self.given) + (told or 0) * self.told) / 1e6


class _Asked(msgspec.Struct):
    """What of a request's body bounds its reply."""

    max_tokens: Any = None
    max_completion_tokens: Any = None
    max_output_tokens: Any = None
    n: Any = None
    best_of: Any = None
    prompt: msgspec.Raw = msgspec.Raw(b"")


_asked = msgspec.json.Decoder(_Asked).decode
_BOUNDS = (b'_tokens"', b'"n"', b'"best_of"')


class RequestShape(NamedTuple):
    """What one can see of a request: `letters` of its body in bytes, `media` in it, `choices` of its reply, `limit` of
    each in ids."""

    letters: int
    media: int
    choices: int
    limit: int | None


def shape_of(request: Request) -> RequestShape:
    """
    >>> shape_of(Request(0, None, b"", b'{"max_tokens":20,"messages":[],"n":3}'))
    RequestShape(letters=37, media=0, choices=3, limit=20)
    """
    data, media, letters = request.data, 0, len(request.data)
    if b";base64," in data or b"_audio" in data:
        found = _MEDIUM.findall(data)
        media, letters = len(found), letters - sum(map(len, found))
    if request.path in _SILENT:
        return RequestShape(letters, media, 1, 0)
    if not (any(name in data for name in _BOUNDS) or request.path == "/completions"):
        return RequestShape(letters, media, 1, None)
    try:
        asked = _asked(data)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return RequestShape(letters, media, 1, None)
    limits = filter(is_count, (asked.max_tokens, asked.max_completion_tokens, asked.max_output_tokens))
    choices = max([1, *filter(is_count, (asked.n, asked.best_of))])
    return RequestShape(letters, media, choices * _prompts_in(asked.prompt), max(limits, default=None))


def _prompts_in(prompt: msgspec.Raw) -> int:
    """Text completions take a list of prompts, each a text or a list of ids; a list of ids is one."""
    if bytes(memoryview(prompt)[:1]) != b"[":
        return 1
    return max(1, sum(not isinstance(one, int) for one in msgspec.json.decode(prompt)))


class Guess:
    """How many ids a request and its reply have, before the reply tells: what is likely, and the most it may be.

    No tokenizer makes more ids than bytes of a text, as the ids of every byte are there for what it knows nothing
    better for. What servers put around a prompt, or think beyond the limit, is learned.

    >>> guess, request = Guess(), Request(0, None, b"", b'{"max_tokens":20,"messages":[]}')
    >>> guess.most(request)
    Usage(given=31, told=20, cached=0)
    >>> guess.learn(request, Usage(given=40, told=30))
    >>> guess.most(request)
    Usage(given=40, told=30, cached=0)
    """

    def __init__(self) -> None:
        self._ids_per_letter = 1 / _CHARACTERS_PER_ID  # moving averages
        self._ids_per_choice = _FIRST_GUESS
        self._most_per_choice = 0.0  # of replies
        self._more_given = self._more_told = 0.0  # than there ought to be
        self._last: tuple[Request | None, RequestShape] = (None, RequestShape(0, 0, 1, None))

    def learn(self, request: Request, usage: Usage) -> None:
        shape = self._shape(request)
        if usage.given:
            per_letter = max(0.0, usage.given - shape.media * _PER_MEDIUM) / max(1, shape.letters)
            self._ids_per_letter += 0.05 * (per_letter - self._ids_per_letter)
            self._more_given = max(self._more_given, usage.given - shape.letters - shape.media * _PER_MEDIUM)
        if usage.told is not None:
            per_choice = usage.told / shape.choices
            self._ids_per_choice += 0.05 * (per_choice - self._ids_per_choice)
            self._most_per_choice = max(self._most_per_choice, per_choice)
            if shape.limit is not None:
                self._more_told = max(self._more_told, usage.told - shape.choices * shape.limit)

    def likely(self, request: Request) -> float:
        """Ids of both together."""
        letters, media, choices, limit = self._shape(request)
        told = self._ids_per_choice if limit is None else limit
        return letters * self._ids_per_letter + media * _PER_MEDIUM + choices * told

    def most(self, request: Request) -> Usage:
        """The most of both; of a reply without a limit, as much as any had so far."""
        letters, media, choices, limit = self._shape(request)
        given = letters + media * _PER_MEDIUM + self._more_given
        if limit is None:
            return Usage(math.ceil(given), math.ceil(choices * (self._most_per_choice or _FIRST_GUESS)))
        return Usage(math.ceil(given), math.ceil(choices * limit + self._more_told))

    def _shape(self, request: Request) -> RequestShape:
        """It is asked for several times before one and the same attempt."""
        last, shape = self._last
        if last is not request:
            shape = shape_of(request)
            self._last = (request, shape)
        return shape


class Purse:
    """What has been spent, and a `Gate` that no attempt passes that could bring it above `most`.

    An attempt is committed with the most that it may cost as long as it runs. When it has ended, what the server told
    counts; what it did not tell of an attempt that it was sent (after a timeout, say) counts as was committed. `keep`
    is given what no reply's `usage` tells, so that it is known to later runs.

    >>> purse, request = Purse(Price(1e6, 1e6, 1e6), 100.0, Guess()), Request(0, None, b"", b'{"max_tokens":20}')
    >>> purse.wait(request, 0.0), purse.take(request, 0.0), purse.wait(request, 0.0) > 0
    (0.0, 37.0, False)
    >>> purse.answered(request, Usage(given=5, told=20))
    >>> purse.settle(37.0, None, 0.0)
    >>> purse.spent
    25.0
    """

    name = "the most that it may cost"

    def __init__(self, price: Price | None, most: float | None, guess: Guess) -> None:
        if most is not None and price is None:
            raise RequestError(
                f"{setting('max_cost')} needs prices: give {either('price=(IN, OUT)', '--price IN,OUT')}"
            )
        self.most = most
        self.spent = 0.0
        self.earlier = 0.0  # what earlier runs spent
        self.keep: Callable[[Usage], None] | None = None
        self._price, self._guess = price, guess
        self._committed, self._running = 0.0, 0  # what the attempts that run now may cost, and how many they are

    @property
    def cost(self) -> float | None:
        """What was spent, in the money of the prices; None: there are none."""
        return None if self._price is None else self.earlier + self.spent

    def pay_earlier(self, usages: Iterable[Usage]) -> None:
        """What earlier runs were told, or counted."""
        if self._price is not None:
            self.earlier += sum(map(self._price.cost, usages))

    # What attempts came to ------------------------------------------------------------------------------------------

    def answered(self, request: Request, usage: Usage) -> None:
        """An attempt brought an answer, whose row tells its usage."""
        if self._price is not None:
            self.spent += self._price.cost(usage)
        if usage.given is None or usage.told is None:
            self._count(self._untold(request, usage))

    def failed(self, request: Request, usage: Usage) -> None:
        """An attempt that the server may have worked on brought nothing; of what was told, no row will tell."""
        rest = self._untold(request, usage)
        self._count(Usage((usage.given or 0) + (rest.given or 0), (usage.told or 0) + (rest.told or 0), usage.cached))

    def _untold(self, request: Request, usage: Usage) -> Usage:
        most = self._guess.most(request)
        return Usage(most.given if usage.given is None else 0, most.told if usage.told is None else 0)

    def _count(self, usage: Usage) -> None:
        if self._price is not None:
            self.spent += self._price.cost(usage)
        if self.keep is not None:
            self.keep(usage)

    def running(self, request: Request) -> "Running":
        """An attempt that no flow makes begins; there is room for it."""
        return Running(self, request)

    # The gate -------------------------------------------------------------------------------------------------------

    def wait(self, item: Any, now: float) -> float:
        if self.most is None:
            return 0.0
        if self.earlier + self.spent + self._committed + self._most(item) <= self.most:
            return 0.0
        return _AGAIN if self._running else math.inf

    def take(self, item: Any, now: float) -> float:
        most = self._most(item)
        self._committed += most
        self._running += 1
        return most

    def settle(self, permit: float, value: Any, now: float) -> None:
        self._running -= 1
        self._committed = self._committed - permit if self._running else 0.0

    def _most(self, request: Request) -> float:
        if self._price is None:
            return 0.0
        most = self._guess.most(request)
        dearest = max(self._price.given, self._price.cached)
        return ((most.given or 0) * dearest + (most.told or 0) * self._price.told) / 1e6


class Running:
    """An attempt that no flow makes: committed until it ends, and then counted, once."""

    def __init__(self, purse: Purse, request: Request) -> None:
        self._purse, self._request = purse, request
        self._permit: float | None = purse.take(request, 0.0)

    def end(self, usage: Usage, *, answered: bool = False, unpaid: bool = False) -> None:
        if self._permit is None:
            return
        if answered:
            self._purse.answered(self._request, usage)
        elif not unpaid or usage != NOT_TOLD:
            self._purse.failed(self._request, usage)
        self._purse.settle(self._permit, None, 0.0)
        self._permit = None
