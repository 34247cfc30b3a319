"""What workers are given, in words."""

from collections.abc import Sequence
from contextlib import closing

from millstream.corpus.sources import InputShard, chunks
from millstream.errors import Unusable, setting
from millstream.exports.tasks import Task
from millstream.records import Part, Range
from millstream.runs.pack.counts import ShardTask
from millstream.runs.pack.tokenizing import PartTask

ADVICE = (
    "The same command goes on from what is done. If it ends there again, a document there does it: see whether "
    f"{setting('engine', 'reference')} can read it, or mend it, or take it out"
)
"""What is good to do where a part of a corpus kills its workers."""
_LOOKED_AT = 1 << 30  # bytes that are read, to say which lines a part has


def named(unit: Part | PartTask | ShardTask | Task, shards: Sequence[InputShard]) -> str:
    """A unit in words, for who has to find what kills workers.

    >>> shards = [InputShard("/c/a.jsonl", "c/a.jsonl", "jsonl"), InputShard("/c/b.parquet", "c/b.parquet", "parquet")]
    >>> named(Part(0, (Range(0, 1000, 2000),)), shards)
    'c/a.jsonl, bytes 1,000 to 2,000'
    >>> named(Part(0, (Range(0), Range(1, 0, 50))), shards)
    'c/a.jsonl, bytes 0 to c/b.parquet, rows to 50'
    >>> named(Part(0, (Range(1, 50),)), shards)
    'c/b.parquet, rows 50 to its end'
    >>> named(ShardTask("train", 3, 1, {}, ()), shards)
    'output shard 3 of train, documents 0 to 0'
    """
    if isinstance(unit, ShardTask):
        low = unit.pieces[0].before.ordinal if unit.pieces else 0
        high = unit.pieces[-1].after.ordinal if unit.pieces else 0
        return f"output shard {unit.first} of {unit.subset}, documents {low:,} to {high:,}"
    if isinstance(unit, PartTask):
        unit = unit.part
    if not isinstance(unit, Part):
        return unit.words
    first, last = unit.ranges[0], unit.ranges[-1]

    def what(each: Range) -> str:
        return "rows" if shards[each.source].kind == "parquet" else "bytes"

    behind = f"to {shards[last.source].name}, {what(last)} to" if last.source != first.source else "to"
    end = "its end" if last.stop is None else f"{last.stop:,}"
    lines = _lines(first, shards[first.source]) if len(unit.ranges) == 1 else ""
    return f"{shards[first.source].name}, {what(first)} {first.start:,} {behind} {end}{lines}"


def _lines(wanted: Range, shard: InputShard) -> str:
    """Which lines begin in a range of bytes, where that can be seen soon: they are its documents, and a part is not
    known by them before it is read."""
    far = shard.far or shard.uri == "-" or max(wanted.start, wanted.stop or 0) > _LOOKED_AT
    if far or shard.kind != "jsonl" or (not wanted.start and wanted.stop is None):
        return ""
    try:
        first = _lines_before(wanted.start, shard) + 1
        last = None if wanted.stop is None else _lines_before(wanted.stop, shard)
    except (OSError, Unusable):
        return ""
    if last is not None and last < first:
        return f", within line {last:,}"
    return f", lines {first:,} to {'its end' if last is None else f'{last:,}'}"


def _lines_before(stop: int, shard: InputShard) -> int:
    """How many lines begin before a byte."""
    count, left = int(stop > 0), stop - 1
    with closing(chunks(shard, stop=stop)) as pieces:
        while left > 0 and (piece := next(pieces, b"")):
            count += piece[:left].count(b"\n")
            left -= len(piece)
    return count
