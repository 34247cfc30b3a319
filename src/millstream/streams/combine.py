"""Several streams as one: one after the other, in step, by weight, again and again. Each keeps its place."""

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from typing import Any, TypeVar, cast

import numpy as np

from millstream.errors import DataError, RequestError
from millstream.options import is_count
from millstream.records import Document, DocumentFault
from millstream.samples import Sample
from millstream.sampling.fair import FairTurns, shares_of
from millstream.sampling.numbers import seed_of
from millstream.streams.base import After, At, Pair, State, Stream, beside, inner, stream_of

T = TypeVar("T")
EXHAUSTED = ("stop", "drop", "repeat")
"""What may become of a mixture one of whose streams has ended."""


def _each_once(name: str, streams: Sequence[Iterable[Any]]) -> Sequence[Iterable[Any]]:
    """The streams; raises RequestError if there are none, or if one that can be read only once stands there twice.

    Of a mapping the names would be taken for streams, of a stream its items.
    """
    if not isinstance(streams, Sequence) or isinstance(streams, str):
        raise RequestError(f"{name} takes a list of streams, not {type(streams).__name__}")
    if not streams:
        raise RequestError(f"{name} has nothing to take from: give it at least one stream")
    once = [id(stream) for stream in streams if isinstance(stream, Iterator)]
    if len(set(once)) < len(once):
        raise RequestError(f"{name} was given a stream twice, and it can be read only once: make it twice")
    return streams


# One after the other --------------------------------------------------------------------------------------------------


def chain(*streams: Iterable[T], state: State | None = None) -> Stream[T]:
    """All items of the first stream, then all of the next. A stream is opened when its turn comes, and not again.

    >>> list(chain([1, 2], "ab"))
    [1, 2, 'a', 'b']
    """
    return Stream(("chain", {}), _chained, upstreams=_each_once("chain", streams), hands_on=True, state=state)


def _chained(at: At, *upstreams: Stream[T]) -> Iterator[Pair[T]]:
    ats = [inner(at, number) for number in range(len(upstreams))]
    for number in range(at.get("number", 0) if at else 0, len(upstreams)):
        after: After = partial(inner, at, number)
        for item, after in upstreams[number].pairs(ats[number]):
            yield item, partial(_in_chain, number, ats, after)
        ats = [*ats[:number], after(), *ats[number + 1 :]]  # its end, so that one sees if it has changed since


def _in_chain(number: int, ats: list[At], after: After) -> At:
    return {"number": number, "in": [*ats[:number], after(), *ats[number + 1 :]]}


def repeat(make: Callable[..., Iterable[T]], epochs: int | None = None, *, state: State | None = None) -> Stream[T]:
    """What `make` gives, anew for each of so many epochs; without `epochs` there is no end.

    `make` is a function that makes the streams of an epoch, and is told its number, from 0 on, if it has a parameter
    `epoch` or one without a default. What can be read only once, as a generator or a stream, cannot be repeated; a list
    can, as it stands.

    >>> list(repeat(lambda epoch: [epoch, "a"], 2)), list(repeat([1, 2], 2))
    ([0, 'a', 1, 'a'], [1, 2, 1, 2])
    """
    if isinstance(make, Iterator):
        what = "a stream" if isinstance(make, Stream) else f"a {type(make).__name__}"
        raise RequestError(f"{what} can be read only once: give repeat a function that makes it, lambda: read(...)")
    if epochs is not None and not is_count(epochs):
        raise RequestError(f"epochs={epochs} does not work: give at least 1, or None for no end")
    epochs = epochs if epochs is None else int(epochs)
    return _Epochs(_told_epoch(make) if callable(make) else partial(_same, make), epochs, state)


class _Epochs(Stream[T]):
    """The streams of each epoch, of which the first stands for how all are made."""

    def __init__(self, make: Callable[[int], Iterable[T]], epochs: int | None, state: State | None) -> None:
        self._make = make
        self._left: list[Stream[T]] = []
        pairs = partial(_repeated, make, epochs, self._left)
        super().__init__(("repeat", {"epochs": epochs}), pairs, upstream=make(0), hands_on=True, state=state)

    def check(self, at: At) -> None:
        """A place is one of its own epoch, which may read other files than the first."""
        epoch = at.get("epoch", 0) if at else 0
        if epoch:
            self._checked = True
            stream_of(self._make(epoch)).check(inner(at))
        else:
            super().check(at)

    @property
    def faults(self) -> list[DocumentFault]:
        return [fault for stream in self._left for fault in stream.faults]

    @property
    def left_out(self) -> int:
        return sum(stream.left_out for stream in self._left)


