"""Prompts as Python gives them: what is one and what is several, and the requests they make."""

from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Callable,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from itertools import count
from typing import Any, TypeAlias

from millstream.client.bodies import body_from, check_params, in_order, words
from millstream.client.requests import Request
from millstream.errors import RequestError

Prompt: TypeAlias = str | Sequence[Mapping[str, Any]] | Mapping[str, Any]
"""A text (what the user says), a list of messages, or a mapping with "prompt" or "messages" and other parameters."""

_Each: TypeAlias = Callable[[Any], Request]


class NotAPrompt(RequestError):
    """What was given in a prompt's place makes no request."""


class Given:
    """Makes requests of prompts. `params`, which may still change, go into the body of each, `system` before it.

    Raises RequestError for those that no request can have.
    """

    def __init__(self, model: str | None, params: Mapping[str, Any], system: str | None) -> None:
        check_params(params, model, system)
        self.model, self._params, self.system = model, params, system

    def requests(self, prompts: Any) -> Any:
        """The requests of many prompts, of either kind of iterable; what is no prompt is a fault in its place."""
        numbers = count()
        return _mapped(lambda prompt: self.request_or_fault(prompt, next(numbers)), several(prompts))

    def request_or_fault(self, prompt: Any, number: int) -> Request:
        """The request of prompt `number`, from 0; one with a fault if it is none."""
        try:
            return self.request(prompt)
        except RequestError as error:
            if not number and not isinstance(error, NotAPrompt):
                raise  # nobody has named a model: that is told before anything is paid
            return Request(0, None, b"", b"", fault=("bad_row", str(error)))

    def request(self, prompt: Any, **more: Any) -> Request:
        """Raises NotAPrompt, and RequestError if no model is named."""
        return Request(0, None, b"", self.data(prompt, may_stream=False, **more))

    def data(self, prompt: Any, *, may_stream: bool = True, **more: Any) -> bytes:
        """The request's body, as it is sent. Raises as `request` does."""
        try:
            body = {**body_from(prompt, {"model": self.model, **self._params}, self.system), **more}
        except ValueError as error:
            raise NotAPrompt(str(error)) from None
        if not body["model"]:
            raise RequestError("no model given: name one with model=")
        if body.get("stream") and not may_stream:
            raise NotAPrompt("no prompt: 'stream' cannot be a parameter; for one reply in pieces there is stream()")
        try:
            return in_order(body)
        except (ValueError, RecursionError) as error:
            raise NotAPrompt(f"no prompt: {words(error)}") from None


def is_one(prompts: Any) -> bool:
    """Whether it is one prompt: a text, a mapping, or a list of messages, which have a role.

    >>> is_one([{"role": "user", "content": "Hello?"}]), is_one(["one", "two"])
    (True, False)
    """
    if isinstance(prompts, str | Mapping):
        return True
    is_list = isinstance(prompts, Sequence) and not isinstance(prompts, bytes | bytearray)
    return is_list and bool(prompts) and all(map(_is_message, prompts))


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and not {"prompt", "messages"} & set(value)


def several(prompts: Any) -> Any:
    """Raises RequestError for what is no iterable of prompts; of a text the letters would be asked."""
    if isinstance(prompts, str | bytes | Mapping) or not isinstance(prompts, Iterable | AsyncIterable):
        raise RequestError(f"several prompts are wanted, not {prompts!r:.80}; for one there is ask()")
    return prompts


def _mapped(function: _Each, items: Iterable[Any] | AsyncIterable[Any]) -> Any:
    """`map` for either kind of iterable, which closes its source with itself."""
    return _mapped_async(function, items) if isinstance(items, AsyncIterable) else _mapped_sync(function, items)


def _mapped_sync(function: _Each, items: Iterable[Any]) -> Iterator[Any]:
    try:
        for item in items:
            yield function(item)
    finally:
        if isinstance(items, Generator):
            items.close()


async def _mapped_async(function: _Each, items: AsyncIterable[Any]) -> AsyncIterator[Any]:
    try:
        async for item in items:
            yield function(item)
    finally:
        if isinstance(items, AsyncGenerator):
            await items.aclose()
