"""Blocks of a corpus, spread over all of it, read and tokenized to learn how long its documents are.

A document belongs to the block that it begins in and is read to its end, so that long ones are neither more nor less
often among those that are read. What cannot be sought is read from the front.
"""

import contextlib
import io
import itertools
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np

from millstream.errors import RequestError
from millstream.formats.slices import Limits, safe_cut, slices, too_long, units
from millstream.formats.sources import READ, InputShard, Truncated, chunks, gunzip, rough_size, unzstd
from millstream.records import Cursor, Fault, Ids, Slice
from millstream.runs.pack.encode import Encode

BLOCKS = 256
"""Blocks that are read of every kind of input, if there are so many."""
ENOUGH = 16
"""Input shards or row groups, read from the front, that are enough to tell how far they differ."""
SMALLEST = 1 << 12
_SIP = 1 << 10
LOOK = 16
"""Times as much as is tokenized of what is packed is unpacked to see how well it packs: beginnings pack worse."""


@dataclass(slots=True)
class Block:
    """What was read of a stretch of the corpus.

    `length` (documents,) in ids, `faulty` documents besides; `seconds` it took; `size` in the measure of its part, of
    which it stands for `weight` times as much. Blocks of one `cluster` are neighbours.
    """

    length: Ids
    faulty: int
    seconds: float
    size: float
    weight: float = 1.0
    cluster: int = 0


@dataclass(slots=True)
class Part:
    """Input shards of one kind: their size in all, in bytes as they are measured, and the blocks that were read.

    `whole`: everything was read. `documents`: how many there are, where that is known beforehand.
    """

    total: float
    blocks: list[Block]
    whole: bool
    documents: int | None = None

    @property
    def scale(self) -> float:
        """How often the blocks, by their weights, fit into the part."""
        return 1.0 if self.whole else self.total / sum(block.weight * block.size for block in self.blocks)


