"""The documents of files as a stream."""

import os
import warnings
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, overload

import numpy as np

from millstream.corpus.documents import Fields, decode
from millstream.corpus.find import FoundInputs, find_inputs, ignored_files
from millstream.corpus.kinds import fault_place
from millstream.corpus.limits import BLOCK, Limits, Manner
from millstream.corpus.parquet import check_columns
from millstream.corpus.slices import slices
from millstream.errors import DataError, RequestError, ResumeRefused, setting
from millstream.options import is_count
from millstream.records import Cursor, Document, DocumentFault, Slice, TextBatch
from millstream.stream.chat import FIELDS
from millstream.streams.base import At, LeftOut, Pair, State, Stream
from millstream.streams.columns import Texts, Tokens, Where, apart, filled, token_batch
from millstream.streams.places import SAME, Awaited, Behind, InputPlaces, begun, tail_of

_MAX_DOCUMENT = 32 << 20


Source = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]
OnFault = Callable[[DocumentFault], object]


@overload
def read(
    source: Source,
    *,
    text_field: str = "text",
    id_field: str = "id",
    on_error: str = "stop",
    on_fault: OnFault | None = None,
    max_document: int | None = None,
    state: State | None = None,
) -> Stream[Document]: ...
@overload
def read(
    source: Source,
    *,
    text_field: str = "text",
    id_field: str = "id",
    ids_field: str | None = None,
    chat: bool = False,
    on_error: str = "stop",
    on_fault: OnFault | None = None,
    max_document: int | None = None,
    state: State | None = None,
) -> Stream[Any]: ...
def read(
    source: Source,
    *,
    text_field: str = "text",
    id_field: str = "id",
    ids_field: str | None = None,
    chat: bool = False,
    on_error: str = "stop",
    on_fault: OnFault | None = None,
    max_document: int | None = None,
    state: State | None = None,
) -> Stream[Any]:
    """The documents of files, folders, globs, ``-`` (JSONL on standard input) or ``stdlib:``, one by one.

    JSONL, NDJSON, plain text (one document a file), Parquet, and gzip or zstd of the first two; here, in a bucket
    (``s3://bucket/folder``) or on the hub (``hf://datasets/org/name``). A missing id is `source#offset`.

    Items are `Document`s; with `ids_field`, which has token ids that exist already, arrays of them for `pack`; with
    `chat` rows, as dicts, for ``tokenize(chat=True)``.

    A document that cannot be read raises DataError with its place, or is left out with ``on_error="skip"``: `on_fault`
    is called with each, and `faults` of the stream, or of one made of it, has them. Lines are at most `max_document`
    bytes long (32 MiB); a text file is one document and is held whole, whatever its length, unless that is given.

    >>> documents = read("stdlib:")
    >>> next(documents).id
    'stdlib:__future__.py'
    """
    if on_error not in ("stop", "skip"):
        raise RequestError(f"on_error {on_error!r} does not work: give 'stop' or 'skip'")
    if on_fault and on_error == "stop":
        raise RequestError("on_fault is told what is left out: give on_error='skip' with it")
    if chat and ids_field:
        raise RequestError("chat=True and ids_field exclude each other: conversations are no ids")
    if max_document is not None and not is_count(max_document):
        raise RequestError(f"max_document {max_document!r} does not work: give a number of bytes, at least 1")
    listed = _listed(source)
    found = find_inputs(listed)
    if found.unreadable and on_error == "stop":
        raise DataError(f"cannot read {found.unreadable[0]}")
    content = FIELDS if chat else (ids_field or text_field,)
    flag = "chat=True needs messages, or prompt and completion" if chat else _name_it(ids_field)
    check_columns(found.shards, content, flag)
    _warn_of_the_rest(found)
    # What comes over a pipe is handed on as it comes: whoever writes may wait for an answer.
    block = 1 if [shard.uri for shard in found.shards] == ["-"] else BLOCK
    limits = Limits(max_document or _MAX_DOCUMENT, endless=max_document is None)
    manner = Manner(limits, (*content, id_field), block, hashed=False)
    fields = Fields(text_field, id_field, ids_field, of_row=Conversation if chat else None)
    left_out = LeftOut(on_fault) if on_error == "skip" else None
    corpus = _Corpus(InputPlaces(found.shards), fields, manner, left_out)
    settings = {"text_field": text_field, "id_field": id_field, "ids_field": ids_field, "chat": chat}
    own = ("read", {**settings, "on_error": on_error, "max_document": max_document})
    return Stream(own, corpus.items, batches=corpus.batches, check=corpus.inputs.check, left_out=left_out, state=state)


