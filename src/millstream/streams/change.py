"""One stream made into another: items changed, left out, counted, put into another order or together with others."""

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, TypeVar

import numpy as np

from millstream.errors import RequestError, ResumeRefused
from millstream.sampling.numbers import count_of, seed_of
from millstream.sampling.permutation import Permutation, key_of
from millstream.streams.base import After, At, Pair, State, Stream, beside, inner

T = TypeVar("T")
R = TypeVar("R")


# By a function --------------------------------------------------------------------------------------------------------


def map(
    function: Callable[[T], R], stream: Iterable[T], *, version: object = None, state: State | None = None
) -> Stream[R]:
    """What `function` makes of each item.

    A stream goes on only with the functions that it began with. A function counts by its name in the code, as
    ``Cleaner.strip`` or ``<lambda>``, and by `version`, which is yours to change when what it does changes.

    >>> list(map(str.upper, ["a", "b"]))
    ['A', 'B']
    """
    return Stream(("map", named(function, version)), partial(_changed, function), upstream=stream, state=state)


def filter(
    function: Callable[[T], object] | None, stream: Iterable[T], *, version: object = None, state: State | None = None
) -> Stream[T]:
    """The items for which `function` says yes; those that count as true if it is None. It counts as that of `map` does.

    >>> list(filter(str.isupper, ["a", "B"]))
    ['B']
    """
    wanted = function or bool
    return Stream(
        ("filter", named(wanted, version)), partial(_chosen, wanted), upstream=stream, hands_on=True, state=state
    )


def named(function: Any, version: object) -> dict[str, Any]:
    """What a state says of a function: no line and no module, as those change where nothing else does."""
    if not callable(function):
        raise RequestError(f"{function!r} is no function")
    told = [] if version is None else [("version", version)]
    if isinstance(function, partial):
        given = [*function.args, *itertools.chain(*sorted(function.keywords.items()))]
        return {**named(function.func, None), "given": [value for value in given if _plain(value)], **dict(told)}
    return {"function": getattr(function, "__qualname__", type(function).__qualname__), **dict(told)}


def _plain(value: object) -> bool:
    return value is None or isinstance(value, str | int | float)


def _changed(function: Callable[[T], R], at: At, upstream: Stream[T]) -> Iterator[Pair[R]]:
    for item, after in upstream.pairs(inner(at)):
        yield function(item), partial(beside, after)


def _chosen(function: Callable[[T], object], at: At, upstream: Stream[T]) -> Iterator[Pair[T]]:
    for item, after in upstream.pairs(inner(at)):
        if function(item):
            yield item, partial(beside, after)


# By count -------------------------------------------------------------------------------------------------------------


def enumerate(stream: Iterable[T], start: int = 0, *, state: State | None = None) -> Stream[tuple[int, T]]:
    """Each item with its number, counted from `start`.

    >>> list(enumerate("ab", 1))
    [(1, 'a'), (2, 'b')]
    """
    if not isinstance(start, int):
        raise RequestError(f"start {start!r} does not work: give a whole number")
    return Stream(("enumerate", {"start": start}), partial(_numbered, start), upstream=stream, state=state)


def _numbered(start: int, at: At, upstream: Stream[T]) -> Iterator[Pair[tuple[int, T]]]:
    count = at.get("count", 0) if at else 0
    for item, after in upstream.pairs(inner(at)):
        count += 1
        yield (start + count - 1, item), partial(beside, after, count=count)


def take(stream: Iterable[T], count: int, *, state: State | None = None) -> Stream[T]:
    """The first `count` items, of a stream without an end too; nothing is read behind them.

    >>> list(take([1, 2, 3], 2))
    [1, 2]
    """
    count = count_of("count", count, 0)
    return Stream(("take", {"count": count}), partial(_first, count), upstream=stream, hands_on=True, state=state)


def _first(count: int, at: At, upstream: Stream[T]) -> Iterator[Pair[T]]:
    taken = at.get("taken", 0) if at else 0
    if taken >= count:
        return
    for item, after in upstream.pairs(inner(at)):
        taken += 1
        yield item, partial(beside, after, taken=taken)
        if taken == count:
            return


def skip(stream: Iterable[T], count: int, *, state: State | None = None) -> Stream[T]:
    """All but the first `count` items. Who goes on from a place behind them does not pass over them again.

    >>> list(skip([1, 2, 3], 2))
    [3]
    """
    count = count_of("count", count, 0)
    return Stream(("skip", {"count": count}), partial(_rest, count), upstream=stream, hands_on=True, state=state)


