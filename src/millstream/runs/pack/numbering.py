"""What workers encoded gets its place in the run: ordinals of documents, lines of faults, counts for the ledger."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from millstream.records import LEARNED, Cursor, DocumentFault, Ids, TokenBatch
from millstream.runs.pack.encode import Encoded
from millstream.runs.pack.subset import Mark
from millstream.stream.overlong import Overlong, learned_cut_off, too_many


class Numbered(NamedTuple):
    """A unit's documents as the packers take them, `in_validation` for each of them (or nothing), and its faults.

    `open`: the last document of the unit goes on; `alone`: there is no other one. `mark` is the run's behind the unit.
    """

    batch: TokenBatch
    in_validation: Ids
    faults: list[DocumentFault]
    open: bool
    alone: bool
    mark: Mark


class Numbering:
    """Numbers units, in order: `number` gives each one's documents, from the mark that the one before it ended with.

    `specials`: whether the run puts BOS before documents, and EOS after them. Documents after the first `limit` are
    left out. What is longer than a sample becomes what `overlong` says. `restart` lets the next unit begin with a mark
    of zeros: all that it and those behind it are given is then to be added to what came before them.
    """

    def __init__(
        self,
        names: Sequence[str] | Mapping[int, str],
        *,
        specials: tuple[bool, bool],
        masked: bool,
        limit: int | None,
        overlong: Overlong,
    ) -> None:
        self._names, self._specials, self._masked, self._limit = names, specials, masked, limit
        self._overlong, self._faulty = overlong, overlong.how == "fault"
        self._open_ids = 0  # that the document that goes on has had

    def anew(self, limit: int | None, names: Mapping[int, str]) -> "Numbering":
        """The same for another stretch of the corpus, of which the first `limit` documents are taken: of inputs with
        these `names`, by number."""
        overlong = Overlong(self._overlong.how, self._overlong.seq_len, self._overlong.eos)
        return Numbering(names, specials=self._specials, masked=self._masked, limit=limit, overlong=overlong)

    def left(self, mark: Mark) -> int | None:
        """How many documents are still taken behind `mark`; None for all."""
        return None if self._limit is None else max(0, self._limit - mark.ordinal)

    def restart(self, mark: Mark) -> Mark:
        """The zeros to go on with, at the place of `mark`, which the last unit ended with."""
        if self._limit is not None:
            self._limit -= mark.ordinal
        return Mark(mark.cursor)

    def number(self, encoded: Encoded, mark: Mark, cursor: Cursor) -> Numbered:
        """The documents of a unit that ends at `cursor`."""
        lines = Counter({mark.cursor.source: mark.line})  # before this unit; a later input shard begins with it
        faults = [
            fault._replace(ordinal=mark.ordinal + fault.ordinal, line=fault.line and fault.line + lines[fault.shard])
            for fault in encoded.faults
        ]
        for source, count in encoded.lines:
            lines[source] += count
        read, count = self._limited(encoded, mark.ordinal)
        faults = [fault for fault in faults if fault.ordinal < mark.ordinal + count]
        batch, chosen = self._overlong.feed(read), encoded.in_validation
        if self._faulty and batch.cut_off.any():
            good = batch.cut_off == 0
            faults = sorted([*faults, *self._too_many(batch.where(~good))])
            batch, chosen = batch.where(good), chosen[: len(good)][good[: len(chosen)]]
        faulty = Counter(mark.faults) + Counter(fault.reason for fault in faults)
        specials = self._special_ids(batch, begun=not (encoded.opened and self._overlong.how == "cut"))
        after = Mark(
            cursor=cursor,
            ordinal=mark.ordinal + count,
            line=lines[cursor.source],
            text_ids=mark.text_ids + len(batch.ids) + int(batch.cut_off.sum()) - specials,
            special_ids=mark.special_ids + specials,
            fault_bytes=mark.fault_bytes,
            faults=dict(sorted(faulty.items())),
            bytes=mark.bytes + encoded.size,
        )
        if self._masked:
            cut_off = 0 if self._faulty else learned_cut_off(read, batch)
            learned = int((batch.ids >= LEARNED).sum()) + cut_off
            after = replace(after, learned=mark.learned + learned, learned_cut_off=mark.learned_cut_off + cut_off)
        return Numbered(batch, chosen[: len(batch)], faults, read.open, len(read) == 1, after)

    def _limited(self, encoded: Encoded, first: int) -> tuple[TokenBatch, int]:
        """The documents up to the limit, numbered from `first` on, and how many there are with the faulty ones."""
        ordinal = encoded.position + first
        start = np.zeros(len(ordinal), np.int64)
        columns = (encoded.doc_ids, encoded.source, encoded.offset, encoded.open)
        batch = TokenBatch(encoded.ids, encoded.length, ordinal.astype(np.uint64), start, *columns)
        if encoded.opened and len(batch):
            batch.start[0] = self._open_ids
        count = encoded.count
        if self._limit is not None and first + count > self._limit:
            batch = batch.rows(0, int((ordinal < self._limit).sum()))
            count = self._limit - first
        self._open_ids = int(batch.start[-1] + batch.length[-1]) if batch.open else 0
        return batch, count

    def _special_ids(self, batch: TokenBatch, begun: bool) -> int:
        """How many of the ids are BOS and EOS; `begun`: whether the first document has begun here."""
        filled = batch.length + batch.cut_off > 0
        begun_here = int(filled.sum()) - int(not begun and bool(filled[:1].any()))
        ended = int(filled.sum()) - batch.open
        bos, eos = self._specials
        return begun_here * bos + ended * eos

    def _too_many(self, batch: TokenBatch) -> list[DocumentFault]:
        ordinals = batch.ordinal.astype(np.int64)  # -1 for one that began before a restart
        numbers = zip(ordinals.tolist(), batch.source.tolist(), batch.offset.tolist(), strict=True)
        rows = zip(numbers, batch.doc_ids, batch.cut_off.tolist(), strict=True)
        return [
            DocumentFault(
                ordinal=ordinal,
                reason="overlong",
                message=too_many(cut_off, self._overlong.seq_len),
                source=self._names[source],
                offset=offset,
                line=0,
                id=name,
                shard=source,
            )
            for (ordinal, source, offset), name, cut_off in rows
        ]
