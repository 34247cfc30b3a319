"""A person's own stage, from a generator function."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from functools import partial, update_wrapper
from typing import Any, Generic, TypeVar

from millstream.errors import RequestError
from millstream.streams.base import After, At, Pair, State, Stream, inner

T = TypeVar("T")
Handed = tuple[T, After | None]


def stage(function: Callable[..., Iterator[Handed[T]]]) -> "OwnStage[T]":
    """Makes a stage of a generator function that takes items with their places, and gives items with places.

    What is called then takes a stream, or any iterable, the function's other arguments, and `state`; it gives a
    `Stream`. The arguments are compared when a stream goes on, so they have to be what JSON can hold.

    With each item give the place of the last one that it is made of, as it came. The function is started again there,
    so it may remember nothing across such a place. Of several items made of one give None with all but the last: then
    the function is started before them, and those handed out already are passed over.

    >>> @stage
    ... def words(texts, least=1):
    ...     for text, place in texts:
    ...         found = [word for word in text.split() if len(word) >= least]
    ...         for number, word in enumerate(found, 1):
    ...             yield word, place if number == len(found) else None
    >>> stream = words(["to be or", "not", "to be"], least=2)
    >>> next(stream), next(stream)
    ('to', 'be')
    >>> list(words(["to be or", "not", "to be"], least=2, state=stream.state()))
    ['or', 'not', 'to', 'be']
    """
    return OwnStage(function)


class OwnStage(Generic[T]):
    """What `stage` makes of a function."""

    def __init__(self, function: Callable[..., Iterator[Handed[T]]]) -> None:
        self._function, self._signature = function, inspect.signature(function)
        if "state" in self._signature.parameters or not self._signature.parameters:
            raise RequestError("a stage takes items first, then what is set; state is given to the stream made of it")
        update_wrapper(self, function)

    def __reduce__(self) -> str:
        return str(self._function.__qualname__)

    def __call__(self, items: Iterable[Any], *args: Any, state: State | None = None, **named: Any) -> Stream[T]:
        given = self._signature.bind(items, *args, **named)
        given.apply_defaults()
        _, *settings = given.arguments.items()
        own = (self._function.__qualname__, dict(settings))
        return Stream(own, partial(self._pairs, args, named), upstream=items, state=state)

    def _pairs(self, args: tuple[Any, ...], named: dict[str, Any], at: At, items: Stream[Any]) -> Iterator[Pair[T]]:
        begin, passed = inner(at), at.get("passed", 0) if at else 0
        place: After = partial(_same, begin)
        handed = 0
        for handed_out in self._function(items.pairs(begin), *args, **named):
            item, after = self._pair(handed_out)
            handed += 1
            if after is not None:
                place, handed = after, 0
            if passed:
                passed -= 1
            else:
                yield item, partial(_within, place, handed)

    def _pair(self, handed_out: Any) -> Handed[T]:
        """Raises RequestError for an item alone: a `Document` would be taken for its id and a place."""
        if (
            isinstance(handed_out, tuple)
            and len(handed_out) == 2
            and (handed_out[1] is None or callable(handed_out[1]))
        ):
            return handed_out
        told = f"{self._function.__qualname__} gave {type(handed_out).__name__} {handed_out!r:.60}"
        raise RequestError(f"{told}: give each item with its place, yield item, place")


def _same(at: At) -> At:
    return at


def _within(place: After, handed: int) -> At:
    return {"in": place(), **({"passed": handed} if handed else {})}
