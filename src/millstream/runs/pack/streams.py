"""Small streams that compose: read, tokenize, split, pack, over any iterable, with a state to go on from.

Each function returns a `Stream`: an iterator with `state()` and `close()`. They compose by passing one to the next, and
inside data moves in columns, through the same readers and packers that a pack run uses.
"""

import itertools
import os
import warnings
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

import numpy as np

from millstream.errors import DataError, RequestError, ResumeRefused, Unusable, setting
from millstream.formats.corpus import Found, find_inputs, ignored_files
from millstream.formats.documents import Fields, decode
from millstream.formats.kinds import fault_place
from millstream.formats.parquet import check_columns
from millstream.formats.slices import Limits, slices, units
from millstream.records import Cursor, Document, Ids, TokenBatch, unmarked
from millstream.samples import Sample, Segments
from millstream.stream.bestfit import WINDOW
from millstream.stream.encoders import Engine
from millstream.stream.line import STRATEGIES, Line, Strategy
from millstream.stream.overlong import OVERLONG, Overlong, too_many
from millstream.stream.pack import Packed, State
from millstream.stream.tokenize import Attempt, attempt, encode_rendered, like_the_last, refuse_twice, surround
from millstream.stream.tokenizers import load_tokenizer

T = TypeVar("T")
_BATCH_BYTES = 4 << 20
_MAX_DOCUMENT = 32 << 20


class _Texts:
    """A batch of documents in columns; `states[i]` is where reading goes on after document i."""

    __slots__ = ("first", "ids", "states", "texts")

    def __init__(self, texts: list[str], ids: list[str], states: Callable[[int], State], first: int) -> None:
        self.texts, self.ids, self.states, self.first = texts, ids, states, first


class _Tokens:
    """A `TokenBatch` with `states(i)`: where reading goes on to have document i again.

    `marked`: its ids have LEARNED set where they are to be learned, and are of this type without it. `eos`: what ends
    every document that has ids, if anything does.
    """

    __slots__ = ("batch", "eos", "marked", "states")

    def __init__(
        self,
        batch: TokenBatch,
        states: Callable[[int], State],
        marked: "np.dtype[Any] | None" = None,
        eos: int | None = None,
    ) -> None:
        self.batch, self.states, self.marked, self.eos = batch, states, marked, eos


class Stream(Iterator[T], Generic[T]):
    """An iterator that knows where it is.

    `state()` is a small JSON object that refers to the last item handed out, never to what was read ahead. To go on,
    build the same streams again and give it to the last one: ``pack(tokenize(read(path)), 2048, state=state)``. It goes
    to its place in files directly, and passes over what comes before in any other iterable.
    """

    def __init__(
        self,
        batches: Callable[[State | None], Iterator[Any]],
        items: Callable[[Iterator[Any], State | None], Iterator[tuple[T, Callable[[], State]]]],
        state: State | None,
        columns: bool = True,
    ) -> None:
        self.columns = columns  # whether the next stage can take `batches` for the items: one row an item
        self._batches, self._items_of = batches, items
        self._start = state
        self._items: Iterator[tuple[T, Callable[[], State]]] | None = None
        self._state: Callable[[], State] | None = None

    def batches(self, state: State | None) -> Iterator[Any]:
        """The columns behind the items, for the next stage; from `state` on, else from this stream's own."""
        if self._items is not None:
            raise RequestError("this stream has been read from already; give a new one to the next stage")
        return self._batches(state or self._start)

    def __iter__(self) -> "Stream[T]":
        return self

    def __next__(self) -> T:
        if self._items is None:
            self._items = self._items_of(self._batches(self._start), self._start)
        item, self._state = next(self._items)
        return item

    def state(self) -> State | None:
        """Where the stream is; None before the first item of a stream that began at the beginning."""
        return self._state() if self._state else self._start

    def close(self) -> None:
        """Give up what is open; the next `next` raises StopIteration."""
        if isinstance(self._items, Iterator) and hasattr(self._items, "close"):
            self._items.close()
        self._items = iter(())


def _fixed(state: State) -> Callable[[], State]:
    return lambda: state


# read ---------------------------------------------------------------------------------------------------------------


