"""Samples of exactly N ids, and pieces of at most N, as streams."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np

from millstream.errors import DataError, RequestError, ResumeRefused
from millstream.options import Kind, is_count, misfits
from millstream.records import Ids, LearnedIds, ids_and_learned, with_learned
from millstream.samples import Sample, Segments
from millstream.stream.bestfit import WINDOW
from millstream.stream.line import KINDS, Line, Strategy
from millstream.stream.overlong import Overlong, too_many
from millstream.stream.pack import Packed, Remainder
from millstream.streams.base import After, At, Pair, State, Stream, inner
from millstream.streams.columns import Tokens, Where, behind, filled, token_batch


def split(ids: Iterable[Any], seq_len: int, *, overlong: str = "cut", state: State | None = None) -> Stream[Ids]:
    """Each document's ids in pieces of at most `seq_len`, never two documents in one piece.

    `ids`: a `tokenize` stream or any iterable of lists or arrays of ids. `overlong` as in `pack`.

    >>> [piece.tolist() for piece in split([[1, 2, 3], [], [4, 5]], 2)]
    [[1, 2], [3], [4, 5]]
    """
    packing = _Packing(Strategy("split", seq_len), "drop", overlong)
    own = ("split", {"seq_len": seq_len, "overlong": overlong})
    return Stream(own, packing.pieces, upstream=ids, hands_on=True, state=state)


def pack(
    ids: Iterable[Any],
    seq_len: int,
    *,
    strategy: str = "concat",
    remainder: str = "keep",
    pad_id: int | None = None,
    pad_side: str = "right",
    window: int = WINDOW,
    max_segments: int | None = None,
    shuffle: int | None = None,
    shuffle_window: int | None = None,
    overlong: str = "cut",
    state: State | None = None,
) -> Stream[Sample]:
    """Samples of exactly `seq_len` ids: documents joined in order and cut every `seq_len` ids.

    `ids`: a `tokenize` stream or any iterable of lists or arrays of ids. The ids left over at the end are handed out
    last as a shorter sample (``remainder="keep"``, its `complete` is False), padded with `pad_id`, or dropped.

    ``strategy="best-fit"`` cuts no document that fits into a sample. It reads `window` ids ahead, places documents so
    that little has to be padded (with `pad_id`), at most `max_segments` in a sample, and leaves nothing over.
    ``strategy="split"`` puts no two documents into one sample. `shuffle` is a seed: documents come in another order,
    shuffled within `shuffle_window` ids (by default `window`).

    What becomes of a document of more than `seq_len` ids is `overlong`: "cut", as the strategy does; "truncate" keeps
    its first `seq_len` ids, and the last is its EOS again if `tokenize` put one there; "drop" leaves it out; "fault"
    raises DataError.

    >>> [s.token_ids.tolist() for s in pack([[1, 2, 3], [], [4, 5]], 2)]
    [[1, 2], [3, 4], [5]]
    >>> [s.token_ids.tolist() for s in pack([[1, 2, 3], [], [4, 5]], 2, remainder="pad", pad_id=0)]
    [[1, 2], [3, 4], [5, 0]]
    >>> [s.token_ids.tolist() for s in pack([[1, 2, 3], [4, 5, 6], [7], [8]], 4, strategy="best-fit", pad_id=0)]
    [[1, 2, 3, 7], [4, 5, 6, 8]]
    """
    how = Strategy(
        strategy,
        seq_len,
        pad_id=0 if pad_id is None else pad_id,
        pad_side=pad_side,
        window=window,
        max_segments=max_segments,
        shuffle=shuffle,
        shuffle_window=shuffle_window or window,
    )
    packing = _Packing(how, remainder, overlong)
    if pad_id is None and (remainder == "pad" or strategy != "concat"):
        what = f"strategy={strategy!r}" if strategy != "concat" else "remainder='pad'"
        raise RequestError(f"{what} needs a pad_id")
    return Stream(("pack", packing.settings), packing.samples, upstream=ids, state=state)


_AN_ID = Kind(lambda pad: is_count(pad, 0) and pad <= 0xFFFFFFFF, "give an id, from 0 to 4,294,967,295")


@dataclass(frozen=True)
class _Packing:
    """What becomes of ids."""

    how: Strategy
    remainder: str
    overlong: str

    def __post_init__(self) -> None:
        told = {**dataclasses.asdict(self.how), "strategy": self.how.name}
        told |= {"remainder": self.remainder, "overlong": self.overlong}
        for name, value, want in misfits({**KINDS, "pad_id": _AN_ID}, told):
            raise RequestError(f"{name} {value!r} does not work: {want}")
        plain: dict[str, Any] = {
            name: int(value) for name, value in told.items() if isinstance(value, Integral)
        }  # of numpy, too
        object.__setattr__(self, "how", dataclasses.replace(self.how, **plain))

    @property
    def settings(self) -> dict[str, Any]:
        how = dataclasses.asdict(self.how)
        return {"strategy": how.pop("name"), **how, "remainder": self.remainder, "overlong": self.overlong}

    def pieces(self, at: At, ids: Stream[Any]) -> Iterator[Pair[Ids]]:
        for sample, after in self.samples(at, ids):
            if sample.loss is not None:
                raise RequestError(
                    "split gives ids alone, without what is learned: pack(..., strategy='split') has both"
                )
            yield sample.token_ids[: sum(segment.length for segment in sample.segments)], after

    def samples(self, at: At, ids: Stream[Any]) -> Iterator[Pair[Sample]]:
        """`at` is that of a `Line`: its "in" is where the documents go on that it is to be fed.

        "seen" is up to where samples before have taken of what follows; "of", how many documents it was if the end of
        the input closed the window that they are of.
        """
        if at and at.get("end"):
            if next(ids.pairs(inner(at)), None):
                raise ResumeRefused("the input has grown, and the last sample was what was left over at its end")
            return
        line: Line | None = None
        plain: np.dtype[Any] | None = None
        fed = _Fed(at)
        for tokens in _id_batches(at, ids):
            plain = tokens.plain
            if line is None:
                self._refuse_other_padding(plain or tokens.batch.ids.dtype)
                line = Line(self.how, tokens.batch.ids.dtype, at)
            batch = Overlong(self.overlong, self.how.seq_len, tokens.eos).feed(tokens.batch)
            bad = np.flatnonzero(batch.cut_off)[:1].tolist() if self.overlong == "fault" else []
            # Samples before such a document are handed out first.
            where = fed.take(tokens)
            yield from self._apart(line.feed(batch.rows(0, bad[0]) if bad else batch, where), fed, plain)
            if bad:
                told = too_many(int(batch.cut_off[bad[0]]), self.how.seq_len)
                raise DataError(f"document {batch.ordinal[bad[0]]}: {told}")
        fed.end()
        if line is None:
            return
        yield from self._apart(line.flush(), fed, plain)
        rest = line.finish()
        if len(rest.ids) and self.remainder != "drop":
            yield self._last(rest, plain), fed.at_end

    def _refuse_other_padding(self, dtype: "np.dtype[Any]") -> None:
        largest = np.iinfo(dtype).max
        if self.how.pad_id > largest:
            raise RequestError(f"pad_id {self.how.pad_id} does not work: these ids are at most {largest:,}")

    def _apart(self, some: Iterator[Packed], fed: "_Fed", plain: "np.dtype[Any] | None") -> Iterator[Pair[Sample]]:
        """One sample after the other."""
        for packed in fed.followed(some):
            bounds = np.searchsorted(packed.segments["sample"], np.arange(len(packed.ids) + 1))
            ids, loss = _with_loss(packed.ids, plain)
            state = partial(fed.place, packed.state, fed.reached, fed.ended)
            for row, sample_ids in enumerate(ids):
                segments = Segments(packed.segments[bounds[row] : bounds[row + 1]])
                left = self.how.seq_len - int(segments.length.sum()) if self.how.pad_side == "left" else 0
                sample = Sample(sample_ids, segments, pad_left=left, loss=None if loss is None else loss[row])
                yield sample, partial(state, packed.first + row + 1)

    def _last(self, rest: Remainder, plain: "np.dtype[Any] | None") -> Sample:
        """What is left over at the end, as a sample."""
        n = self.how.seq_len
        segments, full, left = Segments(rest.segments), rest.ids, 0
        if self.remainder == "pad":
            left = n - len(rest.ids) if self.how.pad_side == "left" else 0
            full = np.full(n, self.how.pad_id, rest.ids.dtype)
            full[left : left + len(rest.ids)] = rest.ids
        ids, loss = _with_loss(full, plain)
        return Sample(ids, segments, len(ids) == n, left, loss)


class _Spot(NamedTuple):
    """Before row `row` of a batch; `number` counts documents since the stream began."""

    tokens: Tokens
    row: int
    number: int

    @property
    def place(self) -> At:
        return self.tokens.states(self.row)


class _Fed:
    """Documents that a `Line` was fed with, and up to which of them what it hands out depends on them."""

    def __init__(self, at: At) -> None:
        self._count = 0
        self._follows = False
        self._last: _Spot | None = None
        self._of: int | None = at.get("of") if at else None
        self.reached: _Spot | None = None
        self.ended = False

    def take(self, tokens: Tokens) -> Where:
        """The next batch; what the line is to be told of its places, which are found out only if they are wanted."""
        where = partial(self._where, tokens, self._count)
        self._count += len(tokens.batch)
        self._last = _Spot(tokens, len(tokens.batch), self._count)
        self._compare(more=True)
        return where

    def end(self) -> None:
        """There are no more."""
        self._compare(more=False)
        self.reached, self.ended = self._last, True

    def at_end(self) -> At:
        """The place behind what is left over."""
        return {"in": inner(self.reached.place) if self.reached else None, "end": True}

    def _compare(self, *, more: bool) -> None:
        if self._of is not None and (self._count > self._of or (self._count < self._of and not more)):
            now = "more" if more else f"{self._count:,}"
            raise ResumeRefused(
                f"the input ended with a window of {self._of:,} documents, of which samples were handed out; there are "
                f"{now} now, so that it would be another window"
            )

    def _where(self, tokens: Tokens, before: int, row: int) -> dict[str, Any]:
        spot = _Spot(tokens, row, before + row)
        if self._follows and (self.reached is None or spot.number > self.reached.number):
            self.reached = spot
        return {"spot": spot}

    def followed(self, some: Iterator[Packed]) -> Iterator[Packed]:
        """While a line makes samples it asks for the places where its windows begin and end."""
        while True:
            self._follows = True
            packed = next(some, None)
            self._follows = False
            if packed is None:
                return
            yield packed

    def place(self, state: Callable[[int], dict[str, Any]], reached: _Spot | None, ended: bool, number: int) -> At:
        """The place before sample `number`."""
        found = state(number)
        spot: _Spot = found.pop("spot")
        at = {**spot.place, **found}
        if found["used"] and (reached is None or reached.number <= spot.number):
            reached = spot._replace(row=spot.row + 1, number=spot.number + 1)
        if reached and reached.number > spot.number and (found["used"] or found["drop"] or found.get("rows")):
            at["seen"] = inner(reached.place)
            if ended:
                at["of"] = reached.number - spot.number
        return at


def _with_loss(ids: Ids, plain: "np.dtype[Any] | None") -> tuple[Ids, Ids | None]:
    """(ids, which of them are to be learned, or None for all)."""
    return ids_and_learned(ids, plain) if plain else (ids, None)


def _id_batches(at: At, ids: Stream[Any]) -> Iterator[Tokens]:
    """What a `Line` is fed with, each with the place before each of its documents."""
    begin: After = partial(inner, at)
    if ids.columns:
        for batch in ids.batches(inner(at)):
            if not isinstance(batch, Tokens):
                raise RequestError("these are documents, not ids: put tokenize(...) between")
            yield Tokens(batch.batch, partial(_at_document, batch), batch.plain, batch.eos)
        return
    eos, dtype = _eos_of(ids.made), ids.dtype or np.dtype(np.uint32)
    masked = True if _is_chat(ids.made) else None
    ordinal = at.get("document", 0) if at else 0
    for pairs in filled(ids.pairs(inner(at)), _bytes_of_ids):
        items = [item for item, _ in pairs]
        masked = _masked(items, masked)
        arrays = items if masked else list(map(_ids_of, items))
        length = np.fromiter(map(len, arrays), np.int64, len(arrays))
        names = [str(ordinal + number) for number in range(len(pairs))]
        states = behind(begin, pairs)
        flat = _of_type(np.concatenate(arrays), dtype)
        if masked:
            flat = with_learned(flat, np.concatenate([item.learned for item in items]))
        tokens = token_batch(flat, length, ordinal, names)
        yield Tokens(tokens, partial(_numbered, states, ordinal), dtype if masked else None, eos)
        ordinal, begin = ordinal + len(pairs), pairs[-1][1]


def _masked(items: list[Any], before: bool | None) -> bool:
    """Whether these say what is learned of them, as those before did, or did not; None: nobody knows that yet."""
    for item in items:
        found = isinstance(item, LearnedIds)
        if (found and item.learned is None) or found != (found if before is None else before):
            raise RequestError(
                "some documents do not say what is learned of them: tokenize all of them with chat=True, and hand its "
                "ids on as they are; a text is a row with an empty prompt, and itself as the completion"
            )
        before = found
    return bool(before)


def _of_type(flat: Ids, dtype: "np.dtype[Any]") -> Ids:
    """What `tokenize` gives is of this type already, but in a later epoch another one may stand in its place."""
    if flat.dtype != dtype and len(flat) and int(flat.max()) > np.iinfo(dtype).max:
        raise DataError(f"id {int(flat.max()):,} is not of the vocabulary of the ids before, which are {dtype}")
    return flat.astype(dtype, copy=False)


def _bytes_of_ids(pair: Pair[Any]) -> int:
    """About; what has no length is refused where it is looked at."""
    return 4 * len(pair[0]) if hasattr(pair[0], "__len__") else 0


def _eos_of(made: list[Any]) -> int | None:
    """What `tokenize` put behind each document, if it did so wherever these come from."""
    found: int | None = None
    for name, settings, *inside in made:
        if name == "tokenize":
            found = settings.get("eos")
        elif inside:
            ends = {_eos_of(upstream) for upstream in inside[0]}
            found = ends.pop() if len(ends) == 1 else None
    return found


def _is_chat(made: list[Any]) -> bool:
    """Whether there are conversations among the documents."""
    return any(
        (name == "tokenize" and bool(settings.get("chat"))) or any(map(_is_chat, inside[0] if inside else ()))
        for name, settings, *inside in made
    )


def _at_document(batch: Tokens, row: int) -> At:
    return {"in": batch.states(row)}


def _numbered(states: Where, ordinal: int, row: int) -> At:
    return {"in": states(row), "document": ordinal + row}


def _ids_of(item: Any) -> Ids:
    """One document's ids as unsigned integers; raises DataError for anything but whole numbers from 0 to 2^32 - 1."""
    try:
        array = np.asarray(item)
    except ValueError:  # lists of several lengths in it
        array = np.asarray(item, object).reshape(1, -1)
    if (
        array.ndim == 1 and array.dtype.kind == "u" and array.itemsize <= 4
    ):  # as `tokenize` gives them: nothing can be wrong
        return array
    if array.ndim != 1:
        raise DataError(f"a document's ids must be a flat list of integers, not {type(item).__name__} {item!r:.60}")
    if not len(array):
        return np.zeros(0, np.uint32)
    if array.dtype.kind not in "iu":
        raise DataError(f"ids must be integers, not {array.dtype} ({item!r:.60})")
    if int(array.min()) < 0 or int(array.max()) > 0xFFFFFFFF:
        raise DataError(f"ids must be from 0 to 4,294,967,295: {int(array.min())} to {int(array.max())}")
    return array.astype(np.uint32)