def _rest(count: int, at: At, upstream: Stream[T]) -> Iterator[Pair[T]]:
    passed = at.get("passed", 0) if at else 0
    for item, after in upstream.pairs(inner(at)):
        if passed < count:
            passed += 1
        else:
            yield item, partial(beside, after, passed=count)


# Together -------------------------------------------------------------------------------------------------------------


class Batched(list[T]):
    """Items of one batch; `state` is that of the stream after it, however far the stream has gone by now."""

    def __init__(self, items: Iterable[T] = (), after: Callable[[], State] | None = None) -> None:
        super().__init__(items)
        self._after = after
        self._state: State | None = None

    @property
    def state(self) -> State | None:
        """Found out when it is asked for, as it costs more than a batch does."""
        if self._after:
            self._state, self._after = self._after(), None
        return self._state

    def __reduce__(self) -> tuple[Any, ...]:
        return _batched, (list(self), self.state)


def _batched(items: list[T], state: State | None) -> Batched[T]:
    return Batched(items, partial(_given, state) if state else None)


def _given(state: State) -> State:
    return state


class _Batches(Stream[Batched[T]]):
    def pairs(self, at: At = None) -> Iterator[Pair[Batched[T]]]:
        for items, after in super().pairs(at):
            yield Batched(items, partial(self._after_all, after)), after

    def _after_all(self, after: After) -> State:
        return self.state_at(after())


def batch(stream: Iterable[T], size: int, *, remainder: str = "keep", state: State | None = None) -> Stream[Batched[T]]:
    """Lists of `size` items; at the end one of fewer, which ``remainder="drop"`` leaves out.

    Each list has a `state`, which goes on behind it: so whoever looks ahead, as a loader with workers does, still has
    that of the batch it trains on.

    >>> stream = batch("abcde", 2)
    >>> first, second, third = stream
    >>> third, list(batch("abcde", 2, state=first.state))
    (['e'], [['c', 'd'], ['e']])
    """
    size = count_of("size", size)
    if remainder not in ("keep", "drop"):
        raise RequestError(f"remainder {remainder!r} does not work: give 'keep' or 'drop'")
    own = ("batch", {"size": size, "remainder": remainder})
    pairs: Any = partial(_together, size, remainder)
    return _Batches(own, pairs, upstream=stream, state=state)


def _together(size: int, remainder: str, at: At, upstream: Stream[T]) -> Iterator[Pair[list[T]]]:
    items: list[T] = []
    after: After
    for item, after in upstream.pairs(inner(at)):
        items.append(item)
        if len(items) == size:
            yield items, partial(beside, after)
            items = []
    if items and remainder == "keep":
        yield items, partial(beside, after)


# In another order -----------------------------------------------------------------------------------------------------


def shuffle(stream: Iterable[T], window: int, seed: int, *, state: State | None = None) -> Stream[T]:
    """The items in another order: `window` of them at a time are read, and handed out as `seed` says.

    A state says where the window begins and how many of it were handed out; who goes on reads that window again.

    >>> list(shuffle("abcdefgh", 4, seed=3))
    ['d', 'a', 'b', 'c', 'f', 'h', 'e', 'g']
    """
    window, seed = count_of("window", window), seed_of(seed)
    return Stream(
        ("shuffle", {"window": window, "seed": seed}),
        partial(_shuffled, window, seed),
        upstream=stream,
        hands_on=True,
        state=state,
    )


def _shuffled(window: int, seed: int, at: At, upstream: Stream[T]) -> Iterator[Pair[T]]:
    number, done, size = (at.get("window", 0), at.get("done", 0), at.get("of", window)) if at else (0, 0, window)
    begin: After = partial(inner, at)
    source = upstream.pairs(inner(at))
    while held := list(itertools.islice(source, size)):
        if done and len(held) < size:  # the order was that of so many
            raise ResumeRefused(f"there are {len(held):,} items in the window that is shuffled; there were {size:,}")
        order = Permutation(len(held), key_of("shuffle", seed, number))(np.arange(len(held))).tolist()
        last, own = held[-1][1], {"window": number, "of": len(held)}
        for place in range(done, len(held) - 1):
            yield held[order[place]][0], partial(_in_window, {**own, "done": place + 1}, begin, last)
        yield held[order[-1]][0], partial(beside, last, window=number + 1)
        number, done, size, begin = number + 1, 0, window, last


def _in_window(own: dict[str, int], begin: After, last: After) -> At:
    """What was handed out depends on all of the window: up to where it was seen, nothing may change."""
    return {**own, "in": begin(), "seen": last()}