def read(
    source: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    text_field: str = "text",
    id_field: str = "id",
    on_error: str = "stop",
    max_document: int = _MAX_DOCUMENT,
    state: State | None = None,
) -> Stream[Document]:
    """The documents of files, folders, globs, ``-`` (JSONL on standard input) or ``stdlib:``, one by one.

    JSONL, NDJSON, plain text (one document a file), Parquet, and gzip or zstd of the first two. A document that cannot
    be read raises DataError with its place, or is left out with ``on_error="skip"``. A missing id is `source#offset`.

    >>> documents = read("stdlib:")
    >>> next(documents).id
    'stdlib:__future__.py'
    """
    if on_error not in ("stop", "skip"):
        raise RequestError(f"on_error {on_error!r} does not work: give 'stop' or 'skip'")
    listed = [source] if isinstance(source, str | os.PathLike) else list(source)
    found = find_inputs(listed)
    if found.unreadable and on_error == "stop":
        raise DataError(f"cannot read {found.unreadable[0]}")
    check_columns(found.shards, (text_field,), f"name the one to read with {setting('text_field')}")
    _warn_of_the_rest(found)
    shards = found.shards
    fields = Fields(text_field, id_field)

    def batches(state: State | None) -> Iterator[_Texts]:
        cursor, ordinal, skip, line = Cursor(), 0, 0, 0
        if state:
            cursor, ordinal, skip, line = Cursor(*state["cursor"]), state["document"], state["skip"], state["line"]
        for unit in units(slices(shards, cursor, Limits(max_document), (text_field, id_field))):
            batch = decode(unit, fields, max_document)
            fault = batch.faults[0] if batch.faults and on_error == "stop" else None
            # Documents before a fault are handed out first; those that an earlier stream has handed out are not.
            good = bisect_left(batch.position, fault.ordinal) if fault else len(batch.position)
            low = bisect_left(batch.position, skip, hi=good)
            begin: State = {"cursor": list(cursor), "document": ordinal, "line": line}
            positions = batch.position[low:good]
            yield _Texts(batch.texts[low:good], batch.doc_ids[low:good], _states(begin, positions, skip), ordinal)
            lines = Counter({cursor.source: line})
            if fault:
                number = fault.line and fault.line + lines[fault.shard]
                raise DataError(f"{fault_place(fault._replace(line=number))}: {fault.message}")
            for source, count in batch.lines:
                lines[source] += count
            ordinal += batch.count
            skip = max(0, skip - batch.count)
            cursor = unit[-1].after
            line = lines[cursor.source]

    return Stream(batches, _document_items, state)


def _warn_of_the_rest(found: Found) -> None:
    """A stream has no report: what folders hold besides, other than hidden files, is a warning."""
    rest = {what: count for what, count in found.ignored_by_kind().items() if what != "hidden"}
    told = [f"cannot read {folder}" for folder in found.unreadable]
    for message in [*told, *([f"ignored {ignored_files(rest)}"] if rest else [])]:
        warnings.warn(message, stacklevel=3)


def _states(begin: State, positions: list[int], skip: int) -> Callable[[int], State]:
    """The state after `row` documents of a unit: reading goes on at its beginning and passes over what came before."""
    return lambda row: {**begin, "skip": positions[row - 1] + 1 if row else skip}


def _document_items(batches: Iterator[_Texts], state: State | None) -> Iterator[tuple[Document, Callable[[], State]]]:
    for batch in batches:
        for row, (text, name) in enumerate(zip(batch.texts, batch.ids, strict=True), 1):
            yield Document(name, text), lambda batch=batch, row=row: batch.states(row)  # type: ignore[misc]


# tokenize -----------------------------------------------------------------------------------------------------------


