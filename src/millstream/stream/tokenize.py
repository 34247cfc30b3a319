"""Documents to token ids, a batch at a time, and the comparison with a reference engine."""

import unicodedata
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from millstream.errors import EngineMismatch, RequestError, Unusable, setting
from millstream.records import LEARNED, Ids
from millstream.stream.chat import Rendered
from millstream.stream.encoders import HuggingFace, TokenizerEngine
from millstream.stream.tokenizers import Tokenizer


def surround(
    ids: Ids,
    lengths: Ids,
    bos: int | None = None,
    eos: int | None = None,
    opened: bool = False,
    open: bool = False,
) -> tuple[Ids, Ids]:
    """BOS before and EOS after every document that has ids: the new flat ids and lengths (i64).

    `opened`: the first document goes on with an earlier one, so it gets no BOS; `open`: the last one goes on later, so
    it gets no EOS.

    >>> import numpy as np
    >>> surround(np.array([15496, 995]), np.array([2, 0]), eos=50256)
    (array([15496,   995, 50256]), array([3, 0]))
    """
    if bos is None and eos is None:
        return ids, lengths
    before = np.full(len(lengths), bos is not None) & (lengths > 0)
    after = np.full(len(lengths), eos is not None) & (lengths > 0)
    if opened:
        before[:1] = False
    if open:
        after[-1:] = False
    total = lengths + before + after
    stops = np.cumsum(total)
    out = np.empty(int(total.sum()), ids.dtype)
    own = np.ones(len(out), bool)
    for value, where in ((bos, (stops - total)[before]), (eos, stops[after] - 1)):
        if value is not None:
            own[where] = False
            out[where] = value
    out[own] = ids
    return out, total


def already_there(ids: Ids, lengths: Ids, bos: int | None, eos: int | None, last: int = 1) -> tuple[int, int]:
    """(documents that begin with BOS, documents with EOS among their `last` ids), before any is put around them.

    >>> import numpy as np
    >>> already_there(np.array([1, 5, 2, 1, 2, 9]), np.array([3, 0, 3]), 1, 2, last=2)
    (2, 2)
    """
    own, stops = ids & np.uint32(LEARNED - 1), np.cumsum(lengths)
    starts = stops - lengths
    begun = 0 if bos is None else int((own[starts[lengths > 0]] == bos).sum())
    if eos is None:
        return begun, 0
    ended = np.zeros(len(lengths), bool)
    for back in range(1, last + 1):
        there = lengths >= back
        ended[there] |= own[stops[there] - back] == eos
    return begun, int(ended.sum())


def refuse_twice(ids: Ids, lengths: Ids, bos: int | None, eos: int | None) -> None:
    """Raises RequestError if conversations are rendered with the BOS or EOS that is to be put around them."""
    begun, ended = already_there(ids, lengths, bos, eos, last=2)  # a line end may follow an EOS
    for name, found in (("bos", begun), ("eos", ended)):
        if found:
            raise RequestError(
                f"the chat template writes {name.upper()} itself, and {setting(name, True)} would add a second one: "
                "leave it out"
            )


def encode_rendered(
    tokenizer: Tokenizer, found: Sequence[Rendered], engine: TokenizerEngine | None = None
) -> tuple[Ids, Ids]:
    """(ids u32 of rendered conversations, length i64 of each); LEARNED is set in those that stand for learned letters.

    An id that stands for a learned letter and others too is learned. `engine` is the tokenizer's own, or another one.

    >>> from millstream.stream.chat import Letters
    >>> from millstream.stream.tokenizers import load_tokenizer
    >>> ids, length = encode_rendered(load_tokenizer("gpt2"), [Rendered("Hello world", (Letters(5, 11),))])
    >>> (ids & (LEARNED - 1)).tolist(), (ids >= LEARNED).tolist(), length.tolist()
    ([15496, 995], [False, True], [2])
    """
    engine = engine or tokenizer.engine
    pieces = [list(_pieces(one)) for one in found]
    texts = {
        plain: [text for parts in pieces for text, is_plain in parts if is_plain is plain] for plain in (True, False)
    }
    streams = {plain: _split(*engine.encode(some, specials=not plain)) for plain, some in texts.items() if some}
    made = []
    for one, parts in zip(found, pieces, strict=True):
        ids = [next(streams[plain]) for _, plain in parts]
        whole = np.concatenate(ids) if ids else np.zeros(0, np.uint32)
        made.append(_learn(tokenizer, one, whole))
    length = np.fromiter(map(len, made), np.int64, len(made))
    return np.concatenate(made) if made else np.zeros(0, np.uint32), length


def _pieces(found: Rendered) -> Iterator[tuple[str, bool]]:
    """Its text in pieces: (text, whether special tokens in it are ordinary text)."""
    at = 0
    for start, stop in found.plain:
        if at < start:
            yield found.text[at:start], False
        yield found.text[start:stop], True
        at = stop
    if at < len(found.text):
        yield found.text[at:], False


def _split(ids: Ids, length: Ids) -> Iterator[Ids]:
    return (ids[low:high] for low, high in pairwise([0, *np.cumsum(length).tolist()]))


def _learn(tokenizer: Tokenizer, found: Rendered, ids: Ids) -> Ids:
    """`ids` with LEARNED set where they stand for learned letters."""
    if not found.learned or not len(ids):
        return ids
    learned = ids.copy()
    for first, stop in _ids_of(tokenizer, found, ids):
        learned[first:stop] |= np.uint32(LEARNED)
    return learned


