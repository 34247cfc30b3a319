"""Embeddings of texts: requests of one text or of several, taken apart again into one outcome for each text."""

import array
import base64
import binascii
import sys
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from millstream.aio import Fault
from millstream.client.bodies import in_order, words
from millstream.client.outcomes import Outcomes, leave_with
from millstream.client.requests import Reply, Request
from millstream.errors import RequestError
from millstream.llm.verdicts import BAD_ROW, UNUSABLE
from millstream.llm.wire import WireError

PATH = "/embeddings"

Texts: TypeAlias = Iterable[str] | AsyncIterable[str]
Group: TypeAlias = list[tuple[int, str]]
"""The texts of one request, with their numbers."""


@dataclass(frozen=True, slots=True)
class Embedding:
    """The vector of text number `index`; the rest is that of the request which brought it, and perhaps others with it.

    `latency` is in seconds, as a `Reply` has it; `usage` the server's count of ids.
    """

    index: int
    vector: list[float]
    latency: float
    attempts: int
    model: str | None
    usage: dict[str, Any]
    server: str


@dataclass
class Embedder:
    """One call of `Client.embed`: `ask` makes outcomes of requests; what it has found is in `found`.

    Raises AskStopped as `Outcomes` does; that, and whatever else ends it early, carries what came until then.
    """

    ask: Callable[[AsyncIterator[Request]], Outcomes]
    given: Mapping[str, Any]
    found: list[Embedding | Fault] = field(default_factory=list)

    async def all_of(self, texts: Texts, per_request: int) -> list[Embedding | Fault]:
        """One outcome for each text, in their order.

        A text that makes no request is a Fault in its place. Of a request with several that is refused for what one of
        them is, each is asked for alone: one text's refusal is that text's.
        """
        if isinstance(texts, str | bytes | Mapping) or not isinstance(texts, Iterable | AsyncIterable):
            raise RequestError(f"several texts are wanted, not {texts!r:.80}; for one, give a list of one")
        if isinstance(per_request, bool) or not isinstance(per_request, int) or per_request < 1:
            raise RequestError(f"per_request={per_request!r:.80}: a request has at least one text")
        alone: list[Group] = []
        try:
            await self._ask(self._grouped(texts, per_request), alone)
            await self._ask(_each(alone), [])
        except BaseException as error:
            self.found.sort(key=_index)
            leave_with(error, self.found)
            raise
        self.found.sort(key=_index)
        return self.found

    async def _ask(self, groups: AsyncIterator[Group], alone: list[Group]) -> None:
        under_way: dict[int, Group] = {}  # by the number that the flow gives them

        async def requests() -> AsyncIterator[Request]:
            number = 0
            async for group in groups:
                under_way[number] = group
                number += 1
                body = {**self.given, "input": [text for _, text in group]}
                yield Request(0, None, b"", in_order(body), PATH)

        outcomes = self.ask(requests())
        try:
            async with outcomes:
                async for outcome in outcomes:
                    self._take(outcome, under_way.pop(outcome.index), alone)
        finally:
            for outcome in outcomes.rest:
                self._take(outcome, under_way.pop(outcome.index), [])

    def _take(self, outcome: Reply | Fault, group: Group, alone: list[Group]) -> None:
        if isinstance(outcome, Reply):
            self.found += _taken_apart(outcome, group)
        elif len(group) > 1 and _is_own(outcome):
            alone.append(group)
        else:
            self.found += [replace(outcome, index=number) for number, _ in group]

    async def _grouped(self, texts: Texts, per_request: int) -> AsyncIterator[Group]:
        group: Group = []
        number = 0
        async for text in _either(texts):
            if (reason := self._wrong(text)) is None:
                group.append((number, text))
            else:
                self.found.append(Fault(number, BAD_ROW.kind, reason, 0.0, 0, WireError(BAD_ROW, reason)))
            number += 1
            if len(group) == per_request:
                yield group
                group = []
        if group:
            yield group

    def _wrong(self, text: Any) -> str | None:
        if not isinstance(text, str):
            return f"no text but {type(text).__name__}: {text!r:.80}"
        try:
            in_order(text)
        except ValueError as error:
            return words(error)
        return None


def _taken_apart(reply: Reply, group: Group) -> Iterator[Embedding | Fault]:
    vectors = vectors_in(reply.body, len(group))
    for at, (number, _) in enumerate(group):
        if vectors is None:
            message = f"{reply.server}: a reply that does not have {len(group)} embeddings"
            error = WireError(UNUSABLE, message, status=200, usage=reply.usage)
            yield Fault(number, error.kind, message, reply.latency, reply.attempts, error)
        else:
            vector = vectors[at]
            yield Embedding(
                number, vector, reply.latency, reply.attempts, reply.model, reply.usage, server=reply.server
            )


def vectors_in(body: Any, count: int) -> list[list[float]] | None:
    """The vectors in the body of a reply, in the order of its texts; None if there are not so many.

    >>> vectors_in({"data": [{"index": 1, "embedding": [2]}, {"index": 0, "embedding": "AAAAPw=="}]}, 2)
    [[0.5], [2]]
    """
    data = body.get("data") if isinstance(body, dict) else None
    if not isinstance(data, list) or len(data) != count or not all(isinstance(each, dict) for each in data):
        return None
    numbers = [each.get("index") for each in data]
    if all(type(number) is int for number in numbers) and sorted(numbers) == list(range(count)):
        data = sorted(data, key=lambda each: each["index"])
    vectors = [_vector(each.get("embedding")) for each in data]
    return None if None in vectors else vectors  # type: ignore[return-value]  # of lists alone, then


def _vector(embedding: Any) -> list[float] | None:
    """Numbers, or what ``encoding_format="base64"`` brings: the bytes of 32-bit floats, the lowest first."""
    if isinstance(embedding, list):
        return embedding if all(type(each) in (int, float) for each in embedding) else None
    if not isinstance(embedding, str):
        return None
    numbers = array.array("f")
    try:
        numbers.frombytes(base64.b64decode(embedding, validate=True))
    except (binascii.Error, ValueError):
        return None
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers.tolist()


def _is_own(fault: Fault) -> bool:
    """Whether one of its texts may be to blame."""
    verdict = fault.error.verdict if isinstance(fault.error, WireError) else None
    return verdict is not None and verdict.then == "own" and not verdict.servers and not fault.error.fatal


async def _each(groups: list[Group]) -> AsyncIterator[Group]:
    for group in groups:
        for one in group:
            yield [one]


async def _either(texts: Texts) -> AsyncIterator[Any]:
    if isinstance(texts, AsyncIterable):
        async for text in texts:
            yield text
    else:
        for text in texts:
            yield text


def _index(outcome: Embedding | Fault) -> int:
    return outcome.index