def _listed(source: Source) -> list[str | os.PathLike[str]]:
    several = source if isinstance(source, Iterable) and not isinstance(source, str | os.PathLike | bytes) else [source]
    listed = list(several)
    for one in listed:
        if not isinstance(one, str | os.PathLike):
            raise RequestError(f"{one!r:.60} is no source: give the name of a file, a folder, a glob or an address")
    return listed


def _name_it(ids_field: str | None) -> str:
    return f"name the one to read with {setting('ids_field' if ids_field else 'text_field')}"


def _warn_of_the_rest(found: FoundInputs) -> None:
    """A stream has no report: what folders hold besides, other than hidden files, is a warning."""
    rest = {what: count for what, count in found.ignored_by_kind().items() if what != "hidden"}
    told = [f"cannot read {folder}" for folder in found.unreadable]
    for message in [*told, *([f"ignored {ignored_files(rest)}"] if rest else [])]:
        warnings.warn(message, stacklevel=3)


class Conversation(dict[str, Any]):
    """A row with messages, or a prompt and a completion; `text` is all that it says."""

    @property
    def text(self) -> str:
        return "".join(_said(self))


def _said(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _said(each)


@dataclass(frozen=True)
class _Corpus:
    """InputPlaces, and how they are read; `left_out` has what cannot be, or else that ends it."""

    inputs: InputPlaces
    fields: Fields
    manner: Manner
    left_out: LeftOut | None

    def items(self, at: At) -> Iterator[Pair[Any]]:
        for batch in self.batches(at):
            if isinstance(batch, Tokens):
                found: Iterable[Any] = apart(batch.batch.ids, batch.batch.length)
            elif self.fields.of_row:
                found = batch.texts
            else:
                found = map(Document, batch.ids, batch.texts)
            for row, item in enumerate(found, 1):
                yield item, partial(batch.states, row)

    def batches(self, at: At) -> Iterator[Texts | Tokens]:
        reader, limit = _Reader(self.inputs, self.manner, at), self.manner.limits.document
        documents = at.get("document", 0) if at else 0
        before: Callable[[], At] = partial(_same, at)
        for pieces in filled(reader.pieces(), _size, self.manner.block // 2):
            unit = tuple(pieces)
            batch = decode(unit, self.fields, limit)
            faults = reader.faults(unit, batch)
            stop = faults[0] if faults and not self.left_out else None
            # Documents before a fault are handed out first.
            good = bisect_left(batch.position, batch.faults[0].ordinal) if stop else len(batch.position)
            self.inputs.read_to(unit[-1].after.source)
            behind = _Unit(self.inputs, unit, batch.source, batch.offset, reader.behind(unit)).place
            yield self._columns(batch, good, partial(_after, before, behind), documents)
            if stop:
                raise DataError(f"{fault_place(stop)}: {stop.message}")
            if self.left_out:
                self.left_out.take(faults)
            reader.take(unit, batch)
            documents += good
            before = partial(behind, good) if good else before

    def _columns(self, batch: TextBatch, good: int, states: Where, documents: int) -> Texts | Tokens:
        if not self.fields.ids:
            return Texts(batch.texts[:good], batch.doc_ids[:good], states)
        length = np.fromiter(map(len, batch.ids[:good]), np.int64, good)
        ids = np.concatenate([np.zeros(0, np.int64), *batch.ids[:good]]).astype(np.uint32)
        return Tokens(token_batch(ids, length, documents, batch.doc_ids[:good]), partial(_numbered, states, documents))


def _same(at: At) -> At:
    return at


def _after(before: Callable[[], At], behind: Where, row: int) -> At:
    """The place after so many documents of a unit."""
    return behind(row) if row else before()


def _numbered(states: Where, documents: int, row: int) -> At:
    found = states(row)
    return found and {**found, "document": documents + row}


def _size(piece: Slice) -> int:
    """A text that goes on ends its unit."""
    return piece.size if piece.ends else BLOCK


class _Reader:
    """Inputs from a place on, and what was read of one before the next unit."""

    def __init__(self, inputs: InputPlaces, manner: Manner, at: At) -> None:
        self._inputs, self._manner = inputs, manner
        self._source: int = at["input"] if at else 0
        self._offset: int = at.get("offset", 0) if at else 0
        self._passes_over = bool(at and "hash" in at)
        self._behind = Behind()
        if at and "tail" in at:
            tail = tail_of(inputs.shards[self._source], self._offset, at["tail"][0])
            self._behind = Behind(self._offset, at["line"], tail)
        elif self._source < len(inputs.shards):
            self._behind = begun(inputs.shards[self._source])

    def pieces(self) -> Iterator[Slice]:
        cursor = Cursor(self._source, 0 if self._passes_over else self._offset)
        for piece in self._compared(slices(self._inputs.shards, cursor, self._manner)):
            low = self._offset - piece.start if self._passes_over and piece.source == self._source else 0
            if low <= 0:
                yield piece
            elif piece.stop > self._offset:
                yield replace(piece, data=piece.data[low:], start=self._offset)

    def _compared(self, found: Iterator[Slice]) -> Iterator[Slice]:
        """Of what cannot be sought all is read again: up to where an earlier stream had come it has to be the same."""
        awaited = deque(sorted(self._inputs.awaited))
        source, behind = -1, Behind()
        for piece in found:
            if piece.source != source:
                source, behind = piece.source, begun(self._inputs.shards[piece.source])
            while awaited and awaited[0].source == source and awaited[0].offset <= piece.stop:
                self._compare(awaited[0], behind.then(piece, awaited[0].offset - piece.start))
                awaited.popleft()
            if awaited and awaited[0].source < source:
                break
            if awaited:
                behind = behind.then(piece, piece.stop - piece.start)
            yield piece
        if awaited:
            called = self._inputs.shards[awaited[0].source].called
            raise ResumeRefused(f"{called} was read to byte {awaited[0].offset:,} and ends before that now: {SAME}")

    def _compare(self, awaited: Awaited, now: Behind) -> None:
        if now.told_hash != awaited.hash:
            called = self._inputs.shards[awaited.source].called
            raise ResumeRefused(f"{called} has changed before byte {awaited.offset:,}: {SAME}")
        if awaited[:2] == (self._source, self._offset):
            self._behind = now

    def behind(self, unit: tuple[Slice, ...]) -> Behind:
        """What was read before a unit of the input that it begins in."""
        source = unit[0].source
        return self._behind if source == self._source else begun(self._inputs.shards[source])

    def faults(self, unit: tuple[Slice, ...], batch: TextBatch) -> list[DocumentFault]:
        """Those of a unit that was read, with lines counted in their files."""
        before = {unit[0].source: self.behind(unit).line}
        return [fault._replace(line=fault.line and fault.line + before.get(fault.shard, 0)) for fault in batch.faults]

    def take(self, unit: tuple[Slice, ...], batch: TextBatch) -> None:
        """Go on behind a unit."""
        for piece, (_, lines) in zip(unit, batch.lines, strict=True):
            if piece.source != self._source:
                self._source, self._behind = piece.source, begun(self._inputs.shards[piece.source])
            if piece.kind == "jsonl":
                self._behind = self._behind.then(piece, piece.stop - piece.start, lines)


@dataclass(frozen=True)
class _Unit:
    """Documents that were decoded together, where they stand, and what was read of the first one's input before."""

    inputs: InputPlaces
    pieces: tuple[Slice, ...]
    source: list[int]
    offset: list[int]
    behind: Behind

    def place(self, row: int) -> At:
        """After so many documents, at least one."""
        source, offset = self.source[row - 1], self.offset[row - 1]
        kind = self.inputs.shards[source].kind
        if kind == "parquet":
            return self.inputs.in_rows(source, offset + 1)
        if kind != "jsonl":
            return self.inputs.place(source + 1)
        return self.inputs.in_lines(source, self._line_after(source, offset))

    def _line_after(self, source: int, offset: int) -> Behind:
        """What is read of an input with the line at `offset`."""
        behind = self.behind if source == self.pieces[0].source else begun(self.inputs.shards[source])
        for piece in self.pieces:
            if piece.source == source and piece.start <= offset:
                size = piece.stop - piece.start
                if offset < piece.stop:
                    size = bytes(piece.data).find(b"\n", offset - piece.start) + 1 or size
                behind = behind.then(piece, size)
        return behind