def _ids_of(tokenizer: Tokenizer, found: Rendered, ids: Ids) -> Iterator[tuple[int, int]]:
    """For each span of learned letters, the first id that stands for one of them and the one after the last."""
    text, sizes = found.text, tokenizer.bytes_of
    stops = np.cumsum(sizes[ids]) if sizes is not None else np.zeros(1, np.int64)
    as_it_is = tokenizer.normalized is None or unicodedata.is_normalized("NFC", text)
    if as_it_is and int(stops[-1]) == len(text.encode()):
        at = begin = end = 0
        for start, stop in found.learned:
            begin = end + len(text[at:start].encode())
            end = begin + len(text[start:stop].encode())
            at = stop
            yield int(np.searchsorted(stops, begin, "right")), int(np.searchsorted(stops, end, "left")) + 1
        return
    # Ids do not say how much text they stand for: the reference does, slower.
    letters = _letters(tokenizer, found, ids)
    for start, stop in found.learned:
        yield int(np.searchsorted(letters[:, 1], start, "right")), int(np.searchsorted(letters[:, 0], stop, "left"))


def _letters(tokenizer: Tokenizer, found: Rendered, ids: Ids) -> Ids:
    """The letters of `found` that each id stands for, from and to before, growing."""
    engine, at, some, letters = tokenizer.reference_engine, 0, [], []
    assert isinstance(engine, HuggingFace), "the others have bytes_of, and take text as it is"
    for text, plain in _pieces(found):
        its_ids, its_letters = engine.offsets(text, specials=not plain)
        some.append(its_ids)
        letters.append(its_letters + at)
        at += len(text)
    if not np.array_equal(np.concatenate(some), ids):
        raise EngineMismatch(
            f"engine {tokenizer.engine.name} gives other ids than {engine.name} for a conversation, with tokenizer "
            f"{tokenizer.name}; {setting('engine', 'reference')} packs it all the same, slower"
        )
    return np.maximum.accumulate(np.concatenate(letters))


def like_the_last(ids: Ids, lengths: Ids) -> None:
    """Set LEARNED in the last id of every document as it is set in the one before: the EOS is learned with it."""
    stops = np.cumsum(lengths)[lengths > 1]
    ids[stops - 1] |= ids[stops - 2] & np.uint32(LEARNED)


Encoding = Callable[[TokenizerEngine, Sequence[Any]], tuple[Ids, Ids]]
"""Documents to (ids back to back, length of each) with an engine; raises Unusable if it cannot encode one of them."""


class Tried(NamedTuple):
    """Documents as ids: those of all rows but `failed`, back to back, and their lengths.

    By row, what an engine said: `failed` can be encoded by neither, `rescued` by the other one only.
    """

    ids: Ids
    length: Ids
    failed: dict[int, str]
    rescued: dict[int, str]


def attempt(
    encode: Encoding, items: Sequence[Any], engine: TokenizerEngine, other: Callable[[], TokenizerEngine | None]
) -> Tried:
    """Encode `items` with `engine`, in one call; those that it cannot encode, found one by one, with the `other`."""
    try:
        return Tried(*encode(engine, items), {}, {})
    except Unusable:
        pass
    made: list[Ids] = []
    failed: dict[int, str] = {}
    rescued: dict[int, str] = {}
    for row in range(len(items)):
        one = items[row : row + 1]
        try:
            made.append(encode(engine, one)[0])
        except Unusable as error:
            failed[row] = error.message
        if row in failed and (second := other()):
            try:
                made.append(encode(second, one)[0])
                rescued[row] = failed.pop(row)
            except Unusable as error:
                failed[row] += f"; {error.message}"
    length = np.fromiter(map(len, made), np.int64, len(made))
    return Tried(np.concatenate(made) if made else np.zeros(0, np.uint32), length, failed, rescued)


def compare(
    tokenizer: Tokenizer, reference: TokenizerEngine, encode: Encoding, items: Sequence[Any], names: Sequence[str]
) -> dict[int, str]:
    """Encode the same documents with both engines. Raises EngineMismatch, naming the first that differs.

    Those that the reference cannot encode are not compared: what it said, by row.
    """
    try:
        _compare(tokenizer, reference, encode, items, names)
        return {}
    except Unusable:
        pass
    missed = {}
    for row in range(len(items)):
        try:
            _compare(tokenizer, reference, encode, items[row : row + 1], names[row : row + 1])
        except Unusable as error:
            missed[row] = error.message
    return missed


def _compare(
    tokenizer: Tokenizer, reference: TokenizerEngine, encode: Encoding, items: Sequence[Any], names: Sequence[str]
) -> None:
    ours, our_lengths = encode(tokenizer.engine, items)
    theirs, their_lengths = encode(reference, items)
    if not (np.array_equal(our_lengths, their_lengths) and np.array_equal(ours, theirs)):
        our_stops, their_stops = np.cumsum(our_lengths), np.cumsum(their_lengths)
        for name, a, n, b, m in zip(names, our_stops, our_lengths, their_stops, their_lengths, strict=True):
            if n != m or not np.array_equal(ours[a - n : a], theirs[b - m : b]):
                raise EngineMismatch(
                    f"document {name!r}: engine {tokenizer.engine.name} gives {n} ids and {reference.name} gives {m}, "
                    f"or other ones, with tokenizer {tokenizer.name}; nothing of it was used. "
                    f"Please report the document; {setting('engine', 'reference')} packs it all the same, slower"
                )
