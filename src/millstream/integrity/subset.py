"""One subset of a run: its samples, segments and documents, shard by shard, with little held from one to the next."""

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from millstream.folder.documents import COUNTS, DocumentTable, count_documents
from millstream.folder.entries import Files, Manifest
from millstream.folder.manifest import FORMAT
from millstream.folder.reader import remainder
from millstream.folder.samples import Samples, ShardSamples
from millstream.integrity.documents import Matching, Ordinals, Rows, Rules, Wrong
from millstream.integrity.samples import BlockOfSamples, column_problems, segment_problems
from millstream.records import Ids
from millstream.runs.pack.encode import in_validation


class _Names(NamedTuple):
    """Of an output shard's files."""

    samples: str
    segments: str
    documents: str
    loss: str | None

    @classmethod
    def of(cls, files: Files) -> "_Names":
        loss = files.loss.name if files.loss else None
        return cls(files.samples.name, files.segments.name, files.documents.name, loss)


class SubsetCheck:
    """What is wrong with one subset: `problems` says it; `ordinals` gets the numbers of its documents."""

    def __init__(self, folder: str, manifest: Manifest, name: str, ordinals: Ordinals) -> None:
        self._manifest, self._name, self._ordinals = manifest, name, ordinals
        self._settings = settings = manifest.settings
        self._entry = manifest.subsets[name]
        self._samples = Samples(folder, name, settings, self._entry)
        best_fit = settings.strategy == "best-fit"
        # Best-fit of millstream/1 named the documents of a window in the order of the stream.
        ordered = not best_fit or manifest.format == FORMAT
        self._matching = Matching(Rules(settings.bos_id, settings.eos_id, ordered))
        self._in_order = settings.shuffle is None and not best_fit
        self._before = (-1, -1, -1)  # ordinal, source and offset of the last document, where they are in order
        self._segments = 0
        self._matched = True  # whether documents and segments fit, so far

    def problems(self) -> Iterator[str]:
        entries = self._entry.shards
        for number, entry in enumerate(entries):
            shard = ShardSamples(self._samples, number, entry, 0, entry.samples, np.empty(0, self._samples.dtype))
            yield from self._shard(shard, last=number == len(entries) - 1)
        left = self._entry.remainder
        dropped = left.ids if left.policy == "drop" else 0
        try:
            if self._matched:
                self._matching.end(dropped)
        except Wrong as wrong:
            yield f"{self._name}: {wrong}"
        if left.ids and not entries:
            yield f"{self._name}: a remainder of {left.ids} ids, and no shard with its segments"

    def _shard(self, shard: ShardSamples, *, last: bool) -> Iterator[str]:
        names, segments = _Names.of(shard.entry.files), shard.all_segments
        kept = last and self._samples.kept > 0
        wrong = next(segment_problems(shard, segments, kept), None)
        if len(segments) != shard.entry.segments:
            wrong = f"{len(segments)} segments instead of {shard.entry.segments}"
        if wrong:
            self._matched = False
            yield f"{names.segments}: {wrong}"
            return
        table = self._table(shard)
        yield from self._blocks(shard, names, table, last)
        if kept:
            yield from self._remainder(shard, names, segments, table)
        for problem in self._until(table, done=True):
            yield f"{names.documents}: {problem}"
        if self._matched and not (last and self._entry.remainder.policy == "drop"):
            try:
                self._matching.settled()
            except Wrong as problem:
                self._matched = False
                yield f"{names.documents}: {problem}"

    def _blocks(self, shard: ShardSamples, names: _Names, table: Iterator[str], last: bool) -> Iterator[str]:
        padding = rows = learned = 0
        pads = self._entry.remainder.policy == "pad" and last
        for first, ids, marks in shard.blocks():
            segments = shard.segments(first, len(ids))
            segments["sample"] -= first
            block = BlockOfSamples(self._samples, ids, marks, segments)
            only = pads and first + len(ids) == len(shard)  # the last sample of all may be padded
            if only and (block.used[:-1] < self._samples.seq_len).any():
                only = False
            for problem in block.problems(self._settings, only):
                name = names.segments if problem.startswith(("a ", "documents")) else names.samples
                yield f"{name}: {problem}"
            padding += int((self._samples.seq_len - block.used).sum())
            rows += len(ids)
            learned += 0 if marks is None else int(marks.sum())
            yield from self._match(block, names, table)
        if padding != shard.entry.padding:
            yield f"{names.segments}: {padding} ids of padding instead of {shard.entry.padding}"
        if self._samples.masked and learned != shard.entry.learned:
            name = names.loss or names.samples
            yield f"{name}: {learned} ids to be learned instead of {shard.entry.learned}"
        if self._settings.format == "parquet":
            yield from (f"{names.samples}: {problem}" for problem in column_problems(shard))

    def _match(self, block: BlockOfSamples, names: _Names, table: Iterator[str]) -> Iterator[str]:
        """Hand a block's segments to the matching, and rows of the documents table until these are what is missing."""
        if self._matched:
            try:
                self._matching.take(block.spans(self._segments))
            except Wrong as wrong:
                self._matched = False
                yield f"{names.segments}: {wrong}"
        self._segments += len(block.segments)
        for problem in self._until(table):
            yield f"{names.documents}: {problem}"

    def _until(self, table: Iterator[str], *, done: bool = False) -> Iterator[str]:
        """Problems of the next documents, while the matching wants more of them, or to the end."""
        while done or (self._matched and self._matching.wants_rows):
            problem = next(table, None)
            if problem is None:
                return
            if problem:
                yield problem

    def _remainder(self, shard: ShardSamples, names: _Names, segments: Ids, table: Iterator[str]) -> Iterator[str]:
        """The kept remainder is as a last sample, shorter than the others."""
        kept, store = self._entry.remainder, self._samples.store
        ids, marks = remainder(store, kept)
        if len(ids) != kept.ids or ids.dtype != self._samples.dtype or ids.ndim != 1:
            self._matched = False
            yield f"{kept.name}: {len(ids)} ids instead of {kept.ids}"
            return
        if marks is not None and (marks.shape != ids.shape or int(marks.sum()) != kept.learned):
            yield f"{kept.loss and kept.loss.name}: it does not fit the remainder and its count"
            marks = None
        rest = segments[np.searchsorted(segments["sample"], len(shard)) :].copy()
        rest["sample"] = 0
        if int(rest["length"].sum()) != len(ids):
            self._matched = False
            yield f"{names.segments}: {int(rest['length'].sum())} ids of the remainder instead of {len(ids)}"
            return
        block = BlockOfSamples(self._samples, ids[None], None if marks is None else marks[None], rest)
        for problem in block.problems(self._settings, pads=False):
            yield f"{kept.name}: {problem}"
        yield from self._match(block, names, table)

    def _table(self, shard: ShardSamples) -> Iterator[str]:
        """Hand the rows of a documents table to the matching, some at each step; a step's problem, or nothing ("")."""
        counts: Counter[str] = Counter()
        for rows in shard.documents():
            counts.update(count_documents(rows.length, rows.split, rows.cut_off))
            self._ordinals.add(rows.ordinal)
            yield next(self._row_problems(rows), "")
            filled = rows.length > 0
            if self._matched and filled.any():
                try:
                    self._matching.rows(Rows(rows.ordinal[filled], rows.length[filled], rows.split[filled]))
                except Wrong as wrong:
                    self._matched = False
                    yield str(wrong)
        for key in COUNTS:
            if counts[key] != (told := getattr(shard.entry, key)):
                yield f"{counts[key]} {key} instead of {told}"

    def _row_problems(self, rows: DocumentTable) -> Iterator[str]:
        """What the rows of documents are by themselves: each from an input there is, in its order, and as asked."""
        settings, n = self._settings, self._samples.seq_len
        inputs, fraction = len(self._manifest.inputs), settings.validation
        if (rows.source >= inputs).any():
            yield f"a document of input {int(rows.source.max()) + 1} of {inputs}"
        yield from self._order_problems(rows)
        if fraction and (in_validation(rows.id, fraction) != (self._name == "validation")).any():
            yield "a document whose id puts it into the other subset"
        how, cut = settings.overlong, rows.cut_off > 0
        if how and (rows.length > n).any():
            yield f"a document of more than {n} ids"
        keeps = n if how == "truncate" else 0
        if (cut & ((how not in ("truncate", "drop")) | (rows.length != keeps))).any():
            yield "a document that is cut off otherwise than --overlong says"
        if settings.strategy == "best-fit" and (rows.split != (rows.length > n)).any():
            yield f"not just the documents of more than {n} ids are split"

    def _order_problems(self, rows: DocumentTable) -> Iterator[str]:
        """Documents of the same input are numbered in the order in which they stand there."""
        columns = [rows.ordinal.astype(np.int64), rows.source.astype(np.int64), rows.offset.astype(np.int64)]
        if self._in_order:
            columns = [np.append(first, column) for first, column in zip(self._before, columns, strict=True)]
            self._before = tuple(int(column[-1]) for column in columns)  # type: ignore[assignment]
        else:
            order = np.argsort(columns[0], kind="stable")
            columns = [column[order] for column in columns]
        ordinal, source, offset = (np.diff(column) for column in columns)
        if (ordinal <= 0).any():
            row = int(np.flatnonzero(ordinal <= 0)[0])
            yield f"document {columns[0][row + 1]} does not come behind document {columns[0][row]}"
        backwards = (source < 0) | ((source == 0) & (offset <= 0))
        if backwards.any():
            row = int(np.flatnonzero(backwards)[0])
            yield f"documents {columns[0][row]} and {columns[0][row + 1]} stand the other way round in the input"
