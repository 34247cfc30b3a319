"""Blocks of a corpus, spread over all of it, read and tokenized to learn how long its documents are.

A document belongs to the block that it begins in and is read to its end, so that long ones are neither more nor less
often among those that are read. What cannot be sought is read from the front.
"""

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from millstream.corpus.limits import Limits, Manner, too_long
from millstream.corpus.objects import of_each
from millstream.corpus.slices import slices, units
from millstream.corpus.sources import READ, InputShard, rough_size
from millstream.corpus.stretches import (
    RowGroup,
    drawn,
    expansion,
    lines_between,
    lines_of,
    row_groups,
    rows_of,
    text_front,
    text_size,
    told_size,
    within,
)
from millstream.errors import RequestError, setting
from millstream.records import Cursor, DocumentFault, Ids, Slice
from millstream.runs.pack.encode import Encode

BLOCKS = 256
"""Blocks that are read of every kind of input, if there are so many."""
ENOUGH = 16
"""Input shards or row groups, read from the front, that are enough to tell how far they differ."""
SMALLEST = 1 << 12
LOOK, UNPACK = 16, 256 << 20
"""Of what is packed, so many times as much is unpacked as is tokenized, or so many bytes if they are more."""


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
class Stratum:
    """Input shards of one kind: their size in all, in bytes as they are measured, and the blocks that were read.

    `whole`: everything was read. `documents`: how many there are, where that is known beforehand. `front`: only the
    beginnings of its shards could be read, which says nothing of how far off the rest is.
    """

    total: float
    blocks: list[Block]
    whole: bool
    documents: int | None = None
    front: bool = False

    @property
    def scale(self) -> float:
        """How often the blocks, by their weights, fit into it."""
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

    def parts(self, shards: list[InputShard]) -> list[Stratum]:
        """The whole corpus in one part, if it is no larger than the budget, else blocks of every kind of input.

        Raises RequestError if no document begins in the blocks of some kind.
        """
        if self._fits(shards):
            pieces = itertools.chain.from_iterable(self._to_budget(shard, self._budget) for shard in shards)
            block = self._block(pieces)
            return [Stratum(block.size, [block], True)]
        kinds: dict[tuple[str, str | None, bool], list[InputShard]] = {}
        for shard in shards:
            broken = shard.uri != "-" and not _opens(shard)
            key = ("broken", None, False) if broken else (shard.kind, shard.packed, shard.uri == "-")
            kinds.setdefault(key, []).append(shard)
        rough = {
            key: sum(likely_sizes(some) if key[0] != "broken" else [0]) + (self._budget if key[2] else 0)
            for key, some in kinds.items()
        }
        found = []
        for key, some in kinds.items():
            budget = max(BLOCKS * SMALLEST // 16, self._budget * rough[key] // max(1, sum(rough.values())))
            found += list(self._way(*key)(some, budget))
        return found

    def _way(self, kind: str, packed: str | None, piped: bool) -> Callable[[list[InputShard], int], Iterator[Stratum]]:
        if kind == "broken" or piped:
            return self._as_they_are
        if kind == "parquet":
            return self._groups
        if kind == "jsonl":
            return self._packed if packed else self._lines
        return self._texts

    def _fits(self, shards: list[InputShard]) -> bool:
        left = self._budget
        for shard in shards:
            left -= text_size(shard, self._columns[:-1], left)
            if left < 0:
                return False
        return True

    def _as_they_are(self, shards: list[InputShard], budget: int) -> Iterator[Stratum]:
        """Standard input up to the budget, and shards that are one fault."""
        blocks = [self._block(self._to_budget(shard, budget)) for shard in shards]
        yield Stratum(sum(block.size for block in blocks), blocks, True)

    def _to_budget(self, shard: InputShard, budget: int) -> Iterator[Slice]:
        if shard.uri != "-":
            yield from self._slices(shard)
            return
        end = 0
        for piece in within(self._slices(shard), budget):
            yield piece
            end = piece.stop
        if end >= budget:
            self.cut = True
            self.notes.append(
                f"standard input was read to {end / (1 << 20):.3g} MiB and goes on: the numbers are of that part"
            )

    def _slices(self, shard: InputShard, start: int = 0) -> Iterator[Slice]:
        return slices([shard], Cursor(0, start), Manner(self._limits, self._columns, hashed=False))

    def _chosen(self, count: int, wanted: int) -> list[tuple[int, int]]:
        """(number, how many it stands for): one by chance of every `wanted`-th part of the numbers below `count`."""
        wanted = min(wanted, count)
        bounds = [number * count // wanted for number in range(wanted + 1)] if wanted else [0]
        return [(int(self._random.integers(low, high)), high - low) for low, high in itertools.pairwise(bounds)]

    def _lines(self, shards: list[InputShard], budget: int) -> Iterator[Stratum]:
        """JSON lines: blocks of bytes, numbered through all shards."""
        stops = np.cumsum([shard.size() for shard in shards]).tolist()
        starts, total = [0, *stops[:-1]], stops[-1]
        size = _block_size(budget)
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
        yield self._found(Stratum(total, blocks, len(chosen) == count))

    def _texts(self, shards: list[InputShard], budget: int) -> Iterator[Stratum]:
        """Plain text: whole files, each as likely as any other; very long ones from the front."""
        sizes = [shard.size() for shard in shards]
        likely = likely_sizes(shards)
        few = len(shards) * budget < ENOUGH * sum(likely)  # texts of usual length would be read
        longest = max(SMALLEST, budget // (ENOUGH if few else 4))
        cost = sum(min(size, longest) for size in likely)
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
                f"{long:,} texts of over {longest >> 10:,} KiB were read in part: their lengths are guessed from their "
                "beginnings, and how far off they are cannot be told"
            )
        yield self._found(Stratum(sum(sizes), blocks, len(chosen) == len(shards) and not long, len(shards), long > 0))

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

    def _packed(self, shards: list[InputShard], budget: int) -> Iterator[Stratum]:
        """Packed JSON lines, measured in packed bytes: lines from anywhere in whole files, which are unpacked for it.

        Where these would be too few, lines from anywhere in the fronts.
        """
        sizes, likely = [shard.size() for shard in shards], likely_sizes(shards)
        chosen, front = self._to_unpack(len(shards), sum(likely), budget)
        every = max(1, round(sum(likely[number] for number, _ in chosen) / budget))
        stop = _unpacked_at_most(budget) // len(chosen)
        if front:
            every = max(1, sum(min(stop, likely[number]) for number, _ in chosen) // budget)
        blocks, whole = [], every == 1 and len(chosen) == len(shards)
        for cluster, (number, times) in enumerate(chosen):
            shard, size = shards[number], sizes[number]
            pieces = within(self._slices(shard), stop) if front else self._slices(shard)
            mine, unpacked = self._spread(lines_of(pieces, _block_size(budget)), every)
            read = float(size)
            if front and unpacked >= stop:
                read = min(size, unpacked * size / (told_size(shard) or size * expansion(shard, stop)))
            whole &= read == size
            for block in mine:
                block.size *= read / unpacked if unpacked else 0.0
                block.weight, block.cluster = block.weight * times, 0 if len(chosen) == len(shards) else cluster
            blocks += mine
        front &= not whole
        if front:
            self.notes.append(
                "packed files can only be read from the front, and these are large: the numbers rest on their "
                "beginnings, and how far off they are cannot be told"
            )
        yield self._found(Stratum(sum(sizes), blocks, whole, front=front))

    def _to_unpack(self, count: int, size: int, budget: int) -> tuple[list[tuple[int, int]], bool]:
        """Which of `count` files or row groups, of `size` bytes in all, to unpack, as `_chosen` has it; and whether
        these are too few to be whole, so that only their fronts are read."""
        fit = min(count, BLOCKS, int(count * _unpacked_at_most(budget) / max(1, size)))
        front = fit < min(count, ENOUGH)
        return self._chosen(count, ENOUGH if front else fit), front

    def _spread(self, pieces: Iterator[Slice], every: int) -> tuple[list[Block], int]:
        """Blocks of one of every `every` slices, each with the number it stands for; and where the last slice ends."""
        end = 0

        def passed() -> Iterator[Slice]:
            nonlocal end
            for piece in pieces:
                end = piece.stop
                yield piece

        taken = drawn(passed(), every, self._random)
        return [replace(self._block([piece]), weight=weight) for piece, weight in taken], end

    def _groups(self, shards: list[InputShard], budget: int) -> Iterator[Stratum]:
        """Parquet: rows from anywhere in row groups, measured in bytes of the column with the text."""
        broken: list[InputShard] = []
        groups: list[RowGroup] = []
        for shard in shards:
            found = row_groups(shard, self._columns[:-1])
            if found is None:
                broken.append(shard)
            else:
                groups += found
        if broken:
            yield next(self._as_they_are(broken, budget))
        if groups:
            yield self._found(self._rows(groups, budget))

    def _rows(self, groups: list[RowGroup], budget: int) -> Stratum:
        total, rows = sum(group.size for group in groups), sum(group.rows for group in groups)
        chosen, front = self._to_unpack(len(groups), total, budget)
        stop = _unpacked_at_most(budget) // len(chosen) if front else total
        every = max(1, round(sum(min(stop, groups[number].size) for number, _ in chosen) / budget))
        blocks, whole = [], every == 1 and len(chosen) == len(groups)
        for cluster, (number, times) in enumerate(chosen):
            group = groups[number]
            step = max(1, min(group.rows // ENOUGH, group.rows * _block_size(budget) // group.size))
            pieces = rows_of(group, self._columns[:-1], step)
            if front:
                pieces = within(pieces, math.ceil(group.rows * min(1.0, stop / group.size)))
            mine, read = self._spread(pieces, every)
            whole &= read == group.rows
            for block in mine:
                block.size *= group.size / group.rows
                block.weight *= times * group.rows / max(1, read)
                block.cluster = 0 if len(chosen) == len(groups) else cluster
            blocks += mine
        front &= not whole
        if front:
            self.notes.append(
                "row groups are large and were read from the front: the numbers rest on their beginnings, and how far "
                "off they are cannot be told"
            )
        return Stratum(total, blocks, whole, rows, front)

    @staticmethod
    def _found(part: Stratum) -> Stratum:
        if not part.whole and not any(block.size for block in part.blocks):
            raise RequestError(f"no document begins in the blocks that were read; give a larger {setting('sample')}")
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
            started += encoded.checks.seconds["compare"]  # loads the other engine
        seconds = time.perf_counter() - started
        self.seconds += seconds
        return Block(np.concatenate(lengths) if lengths else np.zeros(0, np.int64), faulty, seconds, size)

    def _note(self, faults: list[DocumentFault]) -> None:
        for fault in faults:
            self.faults[fault.reason] += 1
            self.examples.setdefault(fault.reason, f"{fault.source} at {fault.offset:,}: {fault.message}")


def likely_sizes(shards: list[InputShard]) -> list[int]:
    """Bytes of text in each input shard, as the file tells, or as the beginnings of a few that don't let one guess."""
    told = of_each(told_size, shards)
    guessed = [shard for shard, size in zip(shards, told, strict=True) if shard.packed and size is None]
    few = guessed[:: max(1, len(guessed) // ENOUGH)]
    times = sum(expansion(shard, READ) for shard in few) / len(few) if few else 1.0
    return [
        round(shard.size() * times) if size is None and shard.packed else size or rough_size(shard)
        for shard, size in zip(shards, told, strict=True)
    ]


def _unpacked_at_most(budget: int) -> int:
    return max(LOOK * budget, UNPACK)


def _block_size(budget: int) -> int:
    return min(max(budget // BLOCKS, SMALLEST), READ)


def _opens(shard: InputShard) -> bool:
    try:
        shard.open(0).close()
    except OSError:
        return False
    return True