def tokenize(
    documents: Iterable[Any],
    tokenizer: str = "gpt2",
    *,
    bos: bool = False,
    eos: bool = False,
    text_field: str = "text",
    id_field: str = "id",
    chat: bool = False,
    state: State | None = None,
) -> Stream[Ids]:
    """Token ids of each document, as numpy arrays (uint16 if the vocabulary fits, else uint32).

    `documents`: a `read` stream or any iterable of strings, of dicts with a `text_field`, or of `Document`s.
    `tokenizer`: gpt2, a tiktoken name, a tokenizer.json, a folder with one, or a hub id.

    With `chat` they are dicts with `messages`, or `prompt` and `completion`, which the tokenizer's chat template makes
    text of; samples packed of them have a `loss` mask of what the assistant says.

    >>> next(tokenize(["Hello world"])).tolist()
    [15496, 995]
    >>> sample = next(pack(tokenize([{"prompt": "Hello", "completion": " world"}], chat=True), 2))
    >>> sample.token_ids.tolist(), sample.loss.tolist()
    ([15496, 995], [False, True])
    """
    loaded = load_tokenizer(tokenizer)
    eos_id = loaded.special_id(loaded.eos_token, "eos") if eos else None
    bos_id = loaded.special_id(loaded.bos_token, "bos") if bos else None
    if chat:
        if isinstance(documents, Stream):
            raise RequestError("chat=True wants rows with messages, and read() gives texts: give the rows themselves")
        loaded.chat.check()

    def encoding(engine: Engine, texts: Sequence[Any]) -> tuple[Ids, Ids]:
        return encode_rendered(loaded, texts, engine) if chat else engine.encode(texts)

    def reference() -> Engine | None:
        return loaded.reference_engine if loaded.reference else None

    def surrounded(found: Attempt, rows: int) -> tuple[Ids, Ids]:
        length = found.length[:rows]
        own = found.ids[: length.sum()]
        if chat:
            refuse_twice(own, length, bos_id, eos_id)
        ids, length = surround(own, length, bos_id, eos_id)
        if chat and eos:
            like_the_last(ids, length)
        return ids if chat else ids.astype(loaded.dtype), length

    def batches(state: State | None) -> Iterator[_Tokens]:
        ordinal = state["item"] if state else 0
        content = loaded.chat.render if chat else partial(_text_of, field=text_field)
        for batch in _text_batches(documents, content, id_field, state):
            found = attempt(encoding, batch.texts, loaded.engine, reference)
            good = min(found.failed, default=len(batch.texts))
            ids, length = surrounded(found, good)
            tokens = _token_batch(ids, length, ordinal, batch.ids[:good])
            yield _Tokens(tokens, _with_item(batch.states, ordinal), loaded.dtype if chat else None, eos_id)
            if found.failed:  # what came before it is handed out first
                raise DataError(f"document {batch.ids[good]!r}: {found.failed[good]}")
            ordinal += len(length)

    return Stream(batches, _id_items, state)


def _with_item(states: Callable[[int], State], ordinal: int) -> Callable[[int], State]:
    return lambda row: {**states(row), "item": ordinal + row}


def _token_batch(ids: Ids, length: Ids, ordinal: int, names: list[str]) -> TokenBatch:
    rows = np.arange(ordinal, ordinal + len(length), dtype=np.uint64)
    zeros = np.zeros(len(length), np.int64)
    return TokenBatch(ids, length, rows, zeros, names, zeros, rows)


def _id_items(batches: Iterator[_Tokens], state: State | None) -> Iterator[tuple[Ids, Callable[[], State]]]:
    for tokens in batches:
        stops, flat = np.cumsum(tokens.batch.length), tokens.batch.ids
        if tokens.marked:
            flat, _ = unmarked(flat, tokens.marked)
        for row, ids in enumerate(np.split(flat, stops[:-1]) if len(stops) else [], 1):
            yield ids, lambda tokens=tokens, row=row: tokens.states(row)  # type: ignore[misc]


def _text_batches(
    documents: Iterable[Any], content: Callable[[Any], Any], id_field: str, state: State | None
) -> Iterator[_Texts]:
    if isinstance(documents, Stream):
        yield from documents.batches(state)
        return
    ordinal = state["item"] if state else 0
    for items in _doubling(documents, ordinal, _rough_size):
        texts: list[Any] = []
        names: list[str] = []
        for number, item in enumerate(items, ordinal):
            try:
                texts.append(content(item))
            except Unusable as error:
                if texts:  # what came before it is handed out first
                    yield _Texts(texts, names, _fixed_state, ordinal)
                raise DataError(f"document {number}: {error.message}") from error
            names.append(_name_of(item, id_field, number))
        yield _Texts(texts, names, _fixed_state, ordinal)
        ordinal += len(items)