class BlockReader:
    """Reads blocks of about `budget` bytes in all; `parts` does it, and the rest says what was met.

    `bytes` of input read, `ids` and `seconds` it took to read and tokenize them, `faults` by reason with an example of
    each, and `notes`: what a person has to know of how it was read.
    """

    def __init__(self, encode: Encode, limits: Limits, columns: tuple[str, ...], budget: int, seed: int) -> None:
        self.bytes = self.ids = 0
        self.seconds = 0.0
        self.faults: Counter[str] = Counter()
        self.examples: dict[str, str] = {}
        self.notes: list[str] = []
        self.cut = False  # what was left out cannot even be estimated
        self._encode, self._limits, self._columns, self._budget = encode, limits, columns, budget
        self._random = np.random.default_rng([seed, 1])

    def parts(self, shards: list[InputShard]) -> list[Part]:
        """The whole corpus in one part, if it is no larger than the budget, else blocks of every kind of input.

        Raises RequestError if no document begins in the blocks of some kind.
        """
        if self._fits(shards):
            pieces = itertools.chain.from_iterable(self._to_budget(shard, self._budget) for shard in shards)
            block = self._block(pieces)
            return [Part(block.size, [block], True)]
        kinds: dict[tuple[str, str | None, bool], list[InputShard]] = {}
        for shard in shards:
            broken = shard.uri != "-" and not os.access(shard.uri, os.R_OK)
            key = ("broken", None, False) if broken else (shard.kind, shard.packed, shard.uri == "-")
            kinds.setdefault(key, []).append(shard)
        rough = {key: sum(map(rough_size, some)) + (self._budget if key[2] else 0) for key, some in kinds.items()}
        found = []
        for key, some in kinds.items():
            budget = max(BLOCKS * SMALLEST // 16, self._budget * rough[key] // max(1, sum(rough.values())))
            found += list(self._way(*key)(some, budget))
        return found

    def _way(self, kind: str, packed: str | None, piped: bool) -> Callable[[list[InputShard], int], Iterator[Part]]:
        if kind == "broken" or piped:
            return self._as_they_are
        if kind == "parquet":
            return self._groups
        if kind == "jsonl":
            return self._fronts if packed else self._lines
        return self._texts

    def _fits(self, shards: list[InputShard]) -> bool:
        left = self._budget
        for shard in shards:
            left -= text_size(shard, self._columns[:-1], left)
            if left < 0:
                return False
        return True

    def _as_they_are(self, shards: list[InputShard], budget: int) -> Iterator[Part]:
        """Standard input up to the budget, and shards that are one fault."""
        blocks = [self._block(self._to_budget(shard, budget)) for shard in shards]
        yield Part(sum(block.size for block in blocks), blocks, True)

    def _to_budget(self, shard: InputShard, budget: int) -> Iterator[Slice]:
        if shard.uri != "-":
            yield from self._slices(shard)
            return
        end = 0
        for piece in _within(self._slices(shard), budget):
            yield piece
            end = piece.stop
        if end >= budget:
            self.cut = True
            self.notes.append(
                f"standard input was read to {end / (1 << 20):.3g} MiB and goes on: the numbers are of that part"
            )

    def _slices(self, shard: InputShard, start: int = 0) -> Iterator[Slice]:
        return slices([shard], Cursor(0, start), self._limits, self._columns)

    def _chosen(self, count: int, wanted: int) -> list[tuple[int, int]]:
        """(number, how many it stands for): one by chance of every `wanted`-th part of the numbers below `count`."""
        wanted = min(wanted, count)
        bounds = [number * count // wanted for number in range(wanted + 1)] if wanted else [0]
        return [(int(self._random.integers(low, high)), high - low) for low, high in itertools.pairwise(bounds)]

    def _lines(self, shards: list[InputShard], budget: int) -> Iterator[Part]:
        """JSON lines: blocks of bytes, numbered through all shards."""
        stops = np.cumsum([os.path.getsize(shard.uri) for shard in shards]).tolist()
        starts, total = [0, *stops[:-1]], stops[-1]
        size = min(max(budget // BLOCKS, SMALLEST), READ)
        count = -(-total // size)
        chosen = self._chosen(count, budget // size)
        blocks = []
        for number, times in chosen:
            low, high = number * size, (number + 1) * size
            ranges = []
            for index in range(int(np.searchsorted(stops, low, side="right")), len(shards)):
                if starts[index] >= high:
                    break
                span = max(0, low - starts[index]), high - starts[index]
                ranges.append(lines_between(shards[index], *span, self._limits.document))
            blocks.append(replace(self._block(itertools.chain.from_iterable(ranges)), weight=times))
        yield self._found(Part(total, blocks, len(chosen) == count))

    def _texts(self, shards: list[InputShard], budget: int) -> Iterator[Part]:
        """Plain text: whole files, each as likely as any other; very long ones from the front."""
        sizes = [os.path.getsize(shard.uri) for shard in shards]
        longest = max(SMALLEST, budget // ENOUGH)
        cost = sum(min(rough_size(shard), longest) for shard in shards)
        chosen = self._chosen(len(shards), max(ENOUGH, len(shards) * budget // max(1, cost)))
        blocks, long = [], 0
        for place, (number, times) in enumerate(chosen):
            shard, size = shards[number], sizes[number]
            if text_size(shard, (), longest) <= longest:
                block = self._block(self._slices(shard))
            else:
                block, long = self._front(shard, size, longest), long + 1
            blocks.append(replace(block, size=size, weight=times, cluster=place * BLOCKS // len(chosen)))
        if long:
            self.notes.append(
                f"{long:,} texts of over {longest >> 10:,} KiB were read in part: their lengths are estimated"
            )
        yield self._found(Part(sum(sizes), blocks, len(chosen) == len(shards) and not long, len(shards)))

    def _front(self, shard: InputShard, size: int, longest: int) -> Block:
        """A text that is judged by its beginning."""
        limit = self._limits.text if self._limits.cut and shard.kind == "text" else self._limits.document
        piece = text_front(shard, longest)
        if limit is not None and shard.packed is None and size > limit:
            piece = replace(piece, fault=too_long(size, limit, "text"))
        block = self._block([piece])
        more = size / piece.stop * (expansion(shard, LOOK * longest) if shard.packed else 1)
        block.length = np.maximum(block.length > 0, np.rint(block.length * more).astype(np.int64))
        block.seconds *= more
        return block

    def _fronts(self, shards: list[InputShard], budget: int) -> Iterator[Part]:
        """Packed JSON lines: the same fraction of many shards, from the front, measured in packed bytes."""
        sizes = [os.path.getsize(shard.uri) for shard in shards]
        chosen = self._chosen(len(shards), BLOCKS)
        fraction = budget / max(1, sum(rough_size(shards[number]) for number, _ in chosen))
        blocks, whole = [], len(chosen) == len(shards)
        for cluster, (number, times) in enumerate(chosen):
            shard, size = shards[number], sizes[number]
            wanted = max(1, int(rough_size(shard) * fraction))
            pieces = _lines_of(_within(self._slices(shard), wanted), max(SMALLEST, wanted // ENOUGH))
            mine = [self._block([piece]) for piece in pieces]
            unpacked = sum(block.size for block in mine)
            packed = 1 / expansion(shard, max(wanted, LOOK * budget // len(chosen)))
            read = size if unpacked < wanted else min(size, unpacked * packed)
            whole &= read == size
            for block in mine:
                block.size *= read / unpacked if unpacked else 0.0
                block.weight, block.cluster = times, cluster
            blocks += mine
        if not whole:
            self.notes.append("packed files can only be read from the front: the estimate rests on their beginnings")
        yield self._found(Part(sum(sizes), blocks, whole))

    def _groups(self, shards: list[InputShard], budget: int) -> Iterator[Part]:
        """Parquet: row groups, large ones from the front, measured in bytes of the column with the text."""
        broken, groups = [], []
        for shard in shards:
            found = row_groups(shard, self._columns[:-1])
            if found is None:
                broken.append(shard)
            else:
                groups += [(shard, *group) for group in found]
        if broken:
            yield next(self._as_they_are(broken, budget))
        total = sum(size for *_, size in groups)
        wanted = max(BLOCKS // 4, len(groups) * budget // max(1, total))
        chosen = self._chosen(len(groups), wanted)
        fraction = min(1.0, budget / max(1, sum(groups[number][3] for number, _ in chosen)))
        blocks = []
        for cluster, (number, times) in enumerate(chosen):
            shard, group, rows, size = groups[number]
            for piece in self._rows(shard, group, rows, size, fraction):
                block = self._block([piece])
                block.size *= size / rows
                block.weight, block.cluster = times * rows / math.ceil(rows * fraction), cluster
                blocks.append(block)
        if fraction < 1:
            self.notes.append("row groups were read from the front: the estimate rests on their beginnings")
        if groups:
            whole = fraction == 1 and len(chosen) == len(groups)
            yield self._found(Part(total, blocks, whole, sum(rows for _, _, rows, _ in groups)))

    def _rows(self, shard: InputShard, group: int, rows: int, size: int, fraction: float) -> Iterator[Slice]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        row, wanted = 0, math.ceil(rows * fraction)
        try:
            with pq.ParquetFile(shard.uri, pre_buffer=False, buffer_size=READ) as file:
                step = max(1, min(wanted // ENOUGH, READ * rows // max(1, size)))
                columns = [name for name in self._columns[:-1] if name in file.schema_arrow.names]
                for batch in file.iter_batches(step, row_groups=[group], columns=columns):
                    batch = batch.slice(0, wanted - row)
                    sink = pa.BufferOutputStream()
                    with pa.ipc.new_stream(sink, batch.schema) as writer:
                        writer.write_batch(batch)
                    start, row = row, row + batch.num_rows
                    yield Slice(0, shard.uri, shard.name, "rows", start, row, sink.getvalue().to_pybytes())
                    if row >= wanted:
                        return
        except (OSError, pa.ArrowException) as error:
            fault = ("corrupt", f"row group {group} cannot be read: {error}")
            yield Slice(0, shard.uri, shard.name, "rows", row, rows, b"", fault=fault)

    @staticmethod
    def _found(part: Part) -> Part:
        if not part.whole and not any(block.size for block in part.blocks):
            raise RequestError("no document begins in the blocks that were read; give a larger --sample")
        return part

    def _block(self, pieces: Iterable[Slice]) -> Block:
        """Tokenize the documents of slices that follow one another."""
        lengths: list[Ids] = []
        faulty = size = 0
        started = time.perf_counter()
        for unit in units(pieces):
            encoded = self._encode((unit, False))
            length = encoded.length
            if encoded.opened and lengths and len(length):
                lengths[-1][-1] += length[0]  # a long text goes on
                length = length[1:]
            if len(length):
                lengths.append(length)
            self._note(encoded.faults)
            faulty += len(encoded.faults)
            size += sum(piece.stop - piece.start for piece in unit)
            self.bytes += encoded.size
            self.ids += len(encoded.ids)
            started += encoded.seconds["compare"]  # loads the other engine
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return Block(np.concatenate(lengths) if lengths else np.zeros(0, np.int64), faulty, seconds, size)

    def _note(self, faults: list[Fault]) -> None:
        for fault in faults:
            self.faults[fault.reason] += 1
            self.examples.setdefault(fault.reason, f"{fault.source} at {fault.offset:,}: {fault.message}")


def text_size(shard: InputShard, columns: tuple[str, ...], most: int) -> int:
    """Bytes of text in an input shard, of a Parquet file in these `columns`; something above `most` if it has more.
    0 where it cannot be told."""
    if shard.uri == "-":
        return 0
    if shard.kind == "parquet":
        return sum(size for *_, size in row_groups(shard, columns) or [])
    size = 0
    with contextlib.suppress(OSError, Truncated):
        if shard.packed is None:
            return os.path.getsize(shard.uri)
        for chunk in chunks(shard):
            size += len(chunk)
            if size > most:
                break
    return size


def lines_between(shard: InputShard, low: int, high: int, longest: int) -> Iterator[Slice]:
    """The lines that begin at bytes from `low` to before `high`, in one slice; no more is read than that, and of the
    last one no more is held than shows that it is over `longest` bytes. Raises OSError."""
    with open(shard.uri, "rb") as file:
        if low:
            file.seek(low - 1)
            _pass_line(file)
        start = file.tell()
        if start >= high:
            return
        data = file.read(high - start)
        if data[-1:] != b"\n":
            data += file.readline(longest + 2)
        if data[-1:] != b"\n":
            _pass_line(file)
        if data:
            yield Slice(0, shard.uri, shard.name, "jsonl", start, file.tell(), data)


def _pass_line(file: BinaryIO) -> None:
    while (piece := file.readline(READ)) and not piece.endswith(b"\n"):
        pass


def text_front(shard: InputShard, size: int) -> Slice:
    """About the first `size` bytes of a text, cut where it can be cut, as if they were all of it. Raises OSError."""
    data = b""
    with contextlib.suppress(Truncated):
        for piece in chunks(shard):
            data += piece
            if len(data) > size:
                break
    stop = min(size, len(data) - 1)
    while stop > size - 4 and data[stop] & 0xC0 == 0x80:  # within a character
        stop -= 1
    stop = safe_cut(data[:stop]) or stop
    return Slice(0, shard.uri, shard.name, shard.kind, 0, stop, data[:stop])


def _within(pieces: Iterator[Slice], stop: int) -> Iterator[Slice]:
    """The slices of documents that begin before byte `stop` of their shard; lines are cut off behind the last one."""
    for piece in pieces:
        if piece.start >= stop:
            return
        if piece.kind == "jsonl" and piece.stop > stop and piece.data:
            end = piece.data.find(b"\n", stop - 1 - piece.start) + 1 or len(piece.data)
            yield replace(piece, data=piece.data[:end], stop=piece.start + end)
            return
        yield piece


def _lines_of(pieces: Iterator[Slice], size: int) -> Iterator[Slice]:
    """The same lines, in slices of about `size` bytes."""
    for piece in pieces:
        data, start = piece.data or b"", 0
        while piece.fault is None and len(data) - start > size:
            stop = data.find(b"\n", start + size - 1) + 1 or len(data)
            yield replace(piece, data=data[start:stop], start=piece.start + start, stop=piece.start + stop)
            start = stop
        if piece.fault or start < len(data):
            yield replace(piece, data=data[start:], start=piece.start + start)


class _Sips(io.BufferedReader):
    """Reads little at once, so that `tell` says how much was needed."""

    def read1(self, size: int = -1, /) -> bytes:
        return super().read1(_SIP)


def expansion(shard: InputShard, most: int) -> float:
    """Bytes that a packed shard unpacks to for each of its own, up to its byte `most` unpacked. Raises OSError."""
    unpacked = 0
    with contextlib.suppress(Truncated), _Sips(open(shard.uri, "rb", buffering=0)) as file:
        for piece in (gunzip if shard.packed == "gzip" else unzstd)(file):
            unpacked += len(piece)
            if unpacked >= most:
                return unpacked / file.tell()
    return max(1, unpacked) / max(1, os.path.getsize(shard.uri))


def row_groups(shard: InputShard, columns: tuple[str, ...]) -> list[tuple[int, int, int]] | None:
    """(number, rows, bytes in `columns`) of the row groups of a Parquet file; None if it has none of these columns or
    cannot be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(shard.uri) as file:
            if not set(columns) & set(file.schema_arrow.names):
                return None
            groups = [file.metadata.row_group(number) for number in range(file.num_row_groups)]
    except (OSError, pa.ArrowException):
        return None
    return [(n, group.num_rows, _columns_size(group, columns)) for n, group in enumerate(groups) if group.num_rows]


def _columns_size(group: Any, columns: tuple[str, ...]) -> int:
    every = [group.column(number) for number in range(group.num_columns)]
    mine = [c for c in every if c.path_in_schema.partition(".")[0] in columns]
    return max(1, sum(int(c.total_uncompressed_size) for c in mine))