def _told_epoch(make: Callable[..., Iterable[T]]) -> Callable[[int], Iterable[T]]:
    """`make` as a function of the epoch's number."""
    try:
        parameters = inspect.signature(make).parameters.values()
    except ValueError:  # of some built-in ones nobody knows
        return partial(_untold, make)
    wanted = [
        parameter
        for parameter in parameters
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD)
        and (parameter.name == "epoch" or parameter.default is parameter.empty)
    ]
    return make if wanted else partial(_untold, make)


def _untold(make: Callable[[], Iterable[T]], epoch: int) -> Iterable[T]:
    return make()


def _same(items: Iterable[T], epoch: int) -> Iterable[T]:
    return items


def _repeated(
    make: Callable[[int], Iterable[T]], epochs: int | None, left: list[Stream[T]], at: At, first: Stream[T]
) -> Iterator[Pair[T]]:
    """`left` gets the streams of epochs that have left something out, and that of the present one."""
    epoch, place = at.get("epoch", 0) if at else 0, inner(at)
    while epochs is None or epoch < epochs:
        found = place is not None
        with closing(stream_of(make(epoch)) if epoch else first) as stream:
            left[:] = [*(before for before in left if before.left_out), stream]
            for item, after in stream.pairs(place):
                found = True
                yield item, partial(beside, after, epoch=epoch)
        if not found and epochs is None:
            raise RequestError(
                f"epoch {epoch} has no items, and so repeat has no end: give a function that makes a new stream"
                " for each epoch"
            )
        epoch, place = epoch + 1, None


# In step --------------------------------------------------------------------------------------------------------------


def zip(*streams: Iterable[Any], strict: bool = False, state: State | None = None) -> Stream[tuple[Any, ...]]:
    """An item of each stream, as a tuple, until the shortest ends; with `strict` the others must end there too.

    >>> list(zip([1, 2, 3], "ab"))
    [(1, 'a'), (2, 'b')]
    """
    pairs = partial(_zipped, strict)
    return Stream(("zip", {}), pairs, upstreams=_each_once("zip", streams), state=state)


def _zipped(strict: bool, at: At, *upstreams: Stream[Any]) -> Iterator[Pair[tuple[Any, ...]]]:
    sources = [upstream.pairs(inner(at, number)) for number, upstream in enumerate(upstreams)]
    while True:
        items, afters = [], []
        for source in sources:
            for item, after in source:
                items.append(item)
                afters.append(after)
                break
            else:
                if strict:
                    _refuse_uneven(len(items), sources)
                return
        yield tuple(items), partial(_in_each, afters)


def _refuse_uneven(ended: int, sources: Sequence[Iterator[Any]]) -> None:
    """Raises DataError unless all streams end here; before number `ended`, which does, none has."""
    longer = 0 if ended else next((number for number, source in enumerate(sources) if next(source, None)), None)
    if longer is not None:
        raise DataError(f"zip(..., strict=True): stream {ended} has ended, and stream {longer} has more")


def _in_each(afters: list[After]) -> At:
    return {"in": [after() for after in afters]}


# By weight ------------------------------------------------------------------------------------------------------------


class Mix(Stream[T]):
    """A mixture of streams; `given` has the ids taken from each of them so far."""

    def __init__(
        self,
        own: tuple[str, Mapping[str, Any]],
        upstreams: Sequence[Iterable[T]],
        given: list[int],
        state: State | None,
    ) -> None:
        self.given = given
        pairs = partial(_mixed, own[1]["weights"], own[1]["seed"], own[1]["exhausted"], given)
        super().__init__(own, pairs, upstreams=upstreams, hands_on=True, state=state)
        if self._start:
            given[:] = self._start.get("given", given)

    def proportions(self) -> list[float]:
        """What part of all ids came from each stream."""
        return shares_of(self.given)


