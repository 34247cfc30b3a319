"""Token ids of documents, as a stream."""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

from millstream.errors import DataError, RequestError, Unusable, setting
from millstream.options import is_count, size_of
from millstream.records import Document, Ids, LearnedIds, ids_and_learned
from millstream.stream.encoders import TokenizerEngine
from millstream.stream.tokenize import Tried, attempt, encode_rendered, like_the_last, refuse_twice, surround
from millstream.stream.tokenizers import Tokenizer, load_tokenizer
from millstream.streams.ahead import Unit, encoded_ahead
from millstream.streams.base import After, At, Pair, State, Stream, inner
from millstream.streams.columns import Texts, Tokens, Where, apart, behind, filled, token_batch


def tokenize(
    documents: Iterable[Any],
    tokenizer: str = "gpt2",
    *,
    bos: bool = False,
    eos: bool = False,
    text_field: str = "text",
    id_field: str = "id",
    chat: bool = False,
    workers: int = 1,
    ahead: str | int = "64MiB",
    state: State | None = None,
) -> Stream[Ids]:
    """Token ids of each document, as numpy arrays (uint16 if the vocabulary fits, else uint32).

    `documents`: a `read` stream or any iterable of strings, of dicts with a `text_field`, or of `Document`s.
    `tokenizer`: gpt2, a tiktoken name, a tokenizer.json, a folder with one, or a hub id.

    With `chat` they are dicts with `messages`, or `prompt` and `completion`, as ``read(chat=True)`` gives them, which
    the tokenizer's chat template makes text of; samples packed of them have a `loss` mask of what the assistant says.
    Until then each array of ids has it, as `learned`.

    With several `workers`, as many processes tokenize `ahead` of whoever takes the ids; about so many bytes of text are
    with them, or tokenized and not taken. Ids and states are the same with any number of them.

    >>> next(tokenize(["Hello world"])).tolist()
    [15496, 995]
    >>> from millstream.streams.pack import pack
    >>> sample = next(pack(tokenize([{"prompt": "Hello", "completion": " world"}], chat=True), 2))
    >>> sample.token_ids.tolist(), sample.loss.tolist()
    ([15496, 995], [False, True])
    """
    if isinstance(documents, str | bytes):  # each of its letters would be a document
        raise RequestError("this is one text, not documents: give [text], or read(path) for the documents of a file")
    encoding = _Encoding(tokenizer, bos=bos, eos=eos, chat=chat, text_field=text_field, id_field=id_field)
    work = _Work(encoding, workers, ahead)
    own = ("tokenize", encoding.settings)
    return Stream(own, work.ids, upstream=documents, batches=work.batches, dtype=encoding.dtype, state=state)


_ROWS = "these are conversations: tokenize(..., chat=True)"


class _Encoded(NamedTuple):
    """Documents as ids, back to back, up to the first that cannot be encoded; what is wrong with that one, if any."""

    ids: Ids
    length: Ids
    failed: str | None


