"""What every stream is: an iterator with a state, made of one stage and the streams that it takes from.

A stage gives pairs: each item with a function that tells where to go on after it. That is a JSON tree, an `At`: the
stage's own numbers, and what its upstream's item said as "in" (a list where there are several). So the numbers of two
stages never meet, a place is never relative to another one, and the last stage's `At` is the state of all of them.
"""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from millstream.errors import RequestError, ResumeRefused, RunError
from millstream.records import DocumentFault

T = TypeVar("T")
Made = TypeVar("Made", covariant=True)
At = Any
"""A JSON tree that says where a stage goes on; None is its beginning."""
After = Callable[[], At]
"""Where to go on after an item; called only if somebody wants to know."""
Pair = tuple[T, After]
State = dict[str, Any]
VERSION = 1
_NONE: Any = object()


class Pairs(Protocol[Made]):
    """A stage at work: from `at` on, or from the beginning, with the streams that it takes from."""

    def __call__(self, at: At, /, *upstreams: Any) -> Iterator[Made]: ...


class Stream(Iterator[T], Generic[T]):
    """An iterator that knows where it is.

    `state()` is a small JSON object that refers to the last item handed out, never to what was read ahead. To go on,
    build the same streams again and give it to the last one: ``pack(tokenize(read(path)), 2048, state=state)``. It goes
    to its place in files directly, and passes over what comes before in any other iterable.

    To make one, give what the stage is, as [name, {setting: value}] (settings are compared when a stream goes on; None
    for what is not told), and `pairs`, which is called with where to begin and the upstreams. A stage takes from one
    `upstream`, or from several, each a stream or any iterable. With `batches` it also hands out columns, one row an
    item, of which ``states(row)`` says where to go on after so many rows; the next stage may take these instead. Both
    are functions that can be pickled, so that a stream that has not begun can be sent to another process.

    `dtype` is that of the ids that it gives, where its items are ids of one vocabulary; a stage that only `hands_on`
    items of its upstreams, or parts of them, gives ids of the type that they give.

    A source may `check` whether what lies before a place is what it was, and raise ResumeRefused; `left_out` has what
    it passes over. If a stage has already handed out what its upstream goes on with (a part of a document, say, or of a
    window), its place also has "seen", which is like "in": up to there what its upstream gave has to be the same.
    """

    def __init__(
        self,
        own: tuple[str, Mapping[str, Any]] | None,
        pairs: Pairs[Pair[T]],
        *,
        upstream: Iterable[Any] = _NONE,
        upstreams: Sequence[Iterable[Any]] | None = None,
        batches: Pairs[Any] | None = None,
        check: Callable[[At], None] | None = None,
        left_out: "LeftOut | None" = None,
        dtype: Any = None,
        hands_on: bool = False,
        state: State | None = None,
    ) -> None:
        self._dtype, self._hands_on = dtype, hands_on
        self._several = upstreams is not None
        given = upstreams if upstreams is not None else () if upstream is _NONE else (upstream,)
        self.upstreams = tuple(map(stream_of, given))
        self._own = None if own is None else [own[0], _told(own)]
        self._pairs, self._batches = pairs, batches
        self._check, self._left_out = check, left_out
        self._checked = False
        self._taken = False
        self._items: Iterator[Pair[T]] | None = None
        self._after: After | None = None
        self._failed: Exception | None = None
        self._start: At = None
        if state is not None:
            _refuse_another(state, self.made)
            self._start = state["at"]
            self.check(self._start)

    @property
    def made(self) -> list[Any]:
        """What the stages are made of, from the source to this one; of several upstreams each has a list of its own."""
        within = [upstream.made for upstream in self.upstreams]
        if self._own is None:
            return []
        return [[*self._own, within]] if self._several else [*itertools.chain(*within), self._own]

    @property
    def dtype(self) -> Any:
        """That of its ids, if they are those of `tokenize` as it gave them, all of one type; else None."""
        if not self._hands_on:
            return self._dtype
        found = [upstream.dtype for upstream in self.upstreams]
        return found[0] if all(dtype == found[0] for dtype in found) else None

    @property
    def columns(self) -> bool:
        """Whether the next stage can take `batches`."""
        return self._batches is not None

    def pairs(self, at: At = None) -> Iterator[Pair[T]]:
        """The items, each with what tells where to go on after it, for the next stage; from `at` on."""
        return self._pairs(self._take(at), *self.upstreams)

    def batches(self, at: At = None) -> Iterator[Any]:
        """The columns behind the items, for the next stage; from `at` on."""
        if self._batches is None:
            raise RequestError("this stream has no columns; it has pairs")
        return self._batches(self._take(at), *self.upstreams)

    def _take(self, at: At) -> At:
        """Where to begin; once."""
        if self._taken:
            raise RequestError("this stream has been read from already; give a new one to the next stage")
        self._taken = True
        if at is not None and not self._checked:
            self.check(at)
        return self._begin() if at is None else at

    def check(self, at: At) -> None:
        """Raises ResumeRefused if what the sources gave before a place of this stream is no longer the same."""
        self._checked = True
        if at is None:
            return
        try:
            if self._check:
                self._check(at)
            for place in (at["in"], at.get("seen")) if self.upstreams else ():
                inside = () if place is None else place if self._several else (place,)
                for upstream, its in zip(self.upstreams, inside, strict=place is not None):
                    upstream.check(its)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ResumeRefused("this state has no place of these streams: give what state() returned") from error

    @property
    def faults(self) -> list[DocumentFault]:
        """What the sources have left out so far, as they were told to; of each source the first thousand."""
        own = self._left_out.kept if self._left_out else []
        return [*itertools.chain(*(upstream.faults for upstream in self.upstreams)), *own]

    @property
    def left_out(self) -> int:
        """How many that are."""
        return sum(upstream.left_out for upstream in self.upstreams) + (self._left_out.count if self._left_out else 0)

    def _begin(self) -> At:
        """Where it begins: as its state says, or else those of its upstreams."""
        if self._start is not None:
            return self._start
        inner = [upstream._begin() for upstream in self.upstreams]
        if all(at is None for at in inner):
            return None
        return {"in": inner if self._several else inner[0]}

    def __iter__(self) -> "Stream[T]":
        return self

    def __next__(self) -> T:
        if self._failed:  # not StopIteration, which would say that the corpus ends here
            raise self._failed
        if self._items is None:
            self._items = self.pairs()
        try:
            item, self._after = next(self._items)
        except StopIteration:
            raise
        except BaseException as error:  # a generator that has failed is at its end, which is not that of the corpus
            self._failed = _told_again(error)
            raise
        return item

    def state(self) -> State:
        """Where the stream is."""
        return self._state_after(self._after)

    def later(self) -> Callable[[], State]:
        """What gives the `state` of now when it is called, however far the stream has gone by then; it costs nothing
        before."""
        return partial(self._state_after, self._after)

    def _state_after(self, after: After | None) -> State:
        return self.state_at(after() if after else self._begin())

    def state_at(self, at: At) -> State:
        """The state of a place of this stream."""
        return {"v": VERSION, "made": _folded(self.made), "at": _lean(at)}

    def close(self) -> None:
        """Give up what is open, in the streams within too; the next `next` raises StopIteration."""
        if self._items is not None and hasattr(self._items, "close"):
            self._items.close()
        self._taken, self._items, self._failed = True, iter(()), None
        for upstream in self.upstreams:
            upstream.close()