def mix(
    streams: Sequence[Iterable[T]],
    weights: Sequence[float],
    seed: int = 0,
    *,
    exhausted: str = "stop",
    state: State | None = None,
) -> Mix[T]:
    """Items of several streams, so that at any point each has given ids by its weight, to within one item.

    An array, a list or a sample counts with its ids, a document, a string or a row with its letters, anything else as
    one, and what is empty too.
    Nothing is drawn by lot: a stream's next item comes when its share is due, and within that bound the seed decides
    (`millstream.sampling.fair` says how). To know what is due, it holds the next item of each.

    When a stream has ended: "stop" ends the mixture, "drop" goes on with the others, by their weights, and "repeat"
    begins it anew; then each is given as `repeat` takes it, as a function that makes it or as a list.

    >>> mixed = mix([["aa", "aa", "aa"], ["b", "b", "b", "b"]], [2, 1])
    >>> [next(mixed) for _ in range(4)], mixed.given, mixed.proportions()
    (['aa', 'b', 'b', 'aa'], [4, 2], [0.6666666666666666, 0.3333333333333333])
    """
    if exhausted not in EXHAUSTED:
        raise RequestError(f"exhausted {exhausted!r} does not work: give {' or '.join(map(repr, EXHAUSTED))}")
    several = _each_once("mix", streams)
    FairTurns(weights, seed=seed)  # refuses what does not work, before anything is read
    if len(weights) != len(streams):
        raise RequestError(f"{len(weights)} weights do not work for {len(streams)} streams: give one for each")
    settings = {"weights": list(map(float, weights)), "seed": seed_of(seed), "exhausted": exhausted}
    if exhausted == "repeat":
        several = [repeat(cast(Any, stream)) for stream in several]
    elif any(callable(stream) for stream in several):
        raise RequestError("mix was given a function: call it, or give exhausted='repeat'")
    return Mix(("mix", settings), several, [0] * len(streams), state)


def _mixed(
    weights: Sequence[float], seed: int, exhausted: str, given: list[int], at: At, *upstreams: Stream[T]
) -> Iterator[Pair[T]]:
    given[:] = at.get("given", [0] * len(weights)) if at else [0] * len(weights)
    turns = FairTurns(weights, seed=seed, given=given, due=at.get("due") if at else None)
    ended: list[int] = at.get("ended", []) if at else []
    afters: list[After] = [partial(inner, at, number) for number in range(len(upstreams))]
    sources = [
        iter(()) if number in ended else upstream.pairs(afters[number]()) for number, upstream in enumerate(upstreams)
    ]
    held: dict[int, Pair[T]] = {}

    def offer(number: int) -> bool:
        """Whether a stream has another item; it is held, and its size is known."""
        for pair in sources[number]:
            held[number] = pair
            turns.offer(number, size_of(pair[0]))
            return True
        turns.drop(number)
        return False

    for number in range(len(sources)):
        if not offer(number) and number not in ended:
            ended = [*ended, number]
    while held and not (ended and exhausted == "stop"):
        number = turns.take()
        item, afters[number] = held.pop(number)
        yield item, partial(_in_mix, {"given": list(given), "due": turns.due, "ended": ended}, tuple(afters))
        if not offer(number):
            ended = [*ended, number]


def _in_mix(own: dict[str, Any], afters: tuple[After, ...]) -> At:
    return {**own, "in": [after() for after in afters]}


def size_of(item: Any) -> int:
    """What an item counts in a mixture: its ids without padding, its letters, or one.

    >>> size_of([5, 6, 7]), size_of(Document("a", "text")), size_of({"prompt": "why", "turns": [{"text": "so"}]})
    (3, 4, 5)
    """
    if isinstance(item, (np.ndarray, list, str)):
        return len(item)
    if isinstance(item, Sample):
        return sum(segment.length for segment in item.segments)
    if isinstance(item, Document):
        return len(item.text)
    if isinstance(item, Mapping):
        return _letters(item)
    return len(item) if hasattr(item, "__len__") else 1


def _letters(value: object) -> int:
    """The letters of all texts in a row."""
    if isinstance(value, str):
        return len(value)
    within = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_letters, within))