class _Encoding:
    """Texts to ids; sent to another process it loads its tokenizer again there."""

    def __init__(self, name: str, *, bos: bool, eos: bool, chat: bool, text_field: str, id_field: str) -> None:
        self.made = partial(_Encoding, name, bos=bos, eos=eos, chat=chat, text_field=text_field, id_field=id_field)
        self._loaded = loaded = load_tokenizer(name)
        self.eos = loaded.special_id(loaded.eos_token, "eos") if eos else None
        self._bos = loaded.special_id(loaded.bos_token, "bos") if bos else None
        self._chat, self._text_field, self._id_field = chat, text_field, id_field
        if chat:
            loaded.chat.check()
        self.dtype = loaded.dtype
        self.plain = loaded.dtype if chat else None
        self.sha256 = loaded.sha256
        self.settings = {
            "tokenizer": loaded.name,
            "sha256": loaded.sha256,
            "bos": self._bos,
            "eos": self.eos,
            "text_field": text_field,
            "chat": _template_of(loaded) if chat else None,
        }

    def __reduce__(self) -> tuple[Any, ...]:
        return self.made, ()

    def texts(self, at: At, ordinal: int, documents: Stream[Any]) -> Iterator[Texts]:
        """The documents in columns."""
        return self._as_columns(at, documents) if documents.columns else self._gathered(at, ordinal, documents)

    def encoded(self, texts: list[Any]) -> _Encoded:
        found = attempt(self._encode, texts, self._loaded.engine, self._reference)
        good = min(found.failed, default=len(texts))
        return _Encoded(*self._surrounded(found, good), found.failed.get(good))

    def _as_columns(self, at: At, documents: Stream[Any]) -> Iterator[Texts]:
        for batch in documents.batches(inner(at)):
            if not isinstance(batch, Texts):
                raise RequestError("these are ids already, not documents: leave tokenize(...) out")
            if batch.texts and isinstance(batch.texts[0], Mapping) != self._chat:
                told = "chat=True wants rows with messages: read(..., chat=True)" if self._chat else _ROWS
                raise RequestError(told)
            yield from self._rendered(batch) if self._chat else [batch]

    def _rendered(self, batch: Texts) -> Iterator[Texts]:
        texts: list[Any] = []
        for row, name in zip(batch.texts, batch.ids, strict=True):
            try:
                texts.append(self._content(row))
            except Unusable as error:
                yield Texts(texts, batch.ids[: len(texts)], batch.states)  # what came before it is handed out first
                raise DataError(f"document {name!r}: {error.message}") from error
        yield Texts(texts, batch.ids, batch.states)

    def _gathered(self, at: At, ordinal: int, documents: Stream[Any]) -> Iterator[Texts]:
        """Items in columns."""
        begin: After = partial(inner, at)
        for pairs in filled(documents.pairs(inner(at)), _rough_size_of_pair):
            texts: list[Any] = []
            names: list[str] = []
            states = behind(begin, pairs)
            for number, (item, _) in enumerate(pairs, ordinal):
                try:
                    texts.append(self._content(item))
                except Unusable as error:
                    if texts:  # what came before it is handed out first
                        yield Texts(texts, names, states)
                    raise DataError(f"document {number}: {error.message}") from error
                names.append(_name_of(item, self._id_field, number))
            yield Texts(texts, names, states)
            ordinal, begin = ordinal + len(pairs), pairs[-1][1]

    def _content(self, item: Any) -> Any:
        return self._loaded.chat.render(item) if self._chat else _text_of(item, self._text_field)

    def _encode(self, engine: TokenizerEngine, texts: Sequence[Any]) -> tuple[Ids, Ids]:
        return encode_rendered(self._loaded, texts, engine) if self._chat else engine.encode(texts)

    def _reference(self) -> TokenizerEngine | None:
        return self._loaded.reference_engine if self._loaded.reference else None

    def _surrounded(self, found: Tried, rows: int) -> tuple[Ids, Ids]:
        length = found.length[:rows]
        own = found.ids[: length.sum()]
        if self._chat:
            refuse_twice(own, length, self._bos, self.eos)
        ids, length = surround(own, length, self._bos, self.eos)
        if self._chat and self.eos is not None:
            like_the_last(ids, length)
        return ids if self._chat else ids.astype(self._loaded.dtype), length


@dataclass(frozen=True)
class _Elsewhere:
    """`_Encoding.encoded` in another process, which loads the tokenizer with its first unit."""

    made: "partial[_Encoding]"
    sha256: str

    def __call__(self, unit: Unit) -> _Encoded:
        encoding = _loaded_again(self)
        if encoding.sha256 != self.sha256:
            name = encoding.settings["tokenizer"]
            raise RequestError(f"tokenizer {name} was changed while a stream used it: make the stream again")
        return encoding.encoded(unit.texts)