def _told(own: tuple[str, Mapping[str, Any]]) -> Any:
    """Settings as they come back from JSON."""
    try:
        return json.loads(json.dumps(own[1]))
    except (TypeError, ValueError) as error:
        raise RequestError(f"{own[0]} is told what JSON cannot hold, so no state could name it: {error}") from None


def _told_again(error: BaseException) -> Exception:
    """What is raised once a stream has failed: its error, or that it was interrupted."""
    if isinstance(error, Exception):
        return error
    return RunError(f"this stream was interrupted by {type(error).__name__}: make it again, and give it state()")


class LeftOut:
    """Faults of documents that a source passes over: how many, and the first ones; `tell` is told each."""

    MOST = 1000

    def __init__(self, tell: Callable[[DocumentFault], object] | None = None) -> None:
        self.kept: list[DocumentFault] = []
        self.count, self._tell = 0, tell

    def take(self, faults: Sequence[DocumentFault]) -> None:
        self.kept += faults[: self.MOST - len(self.kept)]
        self.count += len(faults)
        if self._tell:
            for fault in faults:
                self._tell(fault)


# What a stage takes from ----------------------------------------------------------------------------------------------


def stream_of(items: Iterable[T]) -> Stream[T]:
    """A stream itself; any other iterable as one, which goes on by passing over what came before."""
    if not isinstance(items, Iterable):
        raise RequestError(f"{items!r} can not be iterated, and so it is no stream")
    return items if isinstance(items, Stream) else Stream(None, partial(_counted, items), check=a_count)


def a_count(at: At) -> None:
    """Raises ValueError for a place that is no number of items."""
    if not isinstance(at, int) or at < 0:
        raise ValueError(at)


def inner(at: At, which: int | None = None) -> At:
    """Where the upstream goes on, or number `which` of several.

    >>> inner({"in": 7, "item": 3}), inner({"in": [7, None]}, 0), inner(None)
    (7, 7, None)
    """
    found = at["in"] if at else None
    return found[which] if found is not None and which is not None else found