def _rough_size(item: Any) -> int:
    """Letters of text in an item, whatever it is made of."""
    text = getattr(item, "text", item)
    if isinstance(text, str):
        return len(text)
    if isinstance(item, Mapping):
        return sum(map(_rough_size, item.values()))
    return sum(map(_rough_size, item)) if isinstance(item, list | tuple) else 8


def _fixed_state(row: int) -> State:
    return {}


def _text_of(item: Any, field: str) -> str:
    text = item.get(field) if isinstance(item, Mapping) else getattr(item, "text", item)
    if not isinstance(text, str):
        what = f"field {field!r} is" if isinstance(item, Mapping) else "a document is"
        raise DataError(f"{what} not text but {type(text).__name__}")
    return text


def _name_of(item: Any, field: str, number: int) -> str:
    found = item.get(field) if isinstance(item, Mapping) else getattr(item, "id", None)
    return str(number) if found is None else str(found)


def _doubling(items: Iterable[T], skip: int, size: Callable[[T], int]) -> Iterator[list[T]]:
    """Items in lists of 1, 2, 4, ... but not much more than 4 MiB each: the first comes soon, many go fast."""
    source = iter(items)
    passed = sum(1 for _ in itertools.islice(source, skip))
    if passed < skip:
        raise ResumeRefused(f"the iterable has {passed:,} items; the state was taken after {skip:,}")
    most = 1
    while True:
        held: list[T] = []
        total = 0
        for item in itertools.islice(source, most):
            held.append(item)
            total += size(item)
            if total >= _BATCH_BYTES:
                break
        if not held:
            return
        yield held
        most *= 2


# split and pack -----------------------------------------------------------------------------------------------------


def split(ids: Iterable[Any], seq_len: int, *, overlong: str = "cut", state: State | None = None) -> Stream[Ids]:
    """Each document's ids in pieces of at most `seq_len`, never two documents in one piece.

    `ids`: a `tokenize` stream or any iterable of lists or arrays of ids. `overlong` as in `pack`.

    >>> [piece.tolist() for piece in split([[1, 2, 3], [], [4, 5]], 2)]
    [[1, 2], [3], [4, 5]]
    """
    samples = _packed(ids, Strategy("split", seq_len), "drop", overlong)

    def items(batches: Iterator[_Tokens], state: State | None) -> Iterator[tuple[Ids, Callable[[], State]]]:
        for sample, where in samples(batches, state):
            if sample.loss is not None:
                raise RequestError(
                    "split gives ids alone, without what is learned: pack(..., strategy='split') has both"
                )
            yield sample.token_ids[: sum(segment.length for segment in sample.segments)], where

    return Stream(lambda state: _id_batches(ids, state), items, state, columns=False)


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
    if strategy not in STRATEGIES:
        raise RequestError(f"strategy {strategy!r} does not work: give {' or '.join(map(repr, STRATEGIES))}")
    if remainder not in ("keep", "pad", "drop"):
        raise RequestError(f"remainder {remainder!r} does not work: give 'keep', 'pad' or 'drop'")
    if pad_id is None and (remainder == "pad" or strategy != "concat"):
        what = f"strategy={strategy!r}" if strategy != "concat" else "remainder='pad'"
        raise RequestError(f"{what} needs a pad_id")
    numbers = {"window": window, "max_segments": max_segments, "shuffle_window": shuffle_window}
    for name, number in numbers.items():
        if number is not None and number < 1:
            raise RequestError(f"{name} {number} does not work: give at least 1")
    if shuffle is not None and not 0 <= shuffle < 1 << 64:
        raise RequestError(f"shuffle {shuffle} does not work: give a seed from 0 to 2^64 - 1")
    how = Strategy(strategy, seq_len, pad_id or 0, pad_side, window, max_segments, shuffle, shuffle_window or window)
    samples = _packed(ids, how, remainder, overlong)
    return Stream(lambda state: _id_batches(ids, state), samples, state, columns=False)


