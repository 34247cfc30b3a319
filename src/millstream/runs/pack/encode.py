"""What a worker does: decode a unit of slices, tokenize its documents, compare some of them with the reference."""

import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import numpy as np

from millstream.corpus.documents import Fields, decode, leave_out
from millstream.errors import RunError, setting
from millstream.records import LEARNED, DocumentFault, Ids, Slice, TextBatch
from millstream.runs.pack.counts import Checks
from millstream.stream.encoders import TokenizerEngine
from millstream.stream.tokenize import (
    Encoding,
    already_there,
    attempt,
    compare,
    encode_rendered,
    like_the_last,
    refuse_twice,
    surround,
)
from millstream.stream.tokenizers import Tokenizer, load_tokenizer

CHECK_FIRST = 1_000_000
"""Bytes at the beginning of a run of which every document is compared with the reference engine."""
_CHECK_EVERY = 1000
CHECK_SIZE = 4 << 20  # longer texts are left out: the reference would need seconds for one


@dataclass(slots=True)
class Encoded:
    """The result of one unit, in columns. `position` numbers documents and faults together, from 0 (-1: goes on with
    the document before); `in_validation` is empty without a validation subset."""

    ids: Ids
    length: Ids
    position: Ids
    doc_ids: list[str]
    source: Ids
    offset: Ids
    in_validation: Ids
    faults: list[DocumentFault]
    count: int
    lines: list[tuple[int, int]]
    opened: bool
    open: bool
    size: int
    checks: Checks = field(default_factory=Checks)