def beside(after: After, /, **own: Any) -> At:
    """Where a stage with these numbers of its own goes on, if its upstream does `after` an item.

    >>> beside(partial(int, 7), item=3)
    {'item': 3, 'in': 7}
    """
    return {**own, "in": after()}


def _counted(items: Iterable[T], at: At) -> Iterator[Pair[T]]:
    passed, source = at or 0, iter(items)
    if passed and isinstance(items, Sequence):
        found, source = len(items), map(items.__getitem__, range(passed, len(items)))
    else:
        found = sum(1 for _ in itertools.islice(source, passed))
    if found < passed:
        raise ResumeRefused(f"the iterable has {found:,} items; the state was taken after {passed:,}")
    for number, item in enumerate(source, passed + 1):
        yield item, number.__index__  # as quick as anything that gives the number when it is called


# Whether a state is of these streams ----------------------------------------------------------------------------------


_NO_STATE = "this is no state of a stream of this version: give what state() returned"


def _refuse_another(state: State, made: list[Any]) -> None:
    """Raises ResumeRefused for a state of other streams, and names what differs."""
    if isinstance(state, Mapping) and "within" in state:
        raise ResumeRefused("this state is of an earlier version, whose streams kept their place otherwise: begin anew")
    if not isinstance(state, Mapping) or state.get("v") != VERSION or not {"made", "at"} <= state.keys():
        raise ResumeRefused(_NO_STATE)
    try:
        _compare(_unfolded(state["made"]), made)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ResumeRefused(_NO_STATE) from error


def _lean(at: At) -> At:
    """A place that has "seen" tells it only where it differs from "in", as most streams of a mixture have stood still.

    >>> _lean({"in": {"in": [5, {"in": 7}], "n": 1}, "seen": {"in": [5, {"in": 8}], "n": 2}})
    {'in': {'in': [5, {'in': 7}], 'n': 1}, 'seen': {'in': [None, {'in': 8}], 'n': 2}}
    """
    if isinstance(at, list):
        return [_lean(one) for one in at]
    if not isinstance(at, dict) or "in" not in at:
        return at
    place = _lean(at["in"])
    seen = {"seen": _unlike(_lean(at["seen"]), place)} if "seen" in at else {}
    return {**at, "in": place, **seen}


def _unlike(seen: At, place: At) -> At:
    if seen == place:
        return None
    if isinstance(seen, list) and isinstance(place, list):
        return [_unlike(*both) for both in zip(seen, place, strict=True)]
    if isinstance(seen, dict) and "in" in seen and isinstance(place, dict):
        return {**seen, "in": _unlike(seen["in"], place.get("in"))}
    return seen


def _folded(made: list[Any]) -> list[Any]:
    """Of upstreams that are made as the one before them a state says None, as many corpora are read alike."""
    return [[*stage[:2], *(_alike([_folded(one) for one in several]) for several in stage[2:])] for stage in made]


def _alike(several: list[Any]) -> list[Any]:
    return [None if number and one == several[number - 1] else one for number, one in enumerate(several)]


def _unfolded(made: list[Any]) -> list[Any]:
    """
    >>> made = [["mix", {"seed": 1}, [[["read", {}]], [["read", {}]], [], []]], ["pack", {}]]
    >>> _folded(made)
    [['mix', {'seed': 1}, [[['read', {}]], None, [], None]], ['pack', {}]]
    >>> _unfolded(_folded(made)) == made
    True
    """
    return [[*stage[:2], *(_each_of(several) for several in stage[2:])] for stage in made]


def _each_of(several: list[Any]) -> list[Any]:
    found: list[Any] = []
    for one in several:
        found.append(found[-1] if one is None else _unfolded(one))
    return found


def _compare(before: Any, now: list[Any]) -> None:
    was, is_now = _names(before), _names(now)
    if was != is_now:
        raise ResumeRefused(f"this state is of {was}, and these streams are {is_now}")
    for (_, settings, *inside), (name, set_now, *inside_now) in zip(before, now, strict=True):
        for key in {**set_now, **settings}:
            if settings.get(key) != set_now.get(key):
                told = f"{key} was {settings.get(key)!r} and is {set_now.get(key)!r} now"
                raise ResumeRefused(f"this state is of another {name}: {told}")
        for of_one, of_one_now in zip(itertools.chain(*inside), itertools.chain(*inside_now), strict=True):
            _compare(of_one, of_one_now)


def _names(made: Any) -> str:
    """What streams are made of, in words.

    >>> _names([["zip", {}, [[["read", {}]], []]], ["pack", {}]])
    'zip(read, items) → pack'
    """
    told = [f"{name}({', '.join(map(_names, inside[0]))})" if inside else str(name) for name, _, *inside in list(made)]
    return " → ".join(told) or "items"