def _packed(
    ids: Iterable[Any], how: Strategy, remainder: str, overlong: str
) -> Callable[[Iterator[_Tokens], State | None], Iterator[tuple[Sample, Callable[[], State]]]]:
    n = how.seq_len
    if n < 1:
        raise RequestError(f"seq_len {n} does not work: a sample needs at least one id")
    if overlong not in OVERLONG:
        raise RequestError(f"overlong {overlong!r} does not work: give {' or '.join(map(repr, OVERLONG))}")

    def samples(some: Iterator[Packed], marked: "np.dtype[Any] | None") -> Iterator[tuple[Sample, Callable[[], State]]]:
        for packed in some:
            bounds = np.searchsorted(packed.segments["sample"], np.arange(len(packed.ids) + 1))
            ids, loss = _apart(packed.ids, marked)
            for row, sample_ids in enumerate(ids):
                segments = Segments(packed.segments[bounds[row] : bounds[row + 1]])
                left = n - int(segments.length.sum()) if how.pad_side == "left" else 0
                sample = Sample(sample_ids, segments, pad_left=left, loss=None if loss is None else loss[row])
                yield sample, partial(packed.state, packed.first + row + 1)

    def items(batches: Iterator[_Tokens], state: State | None) -> Iterator[tuple[Sample, Callable[[], State]]]:
        if state and state.get("end"):
            return
        line: Line | None = None
        marked: np.dtype[Any] | None = None
        for tokens in batches:
            marked = tokens.marked
            line = line or Line(how, tokens.batch.ids.dtype, state)
            batch = Overlong(overlong, n, tokens.eos).feed(tokens.batch)
            bad = np.flatnonzero(batch.cut_off)[:1].tolist() if overlong == "fault" else []
            # Samples before such a document are handed out first.
            yield from samples(line.feed(batch.rows(0, bad[0]) if bad else batch, tokens.states), marked)
            if bad:
                raise DataError(f"document {batch.ordinal[bad[0]]}: {too_many(int(batch.cut_off[bad[0]]), n)}")
        if line is None:
            return
        yield from samples(line.flush(), marked)
        rest = line.finish()
        if len(rest.ids) and remainder != "drop":
            segments, full, left = Segments(rest.segments), rest.ids, 0
            if remainder == "pad":
                left = n - len(rest.ids) if how.pad_side == "left" else 0
                full = np.full(n, how.pad_id, rest.ids.dtype)
                full[left : left + len(rest.ids)] = rest.ids
            ids, loss = _apart(full, marked)
            yield Sample(ids, segments, len(ids) == n, left, loss), lambda: {"end": True}

    return items


def _apart(ids: Ids, marked: "np.dtype[Any] | None") -> tuple[Ids, Ids | None]:
    """(ids, which of them are to be learned, or None for all)."""
    return unmarked(ids, marked) if marked else (ids, None)


def _id_batches(ids: Iterable[Any], state: State | None) -> Iterator[_Tokens]:
    if state and state.get("end"):
        return
    if isinstance(ids, Stream) and ids.columns:
        for batch in ids.batches(state):
            if not isinstance(batch, _Tokens):
                raise RequestError("these are documents, not ids: put tokenize(...) between")
            yield batch
        return
    ordinal = state["item"] if state else 0
    for items in _doubling(ids, ordinal, lambda item: 4 * len(item)):
        arrays = [_ids_of(item) for item in items]
        length = np.fromiter(map(len, arrays), np.int64, len(arrays))
        batch = _token_batch(np.concatenate(arrays), length, ordinal, [str(ordinal + n) for n in range(len(items))])
        yield _Tokens(batch, _with_item(_fixed_state, ordinal))
        ordinal += len(items)


def _ids_of(item: Any) -> Ids:
    """One document's ids as uint32; raises DataError for anything but whole numbers from 0 to 2^32 - 1."""
    array = np.asarray(item)
    if array.ndim != 1:
        raise DataError(f"a document's ids must be a flat list of integers, not {type(item).__name__} {item!r:.60}")
    if not len(array):
        return np.zeros(0, np.uint32)
    if array.dtype.kind not in "iu":
        raise DataError(f"ids must be integers, not {array.dtype} ({item!r:.60})")
    if int(array.min()) < 0 or int(array.max()) > 0xFFFFFFFF:
        raise DataError(f"ids must be from 0 to 4,294,967,295: {int(array.min())} to {int(array.max())}")
    return array.astype(np.uint32)