@lru_cache(1)
def _loaded_again(elsewhere: _Elsewhere) -> _Encoding:
    return elsewhere.made()


@dataclass(frozen=True)
class _Work:
    """The stage at work, here or in as many processes as there are workers."""

    encoding: _Encoding
    workers: int
    ahead: str | int

    def __post_init__(self) -> None:
        if not is_count(self.workers):
            raise RequestError(f"{setting('workers', self.workers)} does not work: give at least 1")
        if not is_count(self._bytes):
            raise RequestError(f"ahead={self.ahead!r} does not work: give a size such as '64MiB'")

    @property
    def _bytes(self) -> int | None:
        return size_of(self.ahead) if isinstance(self.ahead, str) else self.ahead

    def batches(self, at: At, documents: Stream[Any]) -> Iterator[Tokens]:
        """`at` has how many documents came before, as `item`."""
        ordinal = at.get("item", 0) if at else 0
        with closing(self._encoded(self.encoding.texts(at, ordinal, documents))) as found:
            for texts, (ids, length, failed) in found:
                tokens = token_batch(ids, length, ordinal, texts.ids[: len(length)])
                yield Tokens(tokens, _with_item(texts.states, ordinal), self.encoding.plain, self.encoding.eos)
                if failed is not None:  # what came before it is handed out first
                    raise DataError(f"document {texts.ids[len(length)]!r}: {failed}")
                ordinal += len(length)

    def _encoded(self, batches: Iterator[Texts]) -> Generator[tuple[Texts, _Encoded]]:
        if self.workers == 1:
            for batch in batches:
                yield batch, self.encoding.encoded(batch.texts)
        else:
            assert self._bytes
            elsewhere = _Elsewhere(self.encoding.made, self.encoding.sha256)
            yield from encoded_ahead(elsewhere, batches, workers=self.workers, ahead=self._bytes)

    def ids(self, at: At, documents: Stream[Any]) -> Iterator[Pair[Ids]]:
        for tokens in self.batches(at, documents):
            length, flat = tokens.batch.length, tokens.batch.ids
            found: Iterable[Ids] = apart(flat, length)
            if tokens.plain:
                found = map(LearnedIds.of, *(apart(each, length) for each in ids_and_learned(flat, tokens.plain)))
            for row, ids in enumerate(found, 1):
                yield ids, partial(tokens.states, row)


def _template_of(loaded: Tokenizer) -> str:
    from millstream.runs.pack.settings import chat_sha256  # it needs much that no other stream does

    return chat_sha256(loaded.chat)


def _with_item(states: Where, ordinal: int) -> Where:
    return lambda row: {"in": states(row), "item": ordinal + row}


def _rough_size_of_pair(pair: Pair[Any]) -> int:
    return _rough_size(pair[0])


def _rough_size(item: Any) -> int:
    """Letters of text in an item, whatever it is made of."""
    text = item if isinstance(item, str) else getattr(item, "text", item)
    if isinstance(text, str):
        return len(text)
    if isinstance(item, Mapping):
        return sum(map(_rough_size, item.values()))
    return sum(map(_rough_size, item)) if isinstance(item, list | tuple) else 8


def _of(item: Any, field: str, attribute: str, otherwise: Any) -> Any:
    """A field of a row, or what a document has."""
    if isinstance(item, Document):  # Mapping takes a microsecond to say no
        return getattr(item, attribute)
    return item.get(field) if isinstance(item, Mapping) else getattr(item, attribute, otherwise)


def _text_of(item: Any, field: str) -> str:
    if isinstance(item, str):
        return item
    text = _of(item, field, "text", item)
    if not isinstance(text, str):
        what = f"field {field!r} is" if isinstance(item, Mapping) else "a document is"
        raise DataError(f"{what} not text but {type(text).__name__}")
    return text


def _name_of(item: Any, field: str, number: int) -> str:
    if isinstance(item, str):
        return str(number)
    found = _of(item, field, "id", None)
    return str(number) if found is None else str(found)