@dataclass(frozen=True)
class Encode:
    """`Encode(...)(unit, check_all)`: small, picklable, the same in every worker.

    `tokenizer` is a name for `load_tokenizer`, or makes one, or None for text that is tokenized already, and `sha256`
    what it had to be when the run began; `engine` is fast or reference. `masked`: rows are conversations (rendered by
    `fields.of_row`), and ids have LEARNED set where they are to be learned. `rescues`: what the reference cannot encode
    is encoded by the fast engine, and among `Checks.not_compared`.
    """

    fields: Fields
    tokenizer: str | Callable[[], Tokenizer] | None
    sha256: str | None = None
    bos: int | None = None
    eos: int | None = None
    max_document: int = 32 << 20
    validation: float = 0.0
    engine: str = "fast"
    masked: bool = False
    rescues: bool = False

    def counted(self, unit: tuple[Slice, ...]) -> Encoded:
        """The documents and faults of a unit, none of them tokenized."""
        batch = decode(unit, self.fields, self.max_document)
        return self._encoded(unit, batch, np.zeros(0, np.uint32), np.zeros(len(batch.doc_ids), np.int64))

    def __call__(self, task: tuple[tuple[Slice, ...], bool]) -> Encoded:
        unit, check_all = task
        clock = [time.perf_counter()]
        batch = decode(unit, self.fields, self.max_document)
        clock.append(time.perf_counter())
        tokenizer = engine_of(self.tokenizer, self.sha256, self.engine) if self.tokenizer else None
        if tokenizer and not self.fields.ids:
            ids, length, rescued = self._tokenize(tokenizer, unit, batch)
        else:
            rescued = dict[int, str]()
            length = np.fromiter(map(len, batch.ids), np.int64, len(batch.ids))
            dtype = tokenizer.dtype if tokenizer else np.dtype(np.uint32)
            ids = np.concatenate(batch.ids).astype(dtype) if batch.ids else np.zeros(0, dtype)
        lost, unknown = self._lost(tokenizer, batch, ids) if tokenizer and not self.fields.ids else (0, 0)
        if self.fields.of_row:
            refuse_twice(ids, length, self.bos, self.eos)
        twice = sum(already_there(ids, length, self.bos, self.eos)) if self.fields.ids else 0
        ids, length = surround(ids, length, self.bos, self.eos, batch.opened, batch.open)
        if self.masked and self.eos is not None:
            like_the_last(ids, length)
        clock.append(time.perf_counter())
        compared, missed = self._compare(tokenizer, batch, check_all, rescued) if tokenizer else (0, {})
        clock.append(time.perf_counter())
        parts = ("decode", "tokenize", "compare")
        found = self._encoded(unit, batch, ids, length)
        if self.rescues:
            missed |= {batch.doc_ids[row]: message for row, message in rescued.items()}
        seconds = {part: b - a for part, a, b in zip(parts, clock, clock[1:], strict=False)}
        taught, unlearned = _taught(ids, length) if self.masked else (0, 0)
        found.checks = Checks(
            compared=compared,
            not_compared=missed,
            taught=taught,
            unlearned=unlearned,
            twice=twice,
            lost=lost,
            unknown=unknown,
            seconds=seconds,
        )
        return found

    def _lost(self, tokenizer: Tokenizer, batch: TextBatch, ids: Ids) -> tuple[int, int]:
        """(bytes of text that no id stands for, ids that stand for unknown text), where they can be known."""
        own = ids & np.uint32(LEARNED - 1) if self.masked else ids
        unknown = 0 if tokenizer.unknown is None else int((own == tokenizer.unknown).sum())
        sizes = tokenizer.bytes_of if tokenizer.leaves_out and tokenizer.normalized is None else None
        if sizes is None:
            return 0, unknown
        texts = (text.text if self.fields.of_row else text for text in batch.texts)
        return max(0, sum(len(text.encode()) for text in texts) - int(sizes[own].sum())), unknown

    def _encoded(self, unit: tuple[Slice, ...], batch: TextBatch, ids: Ids, length: Ids) -> Encoded:
        return Encoded(
            ids=ids,
            length=length,
            position=np.array(batch.position, np.int64),
            doc_ids=batch.doc_ids,
            source=np.array(batch.source, np.uint32),
            offset=np.array(batch.offset, np.uint64),
            in_validation=in_validation(batch.doc_ids, self.validation),
            faults=batch.faults,
            count=batch.count,
            lines=batch.lines,
            opened=batch.opened,
            open=batch.open,
            size=sum(piece.size for piece in unit),
        )

    def _tokenize(
        self, tokenizer: Tokenizer, unit: tuple[Slice, ...], batch: TextBatch
    ) -> tuple[Ids, Ids, dict[int, str]]:
        """(ids, lengths, rows that only the other engine could encode, and why) of a batch.

        What neither can encode becomes a fault of the batch. With the reference alone, what it cannot encode though the
        fast engine can is an error: which documents are faults does not depend on the engine.
        """
        encoding = self._encoding(tokenizer)
        ids, length, failed, rescued = attempt(encoding, batch.texts, tokenizer.engine, self._other_engine)
        for row, message in rescued.items() if self.engine == "reference" and not self.rescues else ():
            raise RunError(
                f"document {batch.doc_ids[row]!r}: {message}. The fast engine can: pack without "
                f"{setting('engine', 'reference')}"
            )
        if failed:
            cut = {0} if batch.opened else set()
            cut |= {len(batch.texts) - 1} if batch.open else set()
            for row in cut & failed.keys():
                raise RunError(f"document {batch.doc_ids[row]!r}, whose beginning is packed already: {failed[row]}")
            leave_out(batch, unit, failed, "tokenizer")
        behind = {row - sum(bad < row for bad in failed): message for row, message in rescued.items()}
        return ids.astype(np.uint32 if self.masked else tokenizer.dtype), length, behind

    def _other_engine(self) -> TokenizerEngine | None:
        """The reference, or the fast one where the reference packs; None if the tokenizer has only one engine."""
        assert self.tokenizer
        tokenizer = engine_of(self.tokenizer, self.sha256, "fast")
        if tokenizer.reference is None:
            return None
        return tokenizer.engine if self.engine == "reference" else _reference(tokenizer)

    def _encoding(self, tokenizer: Tokenizer) -> Encoding:
        def encode(engine: TokenizerEngine, texts: Sequence[Any]) -> tuple[Ids, Ids]:
            if not self.fields.of_row:
                return engine.encode(texts)
            if not self.masked:
                texts = [text._replace(learned=()) for text in texts]
            return encode_rendered(tokenizer, texts, engine)

        return encode

    def _compare(
        self, tokenizer: Tokenizer, batch: TextBatch, check_all: bool, without: dict[int, str]
    ) -> tuple[int, dict[str, str]]:
        """(bytes of the documents that were compared with the reference, what it said of those that it cannot encode)
        of a batch, or of a sample of it; `without` these rows."""
        if tokenizer.reference is None or not batch.texts:
            return 0, {}
        # A multiplicative hash of the place, so that the choice depends on the corpus and not on the batches.
        place = np.array(batch.offset, np.uint64) + np.array(batch.source, np.uint64) * np.uint64(0x5851F42D)
        hashed = (place + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
        chosen = np.full(len(place), True) if check_all else hashed % np.uint64(_CHECK_EVERY) == 0
        chosen[list(without)] = False
        rows = [row for row in np.flatnonzero(chosen).tolist() if self._size(batch.texts[row], 4) <= CHECK_SIZE]
        if not rows:
            return 0, {}
        texts, names = [batch.texts[row] for row in rows], [batch.doc_ids[row] for row in rows]
        missed = compare(tokenizer, _reference(tokenizer), self._encoding(tokenizer), texts, names)
        size = sum(self._size(text) for row, text in enumerate(texts) if row not in missed)
        return size, {names[row]: message for row, message in missed.items()}

    def _size(self, text: Any, each: int = 1) -> int:
        """Letters of a text; or bytes, of which a letter has `each` at most, where that makes a difference."""
        found = text.text if self.fields.of_row else text
        return len(found) if len(found) * each <= CHECK_SIZE else len(found.encode())


def _taught(ids: Ids, length: Ids) -> tuple[int, int]:
    """How many documents have ids that are to be learned, and how many have only others."""
    row = np.repeat(np.arange(len(length)), length)
    learned = np.bincount(row[ids >= LEARNED], minlength=len(length))
    return int((learned > 0).sum()), int(((length > 0) & (learned == 0)).sum())


@cache
def engine_of(name: str | Callable[[], Tokenizer], sha256: str | None, engine: str) -> Tokenizer:
    """The tokenizer with its fast engine, or with the reference engine in its place, once a process.

    Raises RunError if it is not the one that the run began with.
    """
    tokenizer = load_tokenizer(name) if isinstance(name, str) else name()
    if sha256 not in (None, tokenizer.sha256):
        raise RunError(f"tokenizer {tokenizer.name} has changed while the run was going")
    if engine == "reference" and tokenizer.reference:
        reference = _reference(tokenizer)
        return replace(tokenizer, engine_name=reference.name, make_engine=lambda: reference, reference=None)
    return tokenizer


def _reference(tokenizer: Tokenizer) -> TokenizerEngine:
    return tokenizer.reference_engine


def in_validation(doc_ids: list[str], fraction: float) -> Ids:
    """Whether each document's id hashes below `fraction`: the same documents whatever else the corpus holds."""
    if not fraction:
        return np.zeros(0, bool)
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in doc_ids)
    return np.frombuffer(digests, ">u8") < fraction * 2.0**64
